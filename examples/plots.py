"""The pictures of the examples: FI against class (the paper's Figure 1) and the top images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

__all__ = ["Panel", "gallery", "manhattan"]

# Okabe and Ito's palette without yellow: distinguishable under every common colour blindness. Seven
# colours in turn, so neighbouring classes always differ; the axis names them.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")
GAP = 0.06  # between classes, as a share of a panel's images


@dataclass(frozen=True)
class Panel:
    """One panel of a Manhattan plot.

    Attributes:
        title: printed above.
        fi: [N] scores.
        label: [N] class of each image.
        wrong: [N] whether the network's prediction differs from the true label.
        axis: what the classes are, "true class" say.
    """

    title: str
    fi: np.ndarray
    label: np.ndarray
    wrong: np.ndarray
    axis: str


def _draw(axes: Axes, panel: Panel, classes: Sequence[str], floor: float) -> None:
    """Points in the order of the classes, inside a class in the order of the data set."""
    size = 9.0 if len(panel.fi) < 5_000 else 3.0
    gap = GAP * len(panel.fi) / len(classes)
    start, ticks = 0.0, []
    for k in range(len(classes)):
        chosen = panel.label == k
        fi, wrong = np.maximum(panel.fi[chosen], floor), panel.wrong[chosen]
        x = start + np.arange(len(fi))
        colour = COLOURS[k % len(COLOURS)]
        axes.scatter(x[~wrong], fi[~wrong], s=size, color=colour, lw=0, alpha=0.8, rasterized=True)
        axes.scatter(x[wrong], fi[wrong], s=34, marker="^", color=colour, ec="black", lw=0.6)
        ticks.append(start + (len(fi) - 1) / 2)
        start += len(fi) + gap
    axes.axhline(1.0, color="0.25", lw=0.8, ls=(0, (5, 3)), zorder=0)
    axes.set_xticks(ticks, classes)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-gap, start)
    axes.set_xlabel(panel.axis)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", lw=0.6)
    axes.set_axisbelow(True)


def manhattan(
    path: Path, rows: Sequence[Sequence[Panel]], classes: Sequence[str], title: str
) -> None:
    """Writes a grid of Manhattan plots with a shared logarithmic FI axis in each row.

    Args:
        path: the PNG to write.
        rows: panels, the same number in every row.
        classes: the names of the classes.
        title: printed above everything.
    """
    columns = len(rows[0])
    figure = Figure(figsize=(6.4 * columns, 3.6 * len(rows) + 1.0), dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for axes_row, panels in zip(grid, rows, strict=True):
        positive = np.concatenate([p.fi[p.fi > 0] for p in panels])
        low = float(positive.min()) if len(positive) else 1.0
        for axes, panel in zip(axes_row, panels, strict=True):
            axes.set_yscale("log")
            _draw(axes, panel, classes, low)
            axes.yaxis.set_major_locator(LogLocator(numticks=9))
            axes.minorticks_off()
        axes_row[0].set_ylabel("first-order influence FI")
    handles = [
        Line2D(
            [], [], marker="o", ls="", ms=5, color="0.4", mec="none", label="classified correctly"
        ),
        Line2D(
            [],
            [],
            marker="^",
            ls="",
            ms=7,
            color="0.7",
            mec="black",
            mew=0.6,
            label="misclassified",
        ),
        Line2D([], [], color="0.25", lw=0.8, ls=(0, (5, 3)), label="FI = 1 (P = 1/2 at full rank)"),
    ]
    figure.suptitle(title, fontsize=13)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def gallery(path: Path, images: np.ndarray, captions: Sequence[str], title: str) -> None:
    """Writes a row of gray-scale images, each with a caption below it.

    Args:
        path: the PNG to write.
        images: [n, H, W] in 0..1.
        captions: n texts, one to three lines each.
        title: printed above.
    """
    figure = Figure(figsize=(2.1 * len(images), 3.2), dpi=150, layout="constrained")
    grid = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, image, caption in zip(grid, images, captions, strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(caption, fontsize=9, linespacing=1.4)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)
