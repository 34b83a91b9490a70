"""The report as a file: what it holds, how it is escaped, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_data import columns, write_scores
from score_files import manifest

from fastfi.errors import DataError, OptionError
from fastfi.report import write_report

HOSTILE = "</script><script>alert(1)</script>"
NASTY = [HOSTILE, "\"'><img src=x onerror=alert(2)>", "a & b <b>", "<!-- \u2028 \u202e ünïcödé 猫"]


class Parsed(HTMLParser):
    """Elements with their attributes, the text of scripts, the text that is seen."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def data(self) -> Any:
        return json.loads(self.scripts[0])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def unpack(array: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), "<" + array["dtype"])


def page_of(tmp_path: Path, values: Any, **how: Any) -> Parsed:
    names = ("config", "class_names", "errors", "complete")
    scores = write_scores(tmp_path / "scores", values, **{k: how.pop(k) for k in names if k in how})
    path = write_report(scores, tmp_path / "report.html", **how)
    return Parsed(path.read_text(encoding="utf-8"))


def test_the_columns_are_those_of_the_scores(tmp_path: Path) -> None:
    values = columns(500)
    values["fi"][:2] = 0.0, np.inf
    page = page_of(tmp_path, values, errors={7: "cannot be decoded"})
    sheet = page.data()["sheets"][0]
    assert sheet["ids"] == {"range": 500} and sheet["rows"] == 500
    logs = unpack(sheet["numbers"]["fi"])
    assert logs.dtype == np.float32 and np.isnan(logs[7])
    assert np.isneginf(logs[0]) and np.isposinf(logs[1])
    rest = np.delete(np.arange(500), [0, 1, 7])
    # log10 is rounded to float32: |log10 FI| < 8 here, an error of 2^-22 of the exponent
    np.testing.assert_allclose(10.0 ** logs[rest].astype(float), values["fi"][rest], rtol=6e-7)
    np.testing.assert_array_equal(unpack(sheet["label"]), values["label"])
    predicted = unpack(sheet["predicted"])
    assert predicted[7] == 10  # none: it has no prediction
    np.testing.assert_array_equal(predicted[rest], values["predicted"][rest])
    assert unpack(sheet["failed"]).tolist() == [7]
    assert sheet["errors"] == [[7, "cannot be decoded"]]
    assert "cannot be decoded" in page.text


@pytest.mark.parametrize("extreme", [(1e-320, 1e-318), (1e300, 1e308)])
def test_extreme_values_stay_on_the_axis(tmp_path: Path, extreme: tuple[float, float]) -> None:
    values = columns(50)
    values["fi"][:3] = *extreme, 0.0
    measure = page_of(tmp_path, values).data()["measures"][0]
    assert -307 < measure["low"] < measure["zero"] < measure["high"] < 307
    assert measure["infinity"] is None


@pytest.mark.parametrize("fi", [[0.0, 0.0], [np.inf, np.inf], [0.5, 0.5]])
def test_values_without_a_spread(tmp_path: Path, fi: list[float]) -> None:
    values = {**columns(2), "fi": fi}
    measure = page_of(tmp_path, values).data()["measures"][0]
    assert measure["low"] < measure["high"]


def test_percentiles_in_the_table(tmp_path: Path) -> None:
    values = columns(1000)
    page = page_of(tmp_path, values)
    for q in (1, 50, 99):
        assert f"{np.percentile(values['fi'], q):.4g}".replace("e-0", "e-") in page.text
    of_3 = values["fi"][values["label"] == 3]
    assert f"{np.median(of_3):.4g}".replace("e-0", "e-") in page.text
    wrong = int((values["label"] != values["predicted"]).sum())
    assert f"{1 - wrong / 1000:.2%} ({wrong} misclassified)" in page.text


