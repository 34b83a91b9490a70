"""MNIST and CIFAR-10 as the authors used them: pixels 0..255, a tenth of each class of the training
images set aside for validation, no augmentation."""

from __future__ import annotations

import io
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfi.data import open_dataset

__all__ = ["CLASSES", "Data", "Images", "balanced", "find", "load", "validation_rows"]

CLASSES = {
    "mnist": tuple("0123456789"),
    "cifar10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
}  # fmt: skip
VALIDATION = 10  # one image in ten
# This project's own layout, and that of torchvision's downloads.
FOLDERS = {"mnist": ("mnist", "MNIST/raw"), "cifar10": ("cifar10", "cifar-10-batches-py")}
PICKLED = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


@dataclass(frozen=True)
class Images:
    """Images in memory.

    Attributes:
        x: [N, C, H, W] uint8.
        y: [N] int64.
        rows: [N] int64, where they stand in the files.
    """

    x: Tensor
    y: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def pixels(self, at: Tensor | slice = slice(None)) -> Tensor:
        """What the networks take: [n, C, H, W] float32 in 0..255."""
        return self.x[at].float()

    def take(self, at: Tensor) -> Images:
        """Some of them, by position."""
        return Images(self.x[at], self.y[at], self.rows[at])


@dataclass(frozen=True)
class Data:
    """A data set: ``train`` and ``valid`` share the training images of the files."""

    name: str
    train: Images
    valid: Images
    test: Images

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""
        return CLASSES[self.name]


def find(root: Path, name: str) -> Path:
    """The folder of a data set below ``root``; FileNotFoundError where there is none."""
    for folder in FOLDERS[name]:
        if (root / folder).is_dir():
            return root / folder
    expected = " or ".join(str(root / folder) for folder in FOLDERS[name])
    raise FileNotFoundError(f"{name}: expected a folder {expected}, found neither")


class _ArraysOnly(pickle.Unpickler):
    """torchvision's CIFAR-10 is pickled; nothing but numpy's arrays may come out of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them
            return lambda text, coding: text.encode("latin1")
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"expected numpy arrays and lists alone, got {module}.{name}")


def _read_pickled(folder: Path, split: str) -> Images:
    x, y = [], []
    for name in PICKLED[split]:
        content = _ArraysOnly(io.BytesIO((folder / name).read_bytes()), encoding="latin1").load()
        x.append(torch.from_numpy(content["data"].reshape(-1, 3, 32, 32)))
        y.append(torch.tensor(content["labels"]))
    return Images(torch.cat(x), torch.cat(y), torch.arange(sum(map(len, y))))


def _read(folder: Path, split: str) -> Images:
    if (folder / PICKLED[split][0]).is_file():
        return _read_pickled(folder, split)
    x, y = [], []
    for batch in open_dataset(folder, split).batches(4096):
        if batch.y is None:
            raise SystemExit(f"{folder}: expected labelled {split} images, got none with labels")
        x.append((batch.x * 255).round().byte())
        y.append(batch.y)
    return Images(torch.cat(x), torch.cat(y), torch.arange(sum(map(len, y))))


def validation_rows(y: Tensor, classes: int, seed: int = 0) -> list[int]:
    """A tenth of the smallest full class's images from each class: 600 for MNIST, 500 for CIFAR-10.

    Python's generator, asked class by class: with seed 0 this is the very split of the authors'
    scripts (MNIST_sample.py), so that their numbers of training images mean the same images here.
    """
    generator = random.Random(seed)
    each = len(y) // (VALIDATION * classes)
    chosen: list[int] = []
    for k in range(classes):
        index = torch.nonzero(y == k).flatten().tolist()
        if len(index) <= each:
            raise ValueError(f"expected more than {each} images of class {k}, got {len(index)}")
        chosen += generator.sample(index, each)
    return chosen


def balanced(y: Tensor, count: int, classes: int, seed: int) -> Tensor:
    """``count`` positions, as many of each class as can be had, in increasing order; all of them
    for a count of 0 or beyond their number."""
    if count == 0 or count >= len(y):
        return torch.arange(len(y))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    # The n-th image of a class comes before every class's (n + 1)-th.
    turn = torch.empty_like(y)
    for k in range(classes):
        own = order[y[order] == k]
        turn[own] = torch.arange(len(own))
    return order[turn[order].argsort(stable=True)][:count].sort().values


def load(root: Path, name: str, train_images: int = 0, test_images: int = 0, seed: int = 0) -> Data:
    """Reads a data set from its folder below ``root``.

    Args:
        train_images: of those that the validation set leaves; 0 for all. The validation set then
            shrinks as much.
        test_images: 0 for all.
        seed: of what is chosen where fewer than all are.
    """
    classes = len(CLASSES[name])
    folder = find(root, name)
    whole, test = _read(folder, "train"), _read(folder, "test")
    held = validation_rows(whole.y, classes)
    rest = torch.ones(len(whole), dtype=torch.bool)
    rest[held] = False
    train, valid = whole.take(torch.nonzero(rest).flatten()), whole.take(torch.tensor(held))
    if 0 < train_images < len(train):
        fewer = -(-train_images // (VALIDATION - 1))
        train = train.take(balanced(train.y, train_images, classes, seed))
        valid = valid.take(balanced(valid.y, fewer, classes, seed))
    if 0 < test_images < len(test):
        test = test.take(balanced(test.y, test_images, classes, seed))
    return Data(name, train, valid, test)
