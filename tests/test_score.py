"""``fastfi.score``: the values are those of ``fastfi.influence``, for every kind of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import encoded, pixels, write_idx, write_parquet
from PIL import Image
from score_runs import CLASSES, Items, Stream, check_values, data, files, measured, network, rows
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)  # fmt: skip

import fastfi
from fastfi.data import open_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

N = 45
X, Y = data(N)


class Iterable(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


class HuggingFace:
    """The part of ``datasets.Dataset`` that matters: rows are mappings, read many at once."""

    def __init__(self) -> None:
        self.features = {"img": object(), "label": SimpleNamespace(names=["a", "b", "c", "d"])}
        self.many = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"img": X[i], "label": int(Y[i]), "other": "text"}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.many += 1
        return [self[i] for i in indices]


def by_hand(items: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


def fixed(array: Any) -> Any:
    array.flags.writeable = False
    return array


def pairs() -> list[Any]:
    return list(zip(X, Y, strict=True))


def batches(size: int) -> list[Any]:
    return list(zip(X.split(size), Y.split(size), strict=True))


KINDS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Subset": lambda: Subset(TensorDataset(torch.cat([X, X]), torch.cat([Y, Y])), range(N)),
    "list": pairs,
    "list of (x, int)": lambda: [(x, int(y)) for x, y in pairs()],
    "NumPy": lambda: [(x.numpy(), y.numpy()[()]) for x, y in pairs()],
    "mappings": lambda: [{"note": 1, "label": y, "pixel_values": x} for x, y in pairs()],
    "Hugging Face": HuggingFace,
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "DataLoader, workers": lambda: DataLoader(TensorDataset(X, Y), num_workers=1),
    "DataLoader, collate": lambda: DataLoader(TensorDataset(X, Y), collate_fn=by_hand),
    "DataLoader, batch_sampler": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(X), 7, False)
    ),
    "DataLoader, unbatched": lambda: DataLoader(TensorDataset(X, Y), batch_size=None),
    "IterableDataset": Iterable,
    "DataLoader of IterableDataset": lambda: DataLoader(Iterable(), batch_size=6),
    "its single samples": lambda: DataLoader(Iterable(), batch_size=None),
    "generator": lambda: (pair for pair in pairs()),
    "generator of batches": lambda: (batch for batch in batches(7)),
    "generator of large batches": lambda: (batch for batch in batches(40)),
    "generator of NumPy batches": lambda: ((x.numpy(), y.numpy()) for x, y in batches(7)),
    "generator of arrays that cannot be written": lambda: (
        (fixed(x.numpy()), fixed(y.numpy())) for x, y in batches(7)
    ),
    "generator of reversed arrays": lambda: (
        (x.flip(0).numpy()[::-1], y.flip(0).numpy()[::-1]) for x, y in batches(7)
    ),
    "generator of lists": lambda: ((list(x), y.tolist()) for x, y in batches(7)),
    "generator of mappings": lambda: ({"x": x, "y": y} for x, y in batches(7)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_kind_of_data(kind: str, tmp_path: Path) -> None:
    """Ids are row numbers; parts end where blocks do, whatever the batches."""
    given = KINDS[kind]()
    scores = fastfi.score(network(), given, out=tmp_path / "s", batch_size=8, part_rows=20)
    check_values(scores, network(), X, Y)
    assert rows(scores)["id"] == list(range(N))
    assert rows(scores)["label"] == Y.tolist()
    assert files(tmp_path / "s") == [
        "_fastfi.json",
        "part-000000000000-000000000020.parquet",
        "part-000000000020-000000000040.parquet",
        "part-000000000040-000000000045.parquet",
    ]
    if kind == "Hugging Face":
        assert given.many > 0 and scores.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "sampler",
    [
        {"sampler": [7, 3, 30, 4]},
        {"batch_sampler": [[7, 3, 30], [4]]},
        {"batch_sampler": BatchSampler([7, 3, 30, 4], 3, False)},
    ],
    ids=["sampler", "batch sampler", "BatchSampler of a sampler"],
)
def test_a_sampler_chooses_samples_and_their_ids(sampler: Any, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(X, Y), **sampler)
    scores = fastfi.score(network(), loader, out=tmp_path / "s")
    check_values(scores, network(), X[[7, 3, 30, 4]], Y[[7, 3, 30, 4]])
    assert rows(scores)["id"] == [7, 3, 30, 4]


IDS = [f"img/{i:03}" for i in range(N)]


@pytest.mark.parametrize("names", [IDS, list(range(100, 100 + N)), torch.arange(N) * 3])
@pytest.mark.parametrize("form", ["list", "stream", "batches", "mappings", "DataLoader"])
def test_ids_of_the_data(names: Any, form: str, tmp_path: Path) -> None:
    triples = list(zip(names, X, Y, strict=True))
    given: Any = {
        "list": triples,
        "stream": Stream(triples),
        "batches": Stream([(names[i : i + 9], X[i : i + 9], Y[i : i + 9]) for i in range(0, N, 9)]),
        "mappings": [{"uid": n, "x": x, "target": y} for n, x, y in triples],
        "DataLoader": DataLoader(triples, batch_size=5),
    }[form]  # fmt: skip
    scores = fastfi.score(network(), given, out=tmp_path / "s", batch_size=10)
    check_values(scores, network(), X, Y)
    expected = names.tolist() if isinstance(names, Tensor) else names
    assert rows(scores)["id"] == expected
    assert scores.id_type == ("str" if names is IDS else "int")


def test_named_columns_of_mappings(tmp_path: Path) -> None:
    given = [{"x": 1 - x, "mine": x, "y": 0, "class": y, "key": n}
             for n, (x, y) in zip(IDS, pairs(), strict=True)]  # fmt: skip
    scores = fastfi.score(
        network(), given, out=tmp_path / "s", id_key="key", x_key="mine", y_key="class"
    )
    check_values(scores, network(), X, Y)
    assert rows(scores)["id"] == IDS


def shaded(channels: int) -> list[Image.Image]:
    shape = (20, 5, 6) if channels == 1 else (20, 5, 6, 3)
    return [Image.fromarray(array) for array in pixels(*shape)]


def float_net(inputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, CLASSES), nn.Tanh(), nn.Linear(4, 4)
    ).eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_tensors(channels: int, tmp_path: Path) -> None:
    images, y = shaded(channels), torch.arange(20) % CLASSES
    arrays = torch.tensor(np.array(images)).reshape(20, 5, 6, channels).movedim(3, 1)
    x, net = arrays.float() / 255, float_net(30 * channels)
    scores = fastfi.score(net, list(zip(images, y, strict=True)), out=tmp_path / "s", batch_size=20)
    expected = measured(net, x, y)
    np.testing.assert_allclose(rows(scores)["fi"], expected.fi, rtol=1e-6)


def test_transform(tmp_path: Path) -> None:
    """It gets what the data holds, and comes before anything else; batches sample by sample."""
    for name, given in (
        ("list", [(str(i), y) for i, y in enumerate(Y)]),
        ("batches", Stream([([str(i) for i in range(N)], Y)])),
    ):
        scores = fastfi.score(
            network(), given, out=tmp_path / name, transform=lambda text: X[int(text)]
        )
        check_values(scores, network(), X, Y)


def written(kind: str, folder: Path) -> Path:
    images, y = pixels(20, 5, 6), (np.arange(20) % CLASSES).astype(np.uint8)
    if kind == "idx":
        write_idx(folder, images, y)
    elif kind == "npz":
        np.savez(folder / "d.npz", x=images, y=y)
        return folder / "d.npz"
    elif kind == "parquet":
        write_parquet(folder / "d.parquet", [encoded(i) for i in images], y.tolist())
    else:
        for i, image in enumerate(images):
            (folder / "abcd"[i // 5]).mkdir(exist_ok=True)
            (folder / "abcd"[i // 5] / f"{i:02}.png").write_bytes(encoded(image))
    return folder


@pytest.mark.parametrize("workers", [None, 1])
@pytest.mark.parametrize("kind", ["idx", "npz", "parquet", "folder"])
def test_opened_data_sets(kind: str, workers: int | None, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = open_dataset(written(kind, folder))
    whole = next(iter(source.batches(100)))
    net = float_net(30)
    scores = fastfi.score(
        net, source, out=tmp_path / "s", workers=workers, batch_size=8, part_rows=10
    )
    expected = measured(net, whole.x, whole.y)
    np.testing.assert_allclose(rows(scores)["fi"], expected.fi, rtol=1e-5)
    assert rows(scores)["id"] == list(whole.ids)
    assert scores.id_type == source.id_type
    assert scores.class_names == source.classes
    assert scores.data is not None and scores.data["length"] == 20


@pytest.mark.parametrize("transformed", [False, True])
def test_transform_of_opened_data(transformed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source, net = open_dataset(written("npz", folder)), float_net(30)
    whole = next(iter(source.batches(100)))
    change = (lambda x: (x - 0.5) / 0.25) if transformed else None
    scores = fastfi.score(net, source, out=tmp_path / "s", transform=change, limit=7)
    x = (whole.x - 0.5) / 0.25 if transformed else whole.x
    expected = measured(net, x[:7], whole.y[:7])  # type: ignore[index]
    np.testing.assert_allclose(rows(scores)["fi"], expected.fi, rtol=1e-5)


@pytest.mark.parametrize("kind", ["list", "generator", "generator of batches", "DataLoader"])
@pytest.mark.parametrize("limit", [1, 8, 13, 1000])
def test_limit(kind: str, limit: int, tmp_path: Path) -> None:
    scores = fastfi.score(
        network(), KINDS[kind](), out=tmp_path / "s", limit=limit, batch_size=8, part_rows=10
    )
    check_values(scores, network(), X[:limit], Y[:limit])


def test_samples_of_different_shapes(tmp_path: Path) -> None:
    """They are scored shape by shape, and stay in order."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(4, 4)).double()
    x = [torch.rand(1, 3 + i % 3, 4, dtype=torch.float64) for i in range(20)]
    scores = fastfi.score(pooled.eval(), [(t, 1) for t in x], out=tmp_path / "s", batch_size=7)
    expected = [float(measured(pooled, t[None], torch.tensor([1])).fi) for t in x]
    np.testing.assert_allclose(rows(scores)["fi"], expected, rtol=1e-9)