def test_two_sets_and_their_distance(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = columns(800, seed=1), columns(300, seed=2)
    a["fi"][:5] = np.inf
    first = write_scores(tmp_path / "a", a)
    path = write_report(
        first, tmp_path / "r.html", write_scores(tmp_path / "b", b), names=("früh", "spät")
    )
    page = Parsed(path.read_text(encoding="utf-8"))
    assert f"{stats.ks_2samp(a['fi'], b['fi']).statistic:.4g}" in page.text
    assert "früh" in page.text and "spät" in page.text
    data = page.data()
    assert [sheet["rows"] for sheet in data["sheets"]] == [800, 300]
    for curve, n, infinite in zip(
        data["measures"][0]["ecdf"]["y"], (800, 300), (5, 0), strict=True
    ):
        assert unpack(curve)[-1] == pytest.approx(1 - infinite / n)
    for shares, infinite in zip(data["measures"][0]["histogram"]["y"], (5 / 800, 0), strict=True):
        assert unpack(shares).sum() == pytest.approx(1 - infinite, abs=1e-6)


def test_columns_in_common(tmp_path: Path) -> None:
    both = write_scores(tmp_path / "a", columns(20, names=("fi@entropy", "fi@margin")))
    one = write_scores(tmp_path / "b", columns(20, names=("fi@margin",)))
    page = Parsed(write_report(both, tmp_path / "r.html", one).read_text(encoding="utf-8"))
    assert [m["column"] for m in page.data()["measures"]] == ["fi@margin"]
    other = write_scores(tmp_path / "c", columns(20))
    with pytest.raises(DataError, match=r"in common, got fi@entropy, fi@margin in .* and fi in"):
        write_report(both, tmp_path / "s.html", other)


def test_variants_and_layers(tmp_path: Path) -> None:
    names = [f"{head}fi:{block}{end}" for head in ("", "predicted_") for block in ("a@b", "c")
             for end in ("@entropy", "@margin")]  # fmt: skip
    values = columns(40, names=names)
    values |= {"rank:a@b": [9] * 40, "rank:c": [3] * 40}
    page = page_of(tmp_path, {k: v for k, v in values.items() if "rank:a@b@" not in k})
    data = page.data()
    assert {(m["variant"], m["block"]) for m in data["measures"]} == {
        (f"{head}fi@{o}", block)
        for head in ("", "predicted_") for block in ("a@b", "c") for o in ("entropy", "margin")
    }  # fmt: skip
    assert data["blocks"] == ["a@b", "c"]
    quartiles = [unpack(band) for band in data["profiles"]["fi@margin"]]
    expected = np.sort(values["fi:c@margin"])[[9, 29, 19]]  # the 10th, 30th and 20th of 40
    np.testing.assert_allclose([band[1] for band in quartiles], expected)
    ids = {a.get("id") for a in page.all("select")}
    assert {"variant", "block", "grouping", "class"} <= ids


def test_many_layers_stay_within_the_budget(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fastfi.report._pack.COLUMNS_BUDGET", 3 * 100 * 16 // 3)
    page = page_of(tmp_path, columns(100, names=[f"fi:l{i}" for i in range(7)]))
    data = page.data()
    assert [m["block"] for m in data["measures"]] == ["l0", "l1", "l2"]
    assert len(unpack(data["profiles"]["fi"][0])) == 7 and len(data["blocks"]) == 7
    assert "of 3 layers only; the other 4 are in the profile" in page.text


def test_no_labels(tmp_path: Path) -> None:
    values = columns(30)
    values["label"] = [None] * 30
    page = page_of(tmp_path, values)
    assert "no labels" in page.text and "by predicted class" in page.text
    assert not [a for a in page.all("select") if a.get("id") == "grouping"]
    assert not [a for a in page.all("input") if a.get("id") == "wrong"]


def test_rows_without_a_score_and_a_reason(tmp_path: Path) -> None:
    values = columns(30)
    values["fi"] = [None if row == 4 else value for row, value in enumerate(values["fi"])]
    page = page_of(tmp_path, values, complete=False)
    assert "no score and no reason given" in page.text and "unfinished" in page.text


def test_files_of_older_versions(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores", columns(60))
    (folder / "_fastfi.json").unlink()
    page = Parsed(write_report(folder, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.data()["sheets"][0]["rows"] == 60 and "not stored" in page.text


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    values = columns(4, classes=4)
    values["id"] = NASTY
    page = page_of(
        tmp_path, values, class_names=[*NASTY], errors={3: HOSTILE}, title=HOSTILE,
        names=[HOSTILE], config={"note": HOSTILE},
    )  # fmt: skip
    assert len(page.scripts) == 3  # the data, plotly's and the page's own
    assert not page.all("img")
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    data = page.data()
    assert data["sheets"][0]["ids"]["texts"] == NASTY and data["classes"][0] in NASTY
    assert HOSTILE in page.text
    for figure in data["figures"].values():
        for trace in figure["data"]:
            assert "<" not in trace.get("name", "")  # plotly reads markup


def test_half_a_character(tmp_path: Path) -> None:
    page = page_of(tmp_path, columns(10), class_names=["\ud800"] * 10)
    assert page.data()["classes"][0] == "\ud800"


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", columns(100))
    content = write_report(scores, tmp_path / "r.html").read_text(encoding="utf-8")
    page = Parsed(content)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data-src"):
            address = attributes.get(name) or ""
            assert address.startswith(("data:", "#")) or not address, (tag, address)
    assert not re.search(r"@import|@font-face|url\(", content.partition("</style>")[0])
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "connect-src" not in policy
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "http" not in page.scripts[2]


def test_60_000_points_stay_small(tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", columns(60_000))
    path = write_report(scores, tmp_path / "report.html")
    assert path.stat().st_size < 8_000_000


def images_of(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, 12, 10)).astype(np.uint8)


def test_gallery_with_maps(tmp_path: Path) -> None:
    values, pixels = columns(20), images_of(20)
    np.savez(tmp_path / "images.npz", x=pixels, y=values["label"])
    order = np.argsort(-values["fi"])[:5]
    maps = np.zeros((2, 2, 3, 12, 10), np.float32)
    maps[0, 1, :, 4, 6] = 3.0
    np.savez(tmp_path / "maps.npz", maps=maps, id=order[:2], scales=[1, 3])
    page = page_of(
        tmp_path, values, images=tmp_path / "images.npz", maps=tmp_path / "maps.npz", top=5
    )
    pictures = page.all("img")
    assert len(pictures) == 5 + 2 * 2 and all(p["alt"] for p in pictures)
    shown = [int(re.match(r"Sample (\d+),", p["alt"] or "").group(1))  # type: ignore[union-attr]
             for p in pictures if (p["alt"] or "").startswith("Sample")]  # fmt: skip
    assert shown == order.tolist()

    def decoded(source: str | None) -> np.ndarray:
        assert source is not None and source.startswith("data:image/png;base64,")
        file = io.BytesIO(base64.b64decode(source.partition(",")[2]))
        return np.asarray(Image.open(file).convert("RGB"))

    np.testing.assert_array_equal(decoded(pictures[0]["src"]), pixels[order[0]].transpose(1, 2, 0))
    first, second = decoded(pictures[1]["src"]), decoded(pictures[2]["src"])
    assert (first == first[0, 0]).all()  # zeros: the same colour everywhere
    hot = np.argwhere((second != second[0, 0]).any(-1)).tolist()
    assert hot == [[4, 6]] and second[4, 6].sum() > second[0, 0].sum()


def test_images_that_do_not_belong(tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", columns(20))
    np.savez(tmp_path / "few.npz", x=images_of(2))
    with pytest.raises(DataError, match=r"not the images that were scored: .* has no image"):
        write_report(scores, tmp_path / "r.html", images=tmp_path / "few.npz")
    np.savez(tmp_path / "images.npz", x=images_of(20))
    np.savez(tmp_path / "other.npz", maps=np.zeros((3, 2, 5, 5)))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (("other", "expected the arrays maps, id and scales"),
                          ("text", "not an npz file"), ("none", "not an npz file")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            write_report(
                scores, tmp_path / "r.html", images=tmp_path / "images.npz",
                maps=tmp_path / f"{name}.npz",
            )  # fmt: skip
    assert not (tmp_path / "r.html").exists()
    values = columns(20)
    values["id"] = [f"{i}.png" for i in range(20)]
    paths = write_scores(tmp_path / "paths", values)
    with pytest.raises(DataError, match=r"its ids are row numbers, those of .* are paths"):
        write_report(paths, tmp_path / "r.html", images=tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"names": ["a", "b"]}, "names: expected 1 different names"),
        ({"names": "a"}, "names: expected 1"),
        ({"top": -1}, "top: expected an integer of at least 0, got -1"),
        ({"top": True}, "top: expected"),
        ({"maps": "maps.npz"}, "maps: expected images too"),
    ],
)
def test_bad_options(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    scores = write_scores(tmp_path / "scores", columns(5))
    with pytest.raises(OptionError, match=message):
        write_report(scores, tmp_path / "r.html", **how)


def test_targets(tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", columns(5))
    for name, message in (("r.txt", "ending in .html"), ("none/r.html", "no folder")):
        with pytest.raises(OptionError, match=message):
            write_report(scores, tmp_path / name)
    target = tmp_path / "r.html"
    target.write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        write_report(scores, target)
    assert target.read_text() == "mine"
    write_report(scores, target, overwrite=True)
    assert target.stat().st_size > 1_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "scores"]


def test_data_without_samples(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores", columns(5))
    manifest(empty := tmp_path / "empty", 0)
    for pair in ((empty, None), (folder, empty)):
        with pytest.raises(DataError, match="empty: holds no samples, as the data had none"):
            write_report(pair[0], tmp_path / "r.html", pair[1])
    assert not (tmp_path / "r.html").exists()


def test_scores_that_are_not_there_yet(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores", columns(5), complete=False)
    next(folder.glob("part-*")).unlink()
    with pytest.raises(DataError, match="expected scores, got none"):
        write_report(folder, tmp_path / "r.html")
