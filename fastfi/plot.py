"""Pictures of influence maps and of attacks, as in Figures 6 and 7 of Shu and Zhu (AAAI 2019).

Every function returns a ``matplotlib.figure.Figure`` made without pyplot: nothing is shown, no
global state changes, and the figure is freed like any other object. Save it with
``figure.savefig(path)``. matplotlib is imported when a function is called; it comes with
``pip install "fastfi[plot]"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastfi._extras import require
from fastfi.attack import OnePixel
from fastfi.errors import InputError, OptionError
from fastfi.maps import InfluenceMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["attack", "influence_map"]

MARK = "#D55E00"  # Okabe and Ito's vermilion: seen on black, grey and white
DECADES = 4  # of a logarithmic colour scale, below its largest value
TINY = 1e-280  # matplotlib replaces the limits of colour bars that end a little below
OPACITY = 0.85  # of the overlay where the map is largest


def _array(values: Any, name: str) -> np.ndarray:
    """A tensor or array as float64 on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    if isinstance(values, np.ndarray):
        return values.astype(np.float64)
    raise InputError(f"{name}: expected a tensor or an array, got {type(values).__name__}")


def _images(x: Any, batch: bool | None = None) -> tuple[np.ndarray, bool]:
    """Images [B, C, H, W] float64, and whether a batch was given. ``batch``: what it must be."""
    images = _array(x, "x")
    given = images.ndim == 4
    if images.ndim not in (2, 3, 4) or images.size == 0 or batch not in (None, given):
        one = "an image [H, W] or [C, H, W], or " if batch is None else ""
        raise InputError(f"x: expected {one}a batch [B, C, H, W], got shape {list(images.shape)}")
    if not np.isfinite(images).all():
        raise InputError("x: expected finite pixels, got NaN or infinite ones")
    return images.reshape(-1, *(1,) * (images.ndim == 2), *images.shape[-3:]), given


def _pooled(maps: Any, images: np.ndarray, batch: bool, channels: str) -> np.ndarray:
    """Maps [B, S, H, W] of a batch, or of one image, pooled over their channels."""
    fi = _array(maps, "maps")
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


def _visible(image: np.ndarray) -> np.ndarray:
    """[C, H, W] as it is drawn: [H, W, 3] in colour, or [H, W], the mean of the channels."""
    return np.moveaxis(image, 0, 2) if len(image) == 3 else image.mean(0)


def _limits(*images: np.ndarray) -> tuple[float, float]:
    """The values drawn as black and white: 0 and 1, or the extremes where those are exceeded."""
    low, high = min(float(i.min()) for i in images), max(float(i.max()) for i in images)
    return (0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low, high)


def _show_image(axes: Axes, image: np.ndarray, limits: tuple[float, float], cmap: str) -> None:
    """Draws a visible image."""
    low, high = limits
    if image.ndim == 3:
        image = (image - low) / (high - low if high > low else 1.0)
    axes.imshow(image, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def _show_map(axes: Axes, fi: np.ndarray, norm: Normalize, cmap: str, **how: Any) -> AxesImage:
    """Draws a map [H, W], clipped to the colour scale: inf takes its top, zeros a log scale's
    bottom."""
    fi = np.clip(fi, norm.vmin, norm.vmax)
    return axes.imshow(fi, cmap=cmap, norm=norm, interpolation="nearest", **how)


def _opacity(fi: np.ndarray, norm: Normalize) -> np.ndarray:
    """[H, W], from 0 at the bottom of the colour scale to OPACITY at its top; 0 for NaN."""
    share = np.ma.filled(norm(np.clip(fi, norm.vmin, norm.vmax)), 0.0)
    return OPACITY * np.nan_to_num(share)


def _norm(fi: np.ndarray, log: bool) -> Normalize:
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


def _colour_bar(figure: Figure, drawn: AxesImage, **where: Any) -> None:
    axes = figure.colorbar(drawn, **where).ax
    axes.tick_params(labelsize=7)
    axes.yaxis.get_offset_text().set_fontsize(7)


def _without_ticks(grid: np.ndarray) -> None:
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])


def _check_sequence(values: Sequence[Any] | None, name: str, count: int, of: str) -> None:
    """OptionError unless ``values`` is None or has one entry for each of ``count`` things."""
    fits = isinstance(values, (Sequence, np.ndarray, Tensor)) and not isinstance(values, str)
    if values is not None and not (fits and len(values) == count):
        raise OptionError(f"{name}: expected one for each of {count} {of}, got {values!r}")