def test_no_samples(tmp_path: Path) -> None:
    for name, given in (("map", []), ("stream", iter([]))):
        scores = fastfi.score(network(), given, out=tmp_path / name)
        assert len(scores) == 0 and scores.complete


def test_every_column(tmp_path: Path) -> None:
    """Names, order, types and metadata of the most that can be asked for."""
    net = network()
    scores = fastfi.score(
        net, (X, Y), out=tmp_path / "s", wrt="layers", y="both",
        objective=["cross_entropy", "margin"], batch_size=N,
    )  # fmt: skip
    names = ["1", "3"]
    of_one = [f"{p}{c}" for p in ("", "predicted_") for c in (
        "log_prob", *(f"fi:{n}@{f}" for f in ("cross_entropy", "margin") for n in names),
        *(f"rank:{n}" for n in names),
    )]  # fmt: skip
    assert list(scores.columns) == ["id", "label", "predicted", *of_one, "error"]
    assert scores.blocks == tuple(names)
    schema = pq.read_schema(tmp_path / "s" / "part-000000000000-000000000045.parquet")
    kinds = {"id": pa.int64(), "label": pa.int64(), "predicted": pa.int64(), "error": pa.string()}
    for field in schema:
        number = pa.int64() if "rank" in field.name else pa.float64()
        assert field.type == kinds.get(field.name, number)
    got = rows(scores)
    for prefix, y in (("", Y), ("predicted_", None)):
        for objective in ("cross_entropy", "margin"):
            expected = measured(net, X, y, wrt="layers", objective=objective)
            for i, n in enumerate(names):
                found = got[f"{prefix}fi:{n}@{objective}"]
                np.testing.assert_allclose(found, expected.fi[:, i], rtol=1e-9)
                assert got[f"{prefix}rank:{n}"] == expected.rank[:, i].tolist()
        np.testing.assert_allclose(got[f"{prefix}log_prob"], expected.log_prob, rtol=1e-12)
    metadata = {k.decode(): v.decode() for k, v in schema.metadata.items()}
    manifest = json.loads((tmp_path / "s" / "_fastfi.json").read_text())
    assert metadata["fastfi.version"] == manifest["fastfi"] == fastfi.__version__
    assert metadata["fastfi.torch"] == manifest["torch"] == torch.__version__
    for key in ("config", "model", "data"):
        assert json.loads(metadata[f"fastfi.{key}"]) == manifest[key]
    assert manifest["config"] == {
        "wrt": "layers", "inverse": "Exact(rtol=None)", "y": "both",
        "objective": ["cross_entropy", "margin"], "outputs": "logits", "lump": None,
        "assume_full_rank": False,
    }  # fmt: skip
    assert manifest["model"]["class"] == "torch.nn.modules.container.Sequential"
    assert (manifest["complete"], manifest["rows"], manifest["format"]) == (True, N, 1)
    assert (manifest["id_type"], manifest["blocks"]) == ("int", names)


