"""``fastfi.score`` where something fails: a sample becomes a row with an error, all else raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import encoded, pixels, write_parquet
from score_runs import (
    CLASSES,
    Broken,
    Items,
    Stream,
    check_values,
    data,
    measured,
    network,
    rows,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
)  # fmt: skip

import fastfi
from fastfi.data import open_dataset
from fastfi.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

N = 30
X, Y = data(N)


def items(bad: dict[int, Any] | None = None) -> list[Any]:
    """(x, y), or (id, x, y) where the replacement is one."""
    found: list[Any] = list(zip(X, Y, strict=True))
    for i, item in (bad or {}).items():
        found[i] = item
    return found


def check_others(scores: fastfi.Scores, bad: dict[int, str], net: Any = None) -> None:
    """Rows ``bad`` have an error that matches, and no score; all others are as without them."""
    got = rows(scores)
    good = [i for i in range(N) if i not in bad]
    expected = measured(net or network(), X[good], Y[good])
    assert scores.complete and scores.errors == len(bad) and len(scores) == N
    assert [i for i, e in enumerate(got["error"]) if e is not None] == sorted(bad)
    for i, text in bad.items():
        assert re.search(text, got["error"][i]), got["error"][i]
        empty = [c for c in got if c not in ("id", "label", "error") and got[c][i] is not None]
        assert empty == []
    np.testing.assert_allclose([got["fi"][i] for i in good], expected.fi, rtol=1e-9)


NAN, WIDE = X[0].clone(), torch.ones(1, 4, 6, dtype=torch.float64)
NAN[0, 1, 2] = torch.nan
BAD: dict[str, tuple[Any, str]] = {
    "NaN": ((NAN, 1), "^x: expected finite pixels, got NaN or infinite ones$"),
    "infinite": ((NAN.nan_to_num(torch.inf), 1), "x: expected finite pixels"),
    "label above": ((X[0], CLASSES), "^y: expected labels from 0 to 3, got 4"),
    "label below": ((X[0], -1), "^y: expected labels from 0 to K - 1, got -1"),
    "label None": ((X[0], None), "^no label$"),
    "label float": ((X[0], 1.5), r"^LabelError: data: expected integer labels, got float 1\.5$"),
    "label bool": ((X[0], True), "expected integer labels, got bool"),
    "label huge": ((X[0], 2**70), "expected integer labels, got int 1180"),
    "label text": ((X[0], "cat"), "expected integer labels, got str 'cat'"),
    "label tensor": ((X[0], torch.tensor([1, 2])), r"expected integer labels, got Tensor \[2\]"),
    "shape": ((WIDE, 1), "RuntimeError: mat1 and mat2"),
    "dtype": ((X[0].float(), 1), "RuntimeError: mat1 and mat2 must have the same dtype"),
    "integers": ((X[0].int(), 1), "x: expected a floating-point tensor, got torch.int32"),
    "no pixels": ((torch.empty(0, 3), 1), "x: expected at least one sample and one pixel"),
    "None": ((None, 1), "expected x to be a tensor, an array or an image, got NoneType"),
    "objects": ((np.array(["a", None]), 1), "TypeError: can't convert np.ndarray"),
    "four parts": ((X[0], 1, 2, 3), r"expected \(x, y\) or \(id, x, y\), got a tuple of 4"),
    "mapping": ({"pixels": X[0]}, "expected a column of inputs"),
}


@pytest.mark.parametrize(
    ("kind", "workers"),
    [(kind, 0) for kind in BAD] + [(kind, 1) for kind in ("NaN", "label None", "mapping")],
)
def test_a_sample_that_fails_becomes_a_row(kind: str, workers: int, tmp_path: Path) -> None:
    item, text = BAD[kind]
    given = items({3: item, 17: item})
    scores = fastfi.score(network(), given, out=tmp_path / "s", workers=workers, batch_size=8)
    check_others(scores, {3: text, 17: text})
    assert rows(scores)["id"] == list(range(N))
    if kind.startswith("label") or kind == "None":
        assert rows(scores)["label"][3] in (None, CLASSES, -1, 1)


@pytest.mark.parametrize("form", ["stream", "DataLoader", "collate", "first"])
def test_in_other_kinds_of_data(form: str, tmp_path: Path) -> None:
    """Streams of single samples, a DataLoader's batches, a collate function that fails; the very
    first samples, which the data is recognised by."""
    at = (0, 1) if form == "first" else (3, 17)
    bad = dict.fromkeys(at, (NAN, 1))
    if form in ("DataLoader", "collate"):
        bad = dict.fromkeys(at, (WIDE, 1))  # cannot be stacked
    given: Any = items(bad)
    if form == "stream":
        given = Stream(given)
    elif form == "DataLoader":
        given = DataLoader(given, batch_size=8)
    elif form == "collate":
        given = DataLoader(given, collate_fn=stacked)
    text = "RuntimeError: mat1" if form in ("DataLoader", "collate") else "expected finite pixels"
    scores = fastfi.score(network(), given, out=tmp_path / "s", batch_size=8)
    check_others(scores, dict.fromkeys(at, text))


def stacked(some: list[Any]) -> Any:
    return torch.stack([x for x, _ in some]), torch.tensor([int(y) for _, y in some])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("at", [(0, 7), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)])
def test_items_that_raise(at: tuple[int, ...], workers: int, tmp_path: Path) -> None:
    """However many: it is the data that is to blame, not the model."""
    given = Items(items(), dict.fromkeys(at, OSError("bad sector")))
    scores = fastfi.score(network(), given, out=tmp_path / "s", workers=workers, batch_size=4)
    check_others(scores, dict.fromkeys(at, "^OSError: bad sector$"))
    assert rows(scores)["label"][7] is None


def test_an_item_that_raises_has_no_id_where_items_have_their_own(tmp_path: Path) -> None:
    triples = [(f"n{i}", x, y) for i, (x, y) in enumerate(items())]
    given = Items(triples, {4: KeyError("gone")})
    scores = fastfi.score(network(), given, out=tmp_path / "s")
    check_others(scores, {4: "^item 4: KeyError: 'gone'$"})
    assert rows(scores)["id"] == [None if i == 4 else f"n{i}" for i in range(N)]


@pytest.mark.parametrize("wrong", [2.5, "text", True, 2**70, (1, 2)])
def test_ids_of_the_wrong_type(wrong: Any, tmp_path: Path) -> None:
    """A row without an id that says which sample it was."""
    triples = [(1000 + i, x, y) for i, (x, y) in enumerate(items())]
    triples[18] = (wrong, *triples[18][1:])  # none of those by which the data is recognised
    for name, given in (("list", triples), ("stream", Stream(triples))):
        scores = fastfi.score(network(), given, out=tmp_path / name, batch_size=8)
        text = "^item 18: .*expected (ids to be integers|an id)"
        check_others(scores, {18: text})
        assert rows(scores)["id"] == [None if i == 18 else 1000 + i for i in range(N)]


def test_integers_among_texts_are_texts(tmp_path: Path) -> None:
    triples: list[Any] = [(f"n{i}", x, y) for i, (x, y) in enumerate(items())]
    triples[17] = (17, *triples[17][1:])
    scores = fastfi.score(network(), triples, out=tmp_path / "s")
    check_values(scores, network(), X, Y)
    assert rows(scores)["id"][17] == "17"


def marked(positions: tuple[int, ...], value: float = 7.0) -> list[Any]:
    """Samples of which some have a first pixel that a :class:`Broken` network knows."""
    found = [(x.clone(), y) for x, y in items()]
    for i in positions:
        found[i][0].view(-1)[0] = value
    return found


@pytest.mark.parametrize("at", [(9,), (0, 1, 2), tuple(range(0, N, 2))])
@pytest.mark.parametrize(
    ("action", "text"),
    [
        (ValueError("odd sample"), "^ValueError: odd sample$"),
        (torch.nan, "^model: expected finite logits, got NaN or infinite ones$"),
        (torch.inf, "^model: expected finite logits, got NaN or infinite ones$"),
    ],
    ids=["raises", "NaN", "inf"],
)
def test_samples_on_which_the_model_fails(
    action: Any, text: str, at: tuple[int, ...], tmp_path: Path
) -> None:
    net = Broken({7.0: action}).eval()
    scores = fastfi.score(net, marked(at), out=tmp_path / "s", batch_size=16)
    check_others(scores, dict.fromkeys(at, text))


def test_many_failures_in_small_chunks(tmp_path: Path) -> None:
    """Little memory: the failing samples of a batch turn up one by one, and what went well before
    each is not repeated again and again."""
    n = 200
    x, y = data(n)
    x[::2, 0, 0, 0] = 7.0
    net = Broken({7.0: torch.nan}).eval()
    calls: list[int] = []
    net.inner.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    scores = fastfi.score(net, (x, y), out=tmp_path / "s", batch_size=n, memory_budget=1)
    assert scores.errors == n // 2
    assert sum(calls) < 8 * n
    some = measured(network(), x[1:100:2], y[1:100:2])
    np.testing.assert_allclose(rows(scores)["fi"][1:100:2], some.fi, rtol=1e-9)


@pytest.mark.parametrize("model", ["raises", "NaN", "no logits", "training"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_always_fails(model: str, strict: bool, tmp_path: Path) -> None:
    """After a few samples; the directory can be used once the model is mended."""
    net: Any
    net, error, text = {
        "raises": (nn.Linear(3, 4).double().eval(), RuntimeError, "mat1 and mat2"),
        "NaN": (nn.Sequential(network(), Times(torch.nan)).eval(), ValueError, "finite logits"),
        "no logits": (nn.Sequential(network(), Pair()).eval(), ValueError, "expected a tensor of"),
        "training": (network().append(nn.Dropout()), RuntimeError, "evaluation mode"),
    }[model]
    if model == "training":
        net.train()
    reads = Items(items())
    with pytest.raises(error, match=text):
        fastfi.score(net, reads, out=tmp_path / "s", strict=strict, batch_size=4)
    assert reads.reads <= 16 + 12
    assert not list(tmp_path.glob("s/*.parquet"))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ((NAN, 1), ValueError, r"sample 17: x: expected finite pixels"),
        ((X[0], 9), ValueError, r"sample 17: y: expected labels from 0 to 3, got 9"),
        ((X[0], None), fastfi.DataError, r"sample 17: no label"),
        ((None, 1), fastfi.DataError, r"sample 17: InputError: data: expected x to be a tensor"),
    ],
)
def test_strict(bad: Any, error: Any, text: str, tmp_path: Path) -> None:
    """It stops at the sample, keeps what was scored, and goes on when the data is mended."""
    with pytest.raises(error, match=text):
        fastfi.score(
            network(), items({17: bad}), out=tmp_path / "s", batch_size=4, strict=True, data_id="d"
        )
    there = fastfi.open_scores(tmp_path / "s")
    assert len(there) == 16 and not there.complete and there.errors == 0
    scores = fastfi.score(
        network(), items(), out=tmp_path / "s", batch_size=4, strict=True, data_id="d"
    )
    check_values(scores, network(), X, Y)


def test_damaged_image_files(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels(20, 5, 6)):
        (folder / f"{i:02}.png").write_bytes(encoded(image))
    (folder / "00.png").write_bytes(b"no image")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:40])
    (folder / "12.png").write_bytes(encoded(pixels(8, 8)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, CLASSES)).eval()
    for workers in (0, 1):
        source = open_dataset(tmp_path / "data", keep_errors=True)
        scores = fastfi.score(net, source, out=tmp_path / f"s{workers}", workers=workers)
        got = rows(scores)
        assert got["id"] == [f"a/{i:02}.png" for i in range(20)]
        bad = {i: text for i, text in enumerate(got["error"]) if text is not None}
        assert sorted(bad) == [0, 7, 12]
        assert all(f"a/{i:02}.png" in text for i, text in bad.items())
        assert "8 x 8" in bad[12] or "8, 8" in bad[12]


def test_damaged_images_in_parquet(tmp_path: Path) -> None:
    images = [encoded(image) for image in pixels(20, 5, 6)]
    images[7] = b"no image"
    write_parquet(tmp_path / "d.parquet", images, [0] * 20)
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, CLASSES)).eval()
    source = open_dataset(tmp_path / "d.parquet", keep_errors=True)
    scores = fastfi.score(net, source, out=tmp_path / "s", batch_size=8)
    assert scores.errors == 1 and "row 7" in rows(scores)["error"][7]
    with pytest.raises(fastfi.DataError, match="row 7"):
        fastfi.score(net, source, out=tmp_path / "strict", batch_size=4, strict=True)
    assert len(fastfi.open_scores(tmp_path / "strict")) == 4


def test_an_iterable_that_breaks_off(tmp_path: Path) -> None:
    """Its error comes through, and what was scored stays."""

    def broken() -> Iterator[Any]:
        yield from items()[:20]
        raise ConnectionError("the network is down")

    with pytest.raises(ConnectionError, match="the network is down"):
        fastfi.score(network(), broken(), out=tmp_path / "s", batch_size=8)
    assert len(fastfi.open_scores(tmp_path / "s")) >= 8
    check_values(
        fastfi.score(network(), iter(items()), out=tmp_path / "s", batch_size=8), network(), X, Y
    )


def test_streams_of_both_samples_and_batches(tmp_path: Path) -> None:
    both = [(X[0], Y[0]), (X[1:4], Y[1:4])]
    with pytest.raises(fastfi.InputError, match="expected single samples or batches, got both"):
        fastfi.score(network(), iter(both), out=tmp_path / "s")


@pytest.mark.parametrize(
    "batch",
    [
        (X[:4], Y[:3]),
        (X[:4], Y[:4].double()),
        ([1, 2], X[:4], Y[:4]),
        ([None] * 4, X[:4], Y[:4]),
    ],
)
def test_batches_whose_parts_do_not_belong_together(batch: Any, tmp_path: Path) -> None:
    with pytest.raises(fastfi.FastfiError, match="data: expected"):
        fastfi.score(network(), iter([(X[:4], Y[:4]), batch]), out=tmp_path / "s")


def test_data_of_which_nothing_can_be_scored(tmp_path: Path) -> None:
    items = [(torch.rand(1, 5, 6), "cat") for _ in range(20)]
    with pytest.warns(UserWarning, match="none of the 5 samples has a score; the first: Label"):
        scores = fastfi.score(network(), items[:5], out=tmp_path / "scores", progress=False)
    assert scores.errors == 5
    with pytest.raises(InputError, match="expected samples that can be read, got none among 16"):
        fastfi.score(network(), items, out=tmp_path / "more", progress=False)


def test_a_transform_that_fails_for_an_image(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=pixels(20, 1, 4, 5), y=np.arange(20) % 4)
    calls = []

    def transform(image: Tensor) -> Tensor:
        calls.append(1)
        if image[0, 0, 0] > 0.9:
            raise RuntimeError("too bright")
        return image.double()

    source = open_dataset(tmp_path / "images.npz")
    scores = fastfi.score(
        network(), source, out=tmp_path / "s", transform=transform, batch_size=4, progress=False
    )
    bright = [i for i, image in enumerate(next(source.batches()).x) if image[0, 0, 0] > 0.9]
    table = scores.to_table(["id", "error"]).to_pylist()
    assert bright
    assert [row["id"] for row in table if row["error"] == "RuntimeError: too bright"] == bright
    assert scores.errors == len(bright)


def test_items_of_a_stream_that_are_none(tmp_path: Path) -> None:
    x, y = X[:10], Y[:10]
    items = [(a, b) for a, b in zip(x, y, strict=True)]
    items[4] = (1, 2, 3, 4)  # type: ignore[call-overload]
    scores = fastfi.score(network(), iter(items), out=tmp_path / "s", progress=False)
    errors = scores.to_table(["error"]).column(0).to_pylist()
    assert [i for i, e in enumerate(errors) if e] == [4]
    assert "expected (x, y) or (id, x, y), got a tuple of 4" in errors[4]
    with pytest.raises(InputError, match="got a tuple of 4"):
        fastfi.score(network(), iter(items[4:]), out=tmp_path / "t", progress=False)
