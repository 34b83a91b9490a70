"""What a demanding user's data, models and second calls once broke in ``fastfi.score``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_runs import CLASSES, check_values, data, measured, network
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import fastfi
from fastfi.errors import InputError, OptionError, ResumeError

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = data(40)


def score(model: Any, given: Any, out: Path, **options: Any) -> fastfi.Scores:
    return fastfi.score(model, given, out=out, progress=False, **options)


def column(scores: fastfi.Scores, name: str = "fi") -> np.ndarray:
    return scores.to_table([name]).column(name).to_numpy()


def begun(model: Any, out: Path, **options: Any) -> None:
    """A run that stopped after some of 40 samples."""

    class Torn(Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            if armed and i == 20:
                raise KeyboardInterrupt
            return X[i], Y[i]

        def __getitems__(self, numbers: list[int]) -> Any:
            return [self[i] for i in numbers]

    armed: list[int] = []
    source = Torn()
    # The samples by which the data is recognised are read first: 16 of them.
    real = fastfi.scoring.mapped.MapSource.read

    def read(self: Any, *args: Any) -> Any:
        armed.append(1)
        yield from real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastfi.scoring.mapped.MapSource.read", read)
        with pytest.raises(KeyboardInterrupt):
            score(model, source, out, batch_size=8, **options)
    assert len(fastfi.open_scores(out)) >= 8


class Broken(Dataset):
    """One of its items cannot be read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        if i == 13:
            raise OSError("damaged")
        return X[i], Y[i]


def test_a_transform_is_applied_once_beside_a_broken_item(tmp_path: Path) -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    loader = DataLoader(Broken(), batch_size=10, collate_fn=collate)
    scores = score(network(), loader, tmp_path / "s", transform=lambda x: 2 * x, batch_size=10)
    good = [i for i in range(40) if i != 13]
    np.testing.assert_allclose(
        column(scores)[good], measured(network(), 2 * X, Y).fi.numpy()[good], rtol=1e-9
    )


def test_images_of_sixteen_bits(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (10, 4, 5)).astype(np.uint16)
    images = [(Image.fromarray(a), i % CLASSES) for i, a in enumerate(deep)]
    x = torch.from_numpy(deep.astype(np.float32))[:, None] / 65535
    scores = score(network().float(), images, tmp_path / "s")
    expected = fastfi.influence(network().float(), x, torch.arange(10) % CLASSES)
    np.testing.assert_allclose(column(scores), expected, rtol=1e-4)
    floats = [(Image.fromarray(a.astype(np.float32)), 0) for a in deep[:5]]
    with pytest.warns(UserWarning, match="PIL image of mode 'F'; transform= can make"):
        score(network().float(), floats, tmp_path / "t")


def test_objectives_that_share_a_name(tmp_path: Path) -> None:
    begun(network(), tmp_path / "s", objective=lambda z, y: z.logsumexp(1))
    with pytest.raises(ResumeError, match="objective <lambda>, for sample 0"):
        score(network(), (X, Y), tmp_path / "s", objective=lambda z, y: (z**2).sum(1))


def test_parameters_that_were_frozen_meanwhile(tmp_path: Path) -> None:
    model, options = network(), {"wrt": "params", "inverse": "damped"}
    begun(model, tmp_path / "s", **options)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ResumeError, match="model, trainable: '4 parameters"):
        score(model, (X, Y), tmp_path / "s", **options)


def test_functions_are_known_by_the_modules_they_use(tmp_path: Path) -> None:
    inner = network()
    models = {
        "closure": lambda x: inner(x),
        "partial": partial(lambda net, x: net(x), inner),
        "method": inner.forward,
    }
    for name, model in models.items():
        begun(model, tmp_path / name)
    with torch.no_grad():
        next(inner.parameters()).mul_(1.001)
    for name, model in models.items():
        with pytest.raises(ResumeError, match="model, other parameters"):
            score(model, (X, Y), tmp_path / name)


def test_class_names_of_the_column_that_is_read(tmp_path: Path) -> None:
    class Two(list):
        features = {  # noqa: RUF012
            "fine_label": SimpleNamespace(names=["a", "b", "c", "d"]),
            "coarse": SimpleNamespace(names=["A", "B", "C", "D"]),
        }

    rows = Two({"x": X[i], "fine_label": 0, "coarse": int(Y[i])} for i in range(10))
    scores = score(network(), rows, tmp_path / "s", y_key="coarse")
    assert scores.class_names == ("A", "B", "C", "D")
    assert score(network(), rows, tmp_path / "t").class_names == ("a", "b", "c", "d")


class Counted(IterableDataset):
    """Samples by number, with a length; each worker yields all of them unless ``shared``."""

    def __init__(self, n: int = 20, shared: bool = True) -> None:
        self.n, self.shared = n, shared

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        step = info.num_workers if info is not None and self.shared else 1
        start = info.id if info is not None and self.shared else 0
        return ((X[i], Y[i]) for i in range(start, self.n, step))


