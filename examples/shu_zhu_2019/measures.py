"""Scores of images in batches, and of whole data sets with files to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.data import Images
from examples.shu_zhu_2019.setup_measures import BATCH, column

__all__ = ["exact_scores", "in_batches", "stands_for"]


def exact_scores(
    model: nn.Module, images: Images, out: Path, device: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Exact FI of every image for its label, from one forward pass (closed form at full rank), and
    the predicted classes, [N] each. Files in ``out`` let an interrupted run go on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = fastfi.score(
        model,
        (images.x, images.y),
        out=out,
        assume_full_rank=True,
        batch_size=BATCH,
        device=device,
        transform=Tensor.float,
    )
    return column(scores, "fi"), column(scores, "predicted").astype(np.int64)


def in_batches(
    measure: Callable[[Tensor, Tensor], Tensor], images: Images, device: str
) -> tuple[NDArray[np.float64], float]:
    """``measure(x, y)`` of all images, [N], and the seconds it took."""
    start, parts = time.perf_counter(), []
    for i in range(0, len(images), BATCH):
        at = slice(i, i + BATCH)
        parts.append(measure(images.pixels(at).to(device), images.y[at].to(device)).cpu())
    return torch.cat(parts).double().numpy(), time.perf_counter() - start


def stands_for(y: Tensor, chosen: Tensor) -> NDArray[np.float64]:
    """How many images each chosen one stands for, [n], in all as many as there are.

    Args:
        y: [N] classes of all images.
        chosen: [n] positions; the share chosen may differ between the classes.
    """
    mine = y[chosen]
    share = torch.bincount(mine, minlength=int(y.max()) + 1)[mine]
    weight = (torch.bincount(y)[mine] / share).double().numpy()
    return np.asarray(weight * (len(y) / weight.sum()))  # a class may have no chosen image
