"""``fastfi compare``: tables, JSON and figures."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_files import manifest, score_table, write_folder, write_part
from typer.testing import CliRunner, Result

from fastfi.cli._app import app
from fastfi.scoring.comparison import compare as compared

HEADS = "1 % 5 % 25 % 50 % 75 % 90 % 95 % 99 % max"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compare(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def said(*arguments: str) -> dict:
    result = compare(*arguments, "--json")
    assert result.exit_code == 0, result.stderr

    def constant(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return json.loads(result.stdout, parse_constant=constant)


def two(n: int = 40, m: int | None = None, **how) -> None:
    write_folder(Path("a"), [0, n], **how)
    write_folder(Path("b"), [0, m or n], seed=1, **how)


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_the_same_samples():
    two()
    result = compare("a", "b")
    assert result.exit_code == 0, result.stderr
    expected = compared("a", "b")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["column", "scored", *HEADS.split()]
    for i, name in enumerate("ab"):
        values = [f"{v:.4g}" for v in expected.percentiles[i].values()]
        assert lines[1 + i].split() == [name, "fi", "40", *values]
    assert lines[4:] == [
        f"Kolmogorov-Smirnov distance {expected.ks:.4g}, p = {expected.p_value:.3g}",
        "40 samples in both",
        f"40 pairs of scores, Spearman correlation {expected.pairs.spearman:.4f}, "
        "same label 40, same prediction 40",
    ]
    assert os.listdir() == ["a", "b"] or os.listdir() == ["b", "a"]


def test_json():
    two(40, 45, errors=[3])
    write_part(Path("b"), 0, 45, errors=[3], fi=[math.inf] * 45)
    found = said("a", "b", "--names", "train, test")
    expected = compared("a", "b")
    a, b = found["scores"]
    assert (a["name"], a["path"], a["column"], a["rows"], a["scored"], a["only"]) == (
        *("train", "a", "fi"),
        *(40, 39, 0),
    )
    assert (b["name"], b["rows"], b["scored"], b["only"]) == ("test", 45, 44, 5)
    assert set(b["percentiles"].values()) == {"inf"}
    assert found["ks"] == expected.ks == 1 and found["p_value"] == expected.p_value
    assert (found["matched"], found["paired"], found["unpaired"]) == (40, 39, None)
    assert found["spearman"] is None and found["same_label"] == 39
    assert found["same_data"] is True


def test_other_samples():
    two(40, 10)
    manifest(Path("b"), 10, data={"digest": "e"})
    result = compare("a", "b")
    assert (
        "not paired: 10 ids are in both, of 40 in the first and 10 in the second" in result.stdout
    )
    assert "Spearman" not in result.stdout
    found = said("a", "b")
    assert found["paired"] == 0 and found["matched"] == 10 and found["spearman"] is None
    assert found["same_label"] is None and found["same_data"] is False


def test_other_data_with_the_same_ids():
    two(40, 42)
    manifest(Path("b"), 42, data={"digest": "e"})
    lines = compare("a", "b").stdout.splitlines()
    assert "40 samples in both, 2 only in b" in lines
    assert lines[-1] == "the data differ (by their digests): pairs are of samples with the same id"


def test_names_are_the_paths_where_folders_are_called_alike():
    for folder in ("x", "y"):
        Path(folder).mkdir()
        write_folder(Path(folder, "scores"), [0, 5])
    names = [each["name"] for each in said("x/scores", "y/scores")["scores"]]
    assert names == ["x/scores", "y/scores"]
    assert [each["name"] for each in said("x/scores", ".//x/scores/")["scores"]] == [
        "x/scores",
        "x/scores",
    ]


@pytest.mark.parametrize("names", ["a", "a,b,c", "a,", ","])
def test_names_are_two(names):
    two()
    refused(compare("a", "b", "--names", names), "--names: expected two names separated by a comma")


def test_a_column():
    two(ends=[":x", ":y"])
    found = said("a", "b", "--column", "fi:y")
    assert found["scores"][1]["column"] == "fi:y"
    assert found["ks"] == compared("a", "b", "fi:y").ks
    refused(compare("a", "b", "--column", "fi"), "no column 'fi' in a; there are id, label")


def test_what_is_not_scores():
    two()
    refused(compare("a", "x"), "x: there is no such file or folder")
    write_folder(Path("c"), [0, 3], errors=[0, 1, 2])
    refused(compare("a", "c"), "c: no sample has a score in fi")


def test_unfinished_scores_are_told():
    two()
    manifest(Path("b"), 50, complete=False)
    result = compare("a", "b")
    assert result.exit_code == 0
    assert result.stderr == "fastfi: b: unfinished; missing: rows 40..49\n"


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PNG"])
@pytest.mark.parametrize("m", [40, 10])
def test_a_figure(suffix, m):
    two(40, m)
    result = compare("a", "b", "--figure", f"figure{suffix}")
    assert result.exit_code == 0, result.stderr
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix.lower()]
    content = Path(f"figure{suffix}").read_bytes()
    assert content.startswith(start) and len(content) > 4000
    assert sorted(os.listdir()) == ["a", "b", f"figure{suffix}"]


def test_a_figure_that_cannot_be_drawn(monkeypatch):
    two()
    Path("f.png").write_bytes(b"old")
    for name, message in (
        ("f.png", "--figure f.png: exists already; --overwrite replaces it"),
        ("f.jpg", "--figure f.jpg: expected a name ending in .png or .pdf or .svg"),
        ("x/f.png", "--figure x/f.png: there is no folder x"),
    ):
        refused(compare("a", "b", "--figure", name), message)
    assert Path("f.png").read_bytes() == b"old"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        refused(compare("a", "b", "--figure", "g.png"), "drawing figures needs matplotlib")
    assert compare("a", "b", "--figure", "f.png", "--overwrite").exit_code == 0
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_leaves_no_figure(monkeypatch):
    from matplotlib.figure import Figure

    def interrupt(self, file, **how):
        file.write(b"half")
        raise KeyboardInterrupt

    two()
    monkeypatch.setattr(Figure, "savefig", interrupt)
    result = compare("a", "b", "--figure", "f.png")
    assert result.exit_code == 130 and "no figures were written" in result.stderr
    assert sorted(os.listdir()) == ["a", "b"]


def test_names_and_ids_that_would_break_lines():
    whole = score_table(0, 3)
    ids = pa.array(["x\n", "x\n", "$y"])
    for name in ("a\n.parquet", "$b.parquet"):
        pq.write_table(whole.set_column(0, "id", ids), name)
    result = compare("a\n.parquet", "$b.parquet", "--figure", "f.png")
    assert result.exit_code == 0, result.stderr
    assert "a\\n" in result.stdout
    assert "not paired: the first holds the id 'x\\n' 2 times" in result.stdout
