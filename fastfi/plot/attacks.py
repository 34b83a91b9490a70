"""``attack``: images before and after (Figure 7 of Shu and Zhu 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastfi._extras import require
from fastfi.attack import OnePixel
from fastfi.errors import InputError, OptionError
from fastfi.plot.shared import (
    as_array,
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
    from matplotlib.figure import Figure

__all__ = ["attack"]

MARK = "#D55E00"  # Okabe and Ito's vermilion: seen on black, grey and white


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
    images, _ = as_images(x, batch=True)
    if not isinstance(result, OnePixel):
        raise InputError(f"result: expected a OnePixel, got {type(result).__name__}")
    if list(result.x.shape) != list(images.shape):
        raise InputError(
            f"x: expected the attacked images, shape {list(result.x.shape)}, got "
            f"{list(images.shape)}"
        )
    check_sequence(titles, "titles", len(images), "samples")
    largest = int(max(t.max() for t in (result.label, result.label_before, result.label_after)))
    if classes is not None and (isinstance(classes, str) or len(classes) <= largest):
        raise OptionError(f"classes: expected at least {largest + 1} names, got {classes!r}")
    names = [str(k) for k in range(largest + 1)] if classes is None else list(classes)
    fi = None
    if maps is not None:
        values = as_array(maps, "maps")
        fi = pooled(values[:, None] if values.ndim in (3, 4) else values, images, True, "mean")
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
    changed, _ = as_images(result.x, batch=True)
    for b, panels in enumerate(grid.T):
        pair = displayed(images[b]), displayed(changed[b])
        limits = grey_limits(*pair)
        labels = result.label_before[b], result.label_after[b]
        log_probs = result.log_prob_before[b], result.log_prob_after[b]
        target = names[int(result.label[b])]
        for axes, image, k, value in zip(panels[[0, -1]], pair, labels, log_probs, strict=True):
            show_image(axes, image, limits, image_cmap)
            text = f"predicted {names[int(k)]}\nP({target}) = {float(value.exp()):.2g}"
            axes.set_title(text, fontsize=8)
        if titles is not None:
            panels[0].set_title(f"{titles[b]}\n{panels[0].get_title()}", fontsize=8)
        for row, column in result.positions[b].tolist():
            frame = rectangle((column - 1, row - 1), 2, 2, fill=False, ec=MARK, lw=1.2)
            panels[-1].add_patch(frame)
        if fi is not None:
            show_map(panels[1], fi[b, 0], colour_norm(fi[b], False), cmap)
    without_ticks(grid)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure
