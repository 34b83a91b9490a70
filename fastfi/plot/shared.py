"""Images, maps and colour scales: what the pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastfi._extras import require
from fastfi.errors import InputError, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage

__all__ = [
    "as_array",
    "as_images",
    "check_sequence",
    "colour_norm",
    "displayed",
    "grey_limits",
    "pooled",
    "show_image",
    "show_map",
    "without_ticks",
]

DECADES = 4  # of a logarithmic colour scale, below its largest value
TINY = 1e-280  # matplotlib replaces the limits of colour bars that end a little below


def as_array(values: Any, name: str) -> np.ndarray:
    """A tensor or array as float64 on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    if isinstance(values, np.ndarray):
        return values.astype(np.float64)
    raise InputError(f"{name}: expected a tensor or an array, got {type(values).__name__}")


def as_images(x: Any, batch: bool | None = None) -> tuple[np.ndarray, bool]:
    """Images [B, C, H, W] float64, and whether a batch was given. ``batch``: what it must be."""
    images = as_array(x, "x")
    given = images.ndim == 4
    if images.ndim not in (2, 3, 4) or images.size == 0 or batch not in (None, given):
        one = "an image [H, W] or [C, H, W], or " if batch is None else ""
        raise InputError(f"x: expected {one}a batch [B, C, H, W], got shape {list(images.shape)}")
    if not np.isfinite(images).all():
        raise InputError("x: expected finite pixels, got NaN or infinite ones")
    return images.reshape(-1, *(1,) * (images.ndim == 2), *images.shape[-3:]), given


def pooled(maps: Any, images: np.ndarray, batch: bool, channels: str) -> np.ndarray:
    """Maps [B, S, H, W] of a batch, or of one image, pooled over their channels."""
    fi = as_array(maps, "maps")
    size = list(images.shape[2:])
    if not batch and fi.ndim in (3, 4):
        fi = fi[None]
    if fi.ndim not in (4, 5) or fi.shape[0] != len(images) or list(fi.shape[-2:]) != size:
        lead = f"{len(images)}, S" if batch else "S"
        spatial = f"{size[0]}, {size[1]}]"
        raise InputError(
            f"maps: expected shape [{lead}, {spatial} or [{lead}, C, {spatial} for x of shape "
            f"{list(images.shape)}, got {list(np.shape(maps))}"
        )
    if fi.size == 0:
        raise InputError(f"maps: expected at least one scale, got shape {list(np.shape(maps))}")
    if fi.ndim == 4:
        return fi
    return fi.mean(2) if channels == "mean" else fi.max(2)


def displayed(image: np.ndarray) -> np.ndarray:
    """[C, H, W] as it is drawn: [H, W, 3] in colour, or [H, W], the mean of the channels."""
    return np.moveaxis(image, 0, 2) if len(image) == 3 else image.mean(0)


def grey_limits(*images: np.ndarray) -> tuple[float, float]:
    """The values drawn as black and white: 0 and 1, or the extremes where those are exceeded."""
    low, high = min(float(i.min()) for i in images), max(float(i.max()) for i in images)
    return (0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low, high)


def show_image(axes: Axes, image: np.ndarray, limits: tuple[float, float], cmap: str) -> None:
    """Draws a visible image."""
    low, high = limits
    if image.ndim == 3:
        image = (image - low) / (high - low if high > low else 1.0)
    axes.imshow(image, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def show_map(axes: Axes, fi: np.ndarray, norm: Normalize, cmap: str, **how: Any) -> AxesImage:
    """Draws a map [H, W], clipped to the colour scale: inf takes its top, zeros a log scale's
    bottom."""
    fi = np.clip(fi, norm.vmin, norm.vmax)
    return axes.imshow(fi, cmap=cmap, norm=norm, interpolation="nearest", **how)


def colour_norm(fi: np.ndarray, log: bool) -> Normalize:
    """One colour scale for the finite values of some maps."""
    colors = require("matplotlib.colors", "plotting", "plot")
    finite = fi[np.isfinite(fi)]
    high = float(finite.max(initial=0.0))
    if high < TINY:
        high = 1.0  # nothing to see: all zero
    if not log:
        return colors.Normalize(min(0.0, float(finite.min(initial=0.0))), high)
    low = high * 10.0**-DECADES
    positive = finite[finite > 0.0]
    smallest = float(positive.min()) if len(positive) else low
    return colors.LogNorm(min(max(low, smallest), high / 10), high)


def without_ticks(grid: np.ndarray) -> None:
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])


def check_sequence(values: Sequence[Any] | None, name: str, count: int, of: str) -> None:
    """OptionError unless ``values`` is None or has one entry for each of ``count`` things."""
    fits = isinstance(values, (Sequence, np.ndarray, Tensor)) and not isinstance(values, str)
    if values is not None and not (fits and len(values) == count):
        raise OptionError(f"{name}: expected one for each of {count} {of}, got {values!r}")
