"""The images of the reproduction: the authors' split, balance, and torchvision's files."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from shu_zhu_tiny import write_digits

from examples.shu_zhu_2019 import data
from examples.shu_zhu_2019.data import balanced, find, load, validation_rows

MNIST = Path(__file__).parents[2] / "shared" / "data"
needs_mnist = pytest.mark.skipif(not (MNIST / "mnist").is_dir(), reason="no MNIST in ../shared")


def test_validation_rows_are_a_tenth_balanced_and_repeatable() -> None:
    y = torch.arange(1_000) % 10
    rows = validation_rows(y, 10)
    assert len(set(rows)) == 100
    assert y[rows].bincount().tolist() == [10] * 10
    assert rows == validation_rows(y, 10) != validation_rows(y, 10, seed=1)


def test_validation_rows_draw_as_the_authors_scripts_do() -> None:
    # Their scripts: random.seed(0), then one random.sample per class of the positions of the class.
    y = torch.from_numpy(np.random.default_rng(3).integers(0, 3, 900))
    random.seed(0)
    expected = []
    for k in range(3):
        expected += random.sample(list(np.where(y.numpy() == k)[0]), 30)
    assert validation_rows(y, 3) == expected


def test_a_class_with_too_few_images_is_refused() -> None:
    with pytest.raises(ValueError, match="expected more than 5 images of class 1, got 4"):
        validation_rows(torch.tensor([0] * 96 + [1] * 4), 2)


@pytest.mark.parametrize("count", [1, 7, 20, 36])
def test_balanced_takes_as_many_of_each_class_as_there_are(count: int) -> None:
    y = torch.tensor([0] * 50 + [1] * 6 + [2] * 30)
    at = balanced(y, count, 3, seed=0)
    assert len(at) == count == len(set(at.tolist()))
    assert torch.equal(at, at.sort().values)
    counts = y[at].bincount(minlength=3)
    full = counts < torch.tensor([50, 6, 30])  # classes that could give more
    assert counts[full].max() - counts[full].min() <= 1
    assert torch.equal(at, balanced(y, count, 3, seed=0))


def test_balanced_takes_all_for_zero_and_beyond() -> None:
    y = torch.tensor([0, 1, 1])
    assert balanced(y, 0, 2, 0).tolist() == balanced(y, 9, 2, 0).tolist() == [0, 1, 2]


def test_load_keeps_the_splits_apart(tmp_path: Path) -> None:
    write_digits(tmp_path)
    whole = load(tmp_path, "mnist")
    assert (len(whole.train), len(whole.valid), len(whole.test)) == (1350, 150, 297)
    rows = torch.cat([whole.train.rows, whole.valid.rows])
    assert torch.equal(rows.sort().values, torch.arange(1500))
    assert whole.train.x.dtype == torch.uint8
    assert whole.train.pixels(slice(2)).max() > 200  # 0..255, not 0..1
    part = load(tmp_path, "mnist", train_images=90, test_images=20)
    assert (len(part.train), len(part.valid), len(part.test)) == (90, 10, 20)
    assert part.train.y.bincount().tolist() == [9] * 10
    assert set(part.train.rows.tolist()) <= set(whole.train.rows.tolist())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mnist: expected a folder .*mnist or .*MNIST/raw"):
        find(tmp_path, "mnist")


def _pickled(folder: Path, content: object, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def test_torchvisions_cifar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    monkeypatch.setattr(data, "PICKLED", {"train": ["data_batch_1"], "test": ["test_batch"]})
    x = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    y = [i % 10 for i in range(200)]
    for name in ("data_batch_1", "test_batch"):
        _pickled(folder, {"data": x, "labels": y, "batch_label": "one"}, name)
        # numpy 2 pickles its arrays under another module's name; the files have numpy 1's.
        text = (folder / name).read_bytes().replace(b"numpy._core.", b"numpy.core.")
        (folder / name).write_bytes(text)
    read = load(tmp_path, "cifar10")
    assert read.test.x.shape == (200, 3, 32, 32)
    assert torch.equal(read.test.x.flatten(1), torch.from_numpy(x))
    assert read.test.y.tolist() == y


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_pickles_that_execute_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    _pickled(folder, {"data": _Harm(), "labels": []}, "data_batch_1")
    with pytest.raises(pickle.UnpicklingError, match=r"numpy arrays and lists alone, got .*exec"):
        load(tmp_path, "cifar10")


@needs_mnist
def test_the_authors_top_images_are_the_known_wrong_labels() -> None:
    # Of their five most influential training images of each network (positions from 1), three are
    # images whose labels are known to be wrong or doubtful: the split is theirs.
    train = load(MNIST, "mnist").train
    assert len(train) == 54_000
    assert train.rows[9_878 - 1] == 10_994 and train.y[9_878 - 1] == 3  # shows a 9
    assert train.rows[23_874 - 1] == 26_560 and train.y[23_874 - 1] == 7  # shows a 4