def sharpness(log_p: Tensor, y: Tensor) -> Tensor:
    return log_p.exp().square().sum(1)


@pytest.mark.parametrize(
    ("options", "of_influence"),
    [
        ({"y": "predicted"}, {"y": None}),
        ({"inverse": "damped"}, {}),
        ({"inverse": fastfi.Truncated(1e-3)}, {}),
        ({"wrt": "params"}, {}),
        ({"wrt": "all"}, {}),
        ({"lump": 1e-2}, {}),
        ({"assume_full_rank": True}, {}),
        ({"objective": "margin"}, {}),
        ({"objective": sharpness}, {}),
    ],
    ids=" ".join,
)
def test_options(options: Any, of_influence: Any, tmp_path: Path) -> None:
    scores = fastfi.score(network(), (X, Y), out=tmp_path / "s", batch_size=N, **options)
    arguments = {"y": Y, **{k: v for k, v in options.items() if k != "y"}, **of_influence}
    expected = measured(network(), X, **arguments)
    got = rows(scores)
    np.testing.assert_allclose(got["fi"], expected.fi, rtol=1e-9)
    ranks = [None] * N if expected.rank is None else expected.rank.tolist()
    assert got["rank"] == ranks
    assert got["label"] == Y.tolist()


def test_data_without_labels(tmp_path: Path) -> None:
    for name, given in (("tensor", X), ("list", list(X)), ("mappings", [{"x": x} for x in X])):
        scores = fastfi.score(network(), given, out=tmp_path / name, y="predicted")
        check_values(scores, network(), X, None)
        assert rows(scores)["label"] == [None] * N
    with pytest.raises(fastfi.OptionError, match="expected samples with labels, got none"):
        fastfi.score(network(), X, out=tmp_path / "labels")


