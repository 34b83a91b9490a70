"""Outliers as the authors made them: two digits of different classes in one image, labelled as the
first."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.shu_zhu_2019.data import Images

__all__ = ["SHIFT", "VALID", "overlap", "shifted"]

SHIFT = 4  # pixels at most, in each direction
VALID = 9  # one outlier for validation to so many for training


def shifted(x: Tensor, offsets: Tensor) -> Tensor:
    """Images moved by whole pixels; zeros come in.

    Args:
        x: [n, C, H, W].
        offsets: [n, 2] int64, down and to the right; each below H and W in size.
    """
    reach = int(offsets.abs().max()) if len(offsets) else 0
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (reach,) * 4)
    rows = torch.arange(height) + reach - offsets[:, :1]  # [n, H]
    columns = torch.arange(width) + reach - offsets[:, 1:]  # [n, W]
    which = torch.arange(len(x))[:, None, None]
    picked = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()  # [n, C, H, W]


def _drawn(from_: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return from_[torch.randperm(len(from_), generator=generator)[:count]]


def overlap(
    images: Images, correct: Tensor, each: int, seed: int, classes: int = 10
) -> tuple[Images, Images]:
    """Outliers for training and for validation, the same number of each class.

    An outlier is the pixelwise maximum of two images, each moved by up to ``SHIFT`` pixels: one
    that every network classifies correctly, whose label it gets, and one of another class. No image
    is the first of two outliers, and none that is a first one is a second one.

    Args:
        images: to choose from.
        correct: [N] bool, classified correctly.
        each: outliers of a class for training, at least 1; a ninth of it, and at least one, for
            validation.
        seed: of the choice and of the shifts.

    Returns:
        Both sets, in the order of the classes. ``rows`` are those of the first images.

    Raises:
        ValueError: a class has too few images that are classified correctly.
    """
    generator = torch.Generator().manual_seed(seed)
    held = max(1, each // VALID)
    first: list[Tensor] = []
    for k in range(classes):
        own = torch.nonzero((images.y == k) & correct).flatten()
        if len(own) < each + held:
            raise ValueError(
                f"expected at least {each + held} correctly classified images of class {k} to make "
                f"outliers of, got {len(own)}"
            )
        first.append(_drawn(own, each + held, generator))
    free = torch.ones(len(images), dtype=torch.bool)
    free[torch.cat(first)] = False
    second = []
    for k in range(classes):
        others = torch.nonzero((images.y != k) & free).flatten()
        if len(others) < each + held:
            raise ValueError(
                f"expected at least {each + held} images of other classes than {k} to lay over "
                f"its images, got {len(others)}"
            )
        second.append(_drawn(others, each + held, generator))
    count = classes * (each + held)
    moves = torch.randint(-SHIFT, SHIFT + 1, (2, count, 2), generator=generator)
    a, b = torch.cat(first), torch.cat(second)
    made = torch.maximum(shifted(images.x[a], moves[0]), shifted(images.x[b], moves[1]))
    every = Images(made, images.y[a], images.rows[a])
    turn = torch.arange(count) % (each + held)
    return every.take(turn < each), every.take(turn >= each)