def test_a_finished_stream_is_compared(tmp_path: Path) -> None:
    score(network(), Counted(20), tmp_path / "s")
    assert len(score(network(), Counted(20), tmp_path / "s")) == 20
    for other in (30, 12):
        with pytest.raises(ResumeError, match=r"samples|stream"):
            score(network(), Counted(other), tmp_path / "s")
    shifted = ((X[i], Y[i]) if i != 7 else (X[8], Y[8]) for i in range(20))
    with pytest.raises(ResumeError, match="samples 0 to 19 differ"):
        score(network(), shifted, tmp_path / "s")


def test_iterable_data_sets_with_a_length(tmp_path: Path) -> None:
    check_values(score(network(), Counted(20), tmp_path / "s"), network(), X[:20], Y[:20])


def test_workers_of_a_stream(tmp_path: Path) -> None:
    shared = DataLoader(Counted(20), batch_size=4, num_workers=2)
    assert len(score(network(), shared, tmp_path / "s")) == 20
    same = DataLoader(Counted(20, shared=False), batch_size=4, num_workers=2)
    with pytest.raises(InputError, match="workers of the DataLoader to yield different samples"):
        score(network(), same, tmp_path / "t")
    short = DataLoader(Counted(20), batch_size=8, drop_last=True)
    with pytest.raises(OptionError, match="drop_last=True"):
        score(network(), short, tmp_path / "u")


def test_whole_arrays(tmp_path: Path) -> None:
    pair = X.numpy(), Y.numpy()
    check_values(score(network(), pair, tmp_path / "s"), network(), X, Y)
    with pytest.raises(InputError, match=r"expected a tuple \(x, y\)"):
        score(network(), list(pair), tmp_path / "t")
    with pytest.raises(InputError, match=r"expected tensors of one length, got \[40, 39\]"):
        score(network(), (X, Y[:39]), tmp_path / "u")


def test_labels_of_one_number_and_ids_that_are_paths(tmp_path: Path) -> None:
    rows = [(Path(f"a/{i}.png"), X[i], Y[i : i + 1]) for i in range(40)]
    scores = score(network(), rows, tmp_path / "s")
    np.testing.assert_allclose(column(scores), measured(network(), X, Y).fi.numpy(), rtol=1e-9)
    assert scores.to_table(["id"]).column(0)[3].as_py() == "a/3.png"


def test_first_samples_without_labels(tmp_path: Path) -> None:
    rows = [(X[i], None if i < 33 else int(Y[i])) for i in range(40)]
    scores = score(network(), rows, tmp_path / "s")
    assert scores.to_table(["error"]).column(0).to_pylist() == ["no label"] * 33 + [None] * 7


def test_first_samples_of_another_shape(tmp_path: Path) -> None:
    rows = [(torch.rand(1, 9, 9).double() if i < 10 else X[i], int(Y[i])) for i in range(40)]
    scores = score(network(), rows, tmp_path / "s")
    assert scores.errors == 10


def test_a_transform_that_fails_within_a_batch(tmp_path: Path) -> None:
    def transform(x: Tensor) -> Tensor:
        if torch.equal(x, X[5]):
            raise ValueError("not this one")
        return x

    batches = ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8))
    scores = score(network(), batches, tmp_path / "s", transform=transform)
    errors = scores.to_table(["error"]).column(0).to_pylist()
    assert [i for i, e in enumerate(errors) if e] == [5]


def test_a_stream_goes_on_with_other_batches(tmp_path: Path) -> None:
    score(network(), DataLoader(Counted(20), batch_size=8), tmp_path / "s", part_rows=8)
    (tmp_path / "s" / "part-000000000008-000000000016.parquet").unlink()
    scores = score(network(), DataLoader(Counted(20), batch_size=6), tmp_path / "s", part_rows=8)
    check_values(scores, network(), X[:20], Y[:20])


class Counting(nn.Module):
    """Counts its calls in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_buffers_that_change(tmp_path: Path) -> None:
    model = Counting().eval()
    begun(model, tmp_path / "s")
    assert score(model, (X, Y), tmp_path / "s", batch_size=8).complete


def test_models_without_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Flatten(), nn.Linear(20, 4)).eval()
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).eval()
    for model in (empty, lazy):
        with pytest.raises(OptionError, match="expected parameters with values"):
            score(model, (X, Y), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_options(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="notes: expected what JSON can hold"):
        score(network(), (X, Y), tmp_path / "s", notes={"p": tmp_path})
    batches = BatchSampler(SequentialSampler(range(40)), 4, drop_last=False)
    loader = DataLoader([(X[i], Y[i]) for i in range(40)], sampler=batches, batch_size=None)
    with pytest.raises(OptionError, match="expected a sampler of numbers of samples, got one of l"):
        score(network(), loader, tmp_path / "s")
    scores = score(network(), (X, Y), tmp_path / "s", batch_size=np.int64(8), limit=np.int64(16))
    assert len(scores) == 16
