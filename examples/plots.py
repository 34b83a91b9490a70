"""The pictures of the examples: FI against class (the paper's Figure 1), the top images, and grids
of layer profiles (Figure 4 d to f)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from fastfi.plot.layers import COLOURS, draw_layers, kind_styles

__all__ = [
    "Panel",
    "Profiles",
    "crowded",
    "draw_manhattan",
    "gallery",
    "layer_grid",
    "legend_handles",
    "manhattan",
]

GAP = 0.06  # between classes, as a share of a panel's images
CROWD = 0.05  # of the images; more misclassified ones would hide the others behind their marks


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


def crowded(panels: Sequence[Panel]) -> bool:
    """Whether some panel has too many misclassified images for large marks."""
    return any(panel.wrong.mean() > CROWD for panel in panels)


def draw_manhattan(
    axes: Axes, panel: Panel, classes: Sequence[str], floor: float, crowd: bool = False
) -> None:
    """Points in the order of the classes, inside a class in the order of the data set.

    Args:
        classes: their names.
        floor: where smaller values are drawn: 0 has no place on a logarithmic axis.
        crowd: small dark marks without an edge for misclassified images.
    """
    size = 9.0 if len(panel.fi) < 5_000 else 3.0
    gap = GAP * len(panel.fi) / len(classes)
    start, ticks = 0.0, []
    for k in range(len(classes)):
        chosen = panel.label == k
        fi, wrong = np.maximum(panel.fi[chosen], floor), panel.wrong[chosen]
        x = start + np.arange(len(fi))
        # Seven colours in turn, so neighbouring classes always differ; the axis names them.
        colour = COLOURS[k % len(COLOURS)]
        axes.scatter(x[~wrong], fi[~wrong], s=size, color=colour, lw=0, alpha=0.8, rasterized=True)
        marks: dict[str, Any] = {"s": 34, "color": colour, "ec": "black", "lw": 0.6}
        if crowd:
            marks = {"s": size, "color": _dark(colour), "lw": 0, "alpha": 0.8, "rasterized": True}
        axes.scatter(x[wrong], fi[wrong], marker="^", **marks)
        ticks.append(start + (len(fi) - 1) / 2)
        start += len(fi) + gap
    line = {"color": "black", "lw": 1.3} if crowd else {"color": "0.25", "lw": 0.8}
    axes.axhline(1.0, ls=(0, (5, 3)), zorder=3, **line)
    axes.set_xticks(ticks, classes)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-gap, start)
    axes.set_xlabel(panel.axis)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", lw=0.6)
    axes.set_axisbelow(True)


def _dark(colour: str) -> tuple[float, ...]:
    return tuple(0.45 * part for part in to_rgb(colour))


def legend_handles(crowd: bool = False) -> list[Artist]:
    """What the marks of :func:`draw_manhattan` mean."""
    edge = {"color": "0.2", "mec": "none"} if crowd else {"color": "0.7", "mec": "black"}
    correct = "0.6" if crowd else "0.4"
    return [
        Line2D(
            [], [], marker="o", ls="", ms=5, color=correct, mec="none", label="classified correctly"
        ),
        Line2D(
            [],
            [],
            marker="^",
            ls="",
            ms=7,
            mew=0.6,
            label="misclassified",
            **edge,
        ),
        Line2D([], [], color="0.25", lw=0.8, ls=(0, (5, 3)), label="FI = 1 (P = 1/2 at full rank)"),
    ]


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
    crowd = crowded([panel for row in rows for panel in row])
    for axes_row, panels in zip(grid, rows, strict=True):
        positive = np.concatenate([p.fi[p.fi > 0] for p in panels])
        low = float(positive.min()) if len(positive) else 1.0
        for axes, panel in zip(axes_row, panels, strict=True):
            axes.set_yscale("log")
            draw_manhattan(axes, panel, classes, low, crowd)
            axes.yaxis.set_major_locator(LogLocator(numticks=9))
            axes.minorticks_off()
        axes_row[0].set_ylabel("first-order influence FI")
    figure.suptitle(title, fontsize=13)
    figure.legend(handles=legend_handles(crowd), loc="outside lower center", ncols=3, frameon=False)
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


@dataclass(frozen=True)
class Profiles:
    """One panel of :func:`layer_grid`.

    Attributes:
        title: printed above.
        names, fi, kinds, others: as in :func:`fastfi.plot.layer_profile`.
    """

    title: str
    names: Sequence[str]
    fi: np.ndarray
    kinds: Sequence[str]
    others: np.ndarray


def layer_grid(
    path: Path,
    rows: Sequence[Sequence[Profiles]],
    widths: Sequence[float],
    images: np.ndarray,
    captions: Sequence[str],
    title: str,
) -> None:
    """Writes a grid of layer profiles with one FI axis, below the images that they belong to.

    Args:
        path: the PNG to write.
        rows: panels, with the same samples in each.
        widths: of the columns, relative to each other.
        images: [B, H, W] in 0..1.
        captions: B texts.
        title: printed above everything.
    """
    figure = Figure(figsize=(10.0, 2.8 * len(rows) + 1.6), dpi=100, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.0, 2.9 * len(rows)))
    for b, axes in enumerate(above.subplots(1, len(images), squeeze=False)[0]):
        axes.imshow(images[b], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_anchor("W")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(color=COLOURS[b % len(COLOURS)], linewidth=2.5)
        beside = {"transform": axes.transAxes, "va": "center", "in_layout": False}
        axes.text(1.08, 0.5, captions[b], fontsize=7.5, linespacing=1.5, **beside)
    grid = below.subplots(len(rows), len(widths), squeeze=False, sharey=True, width_ratios=widths)
    for axes_row, panels in zip(grid, rows, strict=True):
        for axes, panel in zip(axes_row, panels, strict=True):
            draw_layers(axes, panel.names, panel.fi, panel.kinds, panel.others)
            axes.set_title(panel.title, fontsize=10, loc="left", pad=16)
            axes.set_xlabel("layer", fontsize=9)
        axes_row[0].set_ylabel("first-order influence FI", fontsize=9)
    kinds = [kind for row in rows for panel in row for kind in panel.kinds]
    handles: list[Artist] = [
        Line2D([], [], color="0.25", lw=1.0, ms=4, label=kind, **style)
        for kind, style in kind_styles(kinds).items()
    ]
    handles.append(Patch(color="0.5", alpha=0.25, lw=0, label="ordinary images: median, 5-95 %"))
    below.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)