def test_infinite_values_are_kept(tmp_path: Path) -> None:
    """P_y underflows: FI is inf, which is no error."""
    steep = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).eval()
    with torch.no_grad():
        steep[1].weight.copy_(torch.tensor([[900.0, 0.0], [0.0, 800.0], [-900.0, 1.0]]))
    x, y = torch.tensor([[1.0, 1.0], [0.1, 0.2]]), torch.tensor([2, 1])
    expected = measured(steep, x, y)
    scores = fastfi.score(steep, (x, y), out=tmp_path / "s")
    assert rows(scores)["fi"] == expected.fi.double().tolist()
    assert rows(scores)["fi"][0] == float("inf")
    assert scores.errors == 0


def test_the_models_state_is_left_alone(tmp_path: Path) -> None:
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fastfi.score(net, Items(pairs()), out=tmp_path / "s", wrt="layers")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Files may be named by bytes that are no UTF-8: their scores and errors can be stored."""
    names = [f"\udcff{i}" for i in range(N)]
    triples: list[Any] = list(zip(names, X, Y, strict=True))
    triples[7] = (names[7], X[7] * torch.nan, Y[7])
    triples[8] = ("\udcfe", None, Y[8])
    for _ in range(2):
        scores = fastfi.score(network(), triples, out=tmp_path / "s")
        assert rows(scores)["id"][:2] == ["\\udcff0", "\\udcff1"]
        assert scores.errors == 2
