"""What Setups 1 to 3 share: FI of chosen images batch by batch, columns of stored scores, numbers
as they are kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastfi
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import Images

__all__ = ["authors_ranks", "column", "finite", "influence_of", "median", "single"]

BATCH = 500
PRINT_SECONDS = 60.0  # between two lines of progress
PAPER = Path(__file__).with_name("paper.json")
# With so many images a split holds the authors' own, in their order; CIFAR-10's files differ.
AUTHORS_IMAGES = {("mnist", "train"): 54_000, ("mnist", "test"): 10_000}


def influence_of(
    context: Context,
    dataset: str,
    network: str,
    images: Images,
    at: Tensor,
    *,
    predicted: bool = False,
    batch: int = BATCH,
    note: str = "",
    **options: Any,
) -> fastfi.Influence:
    """FI of the images at the positions ``at`` [n], as :func:`fastfi.influence` with its options
    gives it, in float64 on the CPU.

    Args:
        predicted: take the predicted class instead of the label.
        batch: images in a call; the number in memory at once is fastfi's own choice.
        note: what lines of progress say, where it takes long.
    """
    model, device = context.model(dataset, network), context.config.device
    parts, last = [], time.perf_counter()
    for piece in at.split(batch):
        x = images.pixels(piece).to(device)
        y = None if predicted else images.y[piece].to(device)
        part = fastfi.influence(model, x, y, full_output=True, dtype=torch.float64, **options)
        assert isinstance(part, fastfi.Influence)
        parts.append(part)
        if time.perf_counter() - last > PRINT_SECONDS:
            last, done = time.perf_counter(), sum(len(p.fi) for p in parts)
            print(f"  {context.title(network)}, {note}: {done:,} of {len(at):,}", flush=True)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name).cpu() for part in parts])

    return parts[0]._replace(
        fi=joined("fi"),
        rank=None if parts[0].rank is None else joined("rank"),
        label=joined("label"),
        log_prob=joined("log_prob"),
    )


def column(scores: fastfi.Scores, name: str) -> NDArray[np.float64]:
    """A column of numbers, [N]; ValueError unless every image has one."""
    values = scores.values(name)
    absent = np.flatnonzero(np.isnan(values))
    if len(absent):
        raise ValueError(
            f"{scores.path}: expected {name} of every image, got none of {len(absent)}, the first "
            f"of them {absent[0]}"
        )
    return values


def single(values: NDArray[Any] | Tensor) -> NDArray[np.float32]:
    """As it is kept for figures: float32, what is beyond its range at its end."""
    limits = np.finfo(np.float32)
    return np.clip(np.asarray(values), limits.min, limits.max).astype(np.float32)


def finite(value: Any) -> float | None:
    """As it is kept for the text: None for what JSON cannot hold."""
    number = float(value)
    return number if math.isfinite(number) else None


def median(values: NDArray[Any] | Tensor) -> float | None:
    """The middle value; None of none."""
    array = np.asarray(values)
    return finite(np.median(array)) if array.size else None


def authors_ranks(
    dataset: str, split: str, fi: NDArray[np.float64], keys: Sequence[str]
) -> list[dict[str, Any]] | None:
    """The images that the authors' scripts name as those of the largest FI, in our scores.

    Args:
        fi: [N] of the split.
        keys: the way to the list of their positions, from 1, below the data set in paper.json.

    Returns:
        For each its position (from 0), FI, and rank, 1 for the largest FI, where equal values share
        the best; None where our images are not theirs, or the scripts name none.
    """
    found = json.loads(PAPER.read_text())[dataset]
    for key in keys:
        found = found.get(key, {})
    if not found or AUTHORS_IMAGES.get((dataset, split)) != len(fi):
        return None
    return [
        {"position": i - 1, "fi": finite(fi[i - 1]), "rank": int((fi > fi[i - 1]).sum()) + 1}
        for i in found
    ]