def influence_map(
    x: Any,
    maps: Any,
    *,
    scales: Sequence[int] | None = None,
    channels: str = "mean",
    shared: str = "sample",
    log: bool = False,
    overlay: int | None = -1,
    titles: Sequence[str] | None = None,
    title: str | None = None,
    cmap: str = "magma",
    image_cmap: str = "gray",
    panel: float = 1.6,
) -> Figure:
    """Influence maps beside their images: a row for each sample, with the image, one panel for each
    scale and the map of one scale on top of the image (the paper's Figure 6).

    The panels of a row have one colour scale, from 0 (or the least value, if negative) to the
    row's largest finite value (to 1 where that is 0), with a colour bar. Infinite values take the
    top colour, NaN none.

    Args:
        x: an image [H, W] or [C, H, W], or a batch [B, C, H, W]. Three channels are shown in
            colour, any other number as their mean in grey. An image with values outside 0..1 is
            shifted and scaled to that range, and "rescaled" is printed below it.
        maps: [S, H, W] or [S, C, H, W] for one image, [B, S, H, W] or [B, S, C, H, W] for a batch;
            or an :class:`InfluenceMap` of a batch.
        scales: S window sizes, for the titles; an InfluenceMap knows its own.
        channels: ``"mean"`` or ``"max"``: how maps of separate channels become one.
        shared: ``"sample"``: each row has its own colour scale; ``"all"``: the figure has one.
        log: logarithmic colours, over four decades below the largest value at most; smaller values
            and zeros take the lowest colour.
        overlay: which map, along S, is drawn over the grey image in the last panel, more opaque
            where it is larger; None leaves that panel out.
        titles: B texts, printed below the images.
        title: of the figure.
        cmap, image_cmap: matplotlib's names of the colour maps of maps and grey images.
        panel: width of a panel in inches.

    Returns:
        A new Figure.

    Raises:
        InputError: shapes do not fit. OptionError: an option has no meaning. matplotlib's own
            errors for colour maps and sizes that it does not know.
        MissingExtraError: matplotlib is not installed.
    """
    if channels not in ("mean", "max"):
        raise OptionError(f"channels: expected 'mean' or 'max', got {channels!r}")
    if shared not in ("sample", "all"):
        raise OptionError(f"shared: expected 'sample' or 'all', got {shared!r}")
    if isinstance(maps, InfluenceMap):
        scales = maps.scales if scales is None else scales
        maps = maps.fi
    images, batch = _images(x)
    fi = _pooled(maps, images, batch, channels)
    count = fi.shape[1]
    _check_sequence(scales, "scales", count, "scales")
    _check_sequence(titles, "titles", len(images), "samples")
    if overlay is not None and not -count <= overlay < count:
        raise OptionError(f"overlay: expected None or an index into {count} maps, got {overlay!r}")
    names = [f"map {s}" for s in range(count)] if scales is None else [f"{k} x {k}" for k in scales]

    columns = 1 + count + (overlay is not None)
    height, width = images.shape[2:]
    lines = 0 if titles is None else max(text.count("\n") + 1 for text in titles)
    row = panel * height / width + 0.2 + 0.15 * lines
    figure = require("matplotlib.figure", "plotting", "plot").Figure(
        figsize=(panel * columns + 0.8, row * len(images) + 0.2 + 0.3 * (title is not None)),
        layout="constrained",
    )
    grid = figure.subplots(len(images), columns, squeeze=False)
    whole = _norm(fi, log)
    for b, (panels, image) in enumerate(zip(grid, map(_visible, images), strict=True)):
        limits = _limits(image)
        _show_image(panels[0], image, limits, image_cmap)
        texts = [] if titles is None else [titles[b]]
        texts += [] if limits == (0.0, 1.0) else ["rescaled"]
        panels[0].set_xlabel("\n".join(texts), fontsize=8)
        norm = whole if shared == "all" else _norm(fi[b], log)
        drawn = [_show_map(panels[1 + s], fi[b, s], norm, cmap) for s in range(count)]
        if overlay is not None:
            grey = image.mean(2) if image.ndim == 3 else image
            _show_image(panels[-1], grey, limits, "gray")
            alpha = _opacity(fi[b, overlay], norm)
            _show_map(panels[-1], fi[b, overlay], norm, cmap, alpha=alpha)
        if shared == "sample":
            beside = panels[-1].inset_axes((1.05, 0.0, 0.07, 1.0))
            _colour_bar(figure, drawn[0], cax=beside)
    if shared == "all":
        _colour_bar(figure, drawn[0], ax=grid.ravel().tolist(), fraction=0.02, pad=0.01)
    _without_ticks(grid)
    over = [] if overlay is None else [f"{names[overlay]} on image"]
    for axes, name in zip(grid[0], ["image", *names, *over], strict=True):
        axes.set_title(name, fontsize=9)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def attack(
    x: Any,
    result: OnePixel,
    *,
    maps: Any = None,
    classes: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    title: str | None = None,
    cmap: str = "magma",
    image_cmap: str = "gray",
    panel: float = 1.6,
) -> Figure:
    """What :func:`fastfi.attack.one_pixel` did: a column for each sample, the original image above
    and the changed one below, its changed pixels framed (the paper's Figure 7).

    The titles tell the predicted class and the probability of the class that was attacked.

    Args:
        x: the original images [B, C, H, W], drawn as in :func:`influence_map`; where either image
            of a column leaves 0..1, both are scaled alike.
        result: of the attack on x.
        maps: [B, H, W], or [B, C, H, W] (their mean over channels): drawn between the two, each
            with a colour scale of its own.
        classes: K names; None means their numbers.
        titles: B texts, printed above the columns.
        title: of the figure.
        cmap, image_cmap, panel: as in :func:`influence_map`.

    Returns:
        A new Figure.

    Raises:
        InputError: shapes do not fit. OptionError: an option has no meaning. matplotlib's own
            errors for colour maps and sizes that it does not know.
        MissingExtraError: matplotlib is not installed.
    """
    images, _ = _images(x, batch=True)
    if not isinstance(result, OnePixel):
        raise InputError(f"result: expected a OnePixel, got {type(result).__name__}")
    if list(result.x.shape) != list(images.shape):
        raise InputError(
            f"x: expected the attacked images, shape {list(result.x.shape)}, got "
            f"{list(images.shape)}"
        )
    _check_sequence(titles, "titles", len(images), "samples")
    largest = int(max(t.max() for t in (result.label, result.label_before, result.label_after)))
    if classes is not None and (isinstance(classes, str) or len(classes) <= largest):
        raise OptionError(f"classes: expected at least {largest + 1} names, got {classes!r}")
    names = [str(k) for k in range(largest + 1)] if classes is None else list(classes)
    fi = None
    if maps is not None:
        values = _array(maps, "maps")
        fi = _pooled(values[:, None] if values.ndim in (3, 4) else values, images, True, "mean")
    rectangle = require("matplotlib.patches", "plotting", "plot").Rectangle

    rows = 2 if fi is None else 3
    height, width = images.shape[2:]
    figure = require("matplotlib.figure", "plotting", "plot").Figure(
        figsize=(
            panel * len(images),
            panel * height / width * rows + 1.1 + 0.3 * (title is not None),
        ),
        layout="constrained",
    )
    grid = figure.subplots(rows, len(images), squeeze=False)
    changed, _ = _images(result.x, batch=True)
    for b, panels in enumerate(grid.T):
        pair = _visible(images[b]), _visible(changed[b])
        limits = _limits(*pair)
        labels = result.label_before[b], result.label_after[b]
        log_probs = result.log_prob_before[b], result.log_prob_after[b]
        target = names[int(result.label[b])]
        for axes, image, k, value in zip(panels[[0, -1]], pair, labels, log_probs, strict=True):
            _show_image(axes, image, limits, image_cmap)
            text = f"predicted {names[int(k)]}\nP({target}) = {float(value.exp()):.2g}"
            axes.set_title(text, fontsize=8)
        if titles is not None:
            panels[0].set_title(f"{titles[b]}\n{panels[0].get_title()}", fontsize=8)
        for row, column in result.positions[b].tolist():
            frame = rectangle((column - 1, row - 1), 2, 2, fill=False, ec=MARK, lw=1.2)
            panels[-1].add_patch(frame)
        if fi is not None:
            _show_map(panels[1], fi[b, 0], _norm(fi[b], False), cmap)
    _without_ticks(grid)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure
