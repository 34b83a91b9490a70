"""``influence_map``: maps beside their images (Figure 6 of Shu and Zhu 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfi._extras import require
from fastfi.errors import OptionError
from fastfi.maps import InfluenceMap
from fastfi.plot.shared import (
    as_images,
    check_sequence,
    colour_norm,
    displayed,
    grey_limits,
    pooled,
    show_image,
    show_map,
    without_ticks,
)

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["OPACITY", "influence_map"]

OPACITY = 0.85  # of the overlay where the map is largest


def _opacity(fi: np.ndarray, norm: Normalize) -> np.ndarray:
    """[H, W], from 0 at the bottom of the colour scale to OPACITY at its top; 0 for NaN."""
    share = np.ma.filled(norm(np.clip(fi, norm.vmin, norm.vmax)), 0.0)
    return OPACITY * np.nan_to_num(share)


def _colour_bar(figure: Figure, drawn: AxesImage, **where: Any) -> None:
    axes = figure.colorbar(drawn, **where).ax
    axes.tick_params(labelsize=7)
    axes.yaxis.get_offset_text().set_fontsize(7)


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
    images, batch = as_images(x)
    fi = pooled(maps, images, batch, channels)
    count = fi.shape[1]
    check_sequence(scales, "scales", count, "scales")
    check_sequence(titles, "titles", len(images), "samples")
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
    whole = colour_norm(fi, log)
    for b, (panels, image) in enumerate(zip(grid, map(displayed, images), strict=True)):
        limits = grey_limits(image)
        show_image(panels[0], image, limits, image_cmap)
        texts = [] if titles is None else [titles[b]]
        texts += [] if limits == (0.0, 1.0) else ["rescaled"]
        panels[0].set_xlabel("\n".join(texts), fontsize=8)
        norm = whole if shared == "all" else colour_norm(fi[b], log)
        drawn = [show_map(panels[1 + s], fi[b, s], norm, cmap) for s in range(count)]
        if overlay is not None:
            grey = image.mean(2) if image.ndim == 3 else image
            show_image(panels[-1], grey, limits, "gray")
            alpha = _opacity(fi[b, overlay], norm)
            show_map(panels[-1], fi[b, overlay], norm, cmap, alpha=alpha)
        if shared == "sample":
            beside = panels[-1].inset_axes((1.05, 0.0, 0.07, 1.0))
            _colour_bar(figure, drawn[0], cax=beside)
    if shared == "all":
        _colour_bar(figure, drawn[0], ax=grid.ravel().tolist(), fraction=0.02, pad=0.01)
    without_ticks(grid)
    over = [] if overlay is None else [f"{names[overlay]} on image"]
    for axes, name in zip(grid[0], ["image", *names, *over], strict=True):
        axes.set_title(name, fontsize=9)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure
