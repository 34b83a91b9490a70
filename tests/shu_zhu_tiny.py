"""Data and settings small enough to run the whole experiment in seconds: scikit-learn's digits,
enlarged to MNIST's size, in MNIST's files."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from examples.shu_zhu_2019.config import Config, configure
from examples.shu_zhu_2019.context import Context

__all__ = ["TINY", "tiny_config", "tiny_context", "write_digits"]

TRAIN = 1_500
TINY: dict[str, object] = {
    "datasets": ("mnist",),
    "epochs": 2,
    "batch": 32,
    "train_images": 0,
    "test_images": 0,
    "rule_images": 30,
    "layer_images": 12,
    "layer_rule_images": 4,
    "outliers": 90,
    "cook_images": 12,
    "map_images": 2,
    "attack_images": 4,
    "bootstrap": 20,
    "flipped_images": 300,
    "flipped_epochs": 1,
    "naive_images": 2,
}


def _idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), 1))


def write_digits(root: Path) -> Path:
    """Makes ``root/mnist``: 1,500 training and 297 test images, 28 x 28; returns root."""
    images, labels = load_digits(return_X_y=True)
    large = images.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2)  # [1797, 24, 24], 0..16
    large = np.pad(np.minimum(large * 16, 255), ((0, 0), (2, 2), (2, 2)))
    folder = root / "mnist"
    folder.mkdir(parents=True)
    for name, part in (("train", slice(TRAIN)), ("t10k", slice(TRAIN, None))):
        _idx(folder / f"{name}-images-idx3-ubyte.gz", large[part])
        _idx(folder / f"{name}-labels-idx1-ubyte.gz", labels[part])
    return root


def tiny_config(root: Path, **changes: object) -> Config:
    """The quick preset on data of :func:`write_digits` in ``root/data``, to ``root/out``."""
    if not (root / "data").exists():
        write_digits(root / "data")
    config = configure("quick", root / "data", root / "out")
    return replace(config, **{**TINY, **changes})  # type: ignore[arg-type]


def tiny_context(root: Path, **changes: object) -> Context:
    """A context whose networks train in seconds, at their first use."""
    return Context(tiny_config(root, **changes))
