"""Figures of the setups: Manhattan plots over classes and layers, rows of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from examples.plots import Panel, crowded, draw_manhattan, legend_handles
from fastfi.plot.layers import COLOURS, draw_layers

__all__ = ["WIDTH", "image_rows", "layer_panels", "log_axis", "manhattan_grid", "rules_scatter"]

WIDTH = 8.2  # inches: 900 pixels
TICKS = 7
RULES = {"exact": "the definition", "damped": "Damped", "truncated": "the authors' rule"}
EXTREME = 1e100  # beyond, a logarithmic axis overflows
LETTER = 0.0105  # of the axes' width, of a letter of a stage's name


def _decades(low: float, high: float) -> tuple[int, int, dict[float, str]]:
    """The powers of ten around two positive values, and what to write at which of those between."""
    first = math.floor(math.log10(max(low, 1 / EXTREME)))
    last = math.ceil(math.log10(min(high, EXTREME)) + 0.05)
    step = max(1, math.ceil((last - first) / TICKS))
    shown = [d for d in range(first, last + 1) if d % step == 0]
    return first, last, {
        10.0**d: f"$10^{{{d}}}$" if abs(d) > 2 else f"{10.0**d:g}" for d in shown
    }  # fmt: skip


def log_axis(axes: Axes, values: Sequence[NDArray[np.floating]]) -> float:
    """A logarithmic FI axis for these values; where some are 0, with a place for it below.

    Returns:
        What to draw zeros at; the axis calls it 0.
    """
    every = np.concatenate([np.asarray(v, dtype=np.float64).ravel() for v in values])
    zeros, positive = bool((every == 0).any()), every[(every > 0) & np.isfinite(every)]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    first, last, labels = _decades(low, high)
    floor = 10.0**first
    if zeros:
        floor = 10.0 ** (first - 0.12 * max(2, last - first))
        labels = {floor: "0", **labels}
    axes.set_yscale("log")
    axes.set_yticks(list(labels), list(labels.values()))
    axes.minorticks_off()
    axes.set_ylim(floor / 2 if zeros else floor, 10.0**last)
    return floor


def manhattan_grid(rows: Sequence[Sequence[Panel]], classes: Sequence[str]) -> Figure:
    """Manhattan plots over the classes, with one FI axis in each row."""
    columns = len(rows[0])
    figure = Figure(figsize=(WIDTH, 2.9 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    crowd = crowded([panel for row in rows for panel in row])
    for axes_row, panels in zip(grid, rows, strict=True):
        floor = log_axis(axes_row[0], [panel.fi for panel in panels])
        for axes, panel in zip(axes_row, panels, strict=True):
            draw_manhattan(axes, panel, classes, floor, crowd)
            if max(map(len, classes)) > 2:
                axes.tick_params(axis="x", labelsize=8 if columns > 1 else 9)
                if columns > 1:
                    axes.set_xticks(
                        axes.get_xticks(), classes, rotation=60, ha="right", va="center",
                        rotation_mode="anchor",
                    )  # fmt: skip
        axes_row[0].set_ylabel("first-order influence FI")
    figure.legend(handles=legend_handles(crowd), loc="outside lower center", ncols=3, frameon=False)
    return figure


def image_rows(rows: Sequence[tuple[str, NDArray[np.uint8], Sequence[str]]]) -> Figure:
    """Rows of images, each of them (title, [n, C, H, W] in 0..255, n captions)."""
    columns = max(len(images) for _, images, _ in rows)
    figure = Figure(figsize=(WIDTH, 2.5 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (title, images, captions) in zip(parts, rows, strict=True):
        part.suptitle(title, fontsize=12)
        for b, axes in enumerate(part.subplots(1, columns, squeeze=False)[0]):
            if b >= len(images):
                axes.set_axis_off()
                continue
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            pixels = images[b].transpose(1, 2, 0)
            if pixels.shape[2] == 1:
                axes.imshow(pixels[:, :, 0], cmap="gray_r", vmin=0, vmax=255)
            else:
                axes.imshow(pixels)
            axes.set_xlabel(captions[b], fontsize=10, linespacing=1.4)
    return figure


def _stage_names(axes: Axes, names: Sequence[str]) -> None:
    """The stages' names above their layers, inside the axes' width and the longest stages' first;
    one that would meet another is left out."""
    for text in list(axes.texts):  # draw_layers leaves out the names of short stages between others
        text.remove()
    heads = [name.partition(".")[0] for name in names]
    starts = [i for i, head in enumerate(heads) if i == 0 or head != heads[i - 1]]
    runs = list(zip(starts, [*starts[1:], len(heads)], strict=True))
    taken: list[tuple[float, float]] = []
    for start, stop in sorted(runs, key=lambda run: (run[0] > 0 and run[1] < len(heads),
                                                     run[0] - run[1])):  # fmt: skip
        half = LETTER * len(heads[start]) / 2
        middle = min(max((start + stop) / 2 / len(heads), half), 1 - half)
        if any(middle - half < high and low < middle + half for low, high in taken):
            continue
        taken.append((middle - half, middle + half))
        axes.text(middle, 1.04, heads[start], ha="center", va="bottom", fontsize=8, color="0.35",
                  transform=axes.transAxes)  # fmt: skip


def _kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each type of layer, in the order in which types first come."""
    return {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(dict.fromkeys(kinds))}


def layer_panels(
    title: str,
    panels: Sequence[tuple[str, NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]],
    names: Sequence[str],
    kinds: Sequence[str],
) -> Figure:
    """FI of each layer, one panel for each rule below the other.

    Args:
        panels: (rule, FI [N, L] of ordinary images, [n, L] of those with the largest FI, [L] the
            medians).
        names, kinds: of the L layers, in their order.
    """
    figure = Figure(figsize=(WIDTH, 2.6 * len(panels) + 1.0), layout="constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    handles: list[Artist] = []
    for axes, (rule, fi, top, middle) in zip(every, panels, strict=True):
        handles = _layer_points(axes, fi, top, middle, names, kinds)
        axes.set_title(f"{title}, {RULES[rule]}", fontsize=11, loc="left", pad=20)
        axes.set_ylabel("FI of the layer")
    every[-1].set_xlabel("layer with parameters, from input to output")
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _layer_points(
    axes: Axes,
    fi: NDArray[np.floating],
    top: NDArray[np.floating],
    middle: NDArray[np.floating],
    names: Sequence[str],
    kinds: Sequence[str],
) -> list[Artist]:
    """Draws a panel of :func:`layer_panels`; returns what its marks mean."""
    draw_layers(axes, names, np.empty((0, len(names))))  # the stages
    _stage_names(axes, names)
    floor = log_axis(axes, [fi, top])
    colours, every = _kind_colours(kinds), np.array(list(kinds))
    # Side by side inside a layer, in the order of the images: a Manhattan plot over layers.
    beside = 0.9 * ((np.arange(len(fi)) + 0.5) / len(fi) - 0.5)
    size = 9.0 if len(fi) < 50 else 1.6
    for kind, colour in colours.items():
        at = np.flatnonzero(every == kind)
        axes.scatter(at + 1 + beside[:, None], np.maximum(fi[:, at], floor), s=size, color=colour,
                     lw=0, alpha=0.4, rasterized=True)  # fmt: skip
        axes.scatter(np.broadcast_to(at + 1, top[:, at].shape), np.maximum(top[:, at], floor), s=11,
                     color=colour, ec="black", lw=0.5, zorder=3)  # fmt: skip
    axes.plot(np.arange(len(middle)) + 1, np.maximum(middle, floor), "_", ms=5, mew=1.3,
              color="black", zorder=4)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    handles: list[Artist] = [
        Line2D([], [], marker="o", ls="", ms=4, color=colour, label=kind)
        for kind, colour in colours.items()
    ]
    handles.append(Line2D([], [], marker="_", ls="", ms=7, mew=1.4, color="black", label="median"))
    handles.append(
        Line2D([], [], marker="o", ls="", ms=5, color="0.8", mec="black", mew=0.5,
               label=f"the {len(top)} largest of Setup 1")
    )  # fmt: skip
    return handles


def _close_limits(axes: Axes, values: NDArray[np.floating]) -> None:
    """Limits of a logarithmic axis by the values and 1, not by whole decades, where these are few
    and none is 0."""
    low, high = min(float(values.min()), 1.0), max(float(values.max()), 1.0)
    if not 0 < low <= high < 30 * low:
        return
    margin = max((high / low) ** 0.08, 1.02)
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def rules_scatter(panels: Sequence[tuple[str, Mapping[str, NDArray[np.floating]]]]) -> Figure:
    """FI under the other rules, as a multiple of exact FI, against exact FI.

    Args:
        panels: (title, FI [n] by rule, "exact" among them, above 0).
    """
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    shares = [
        {rule: values / fi["exact"] for rule, values in fi.items() if rule != "exact"}
        for _, fi in panels
    ]
    floor = log_axis(every[0], [v for share in shares for v in share.values()])
    _close_limits(every[0], np.concatenate([v for share in shares for v in share.values()]))
    handles: list[Artist] = []
    for axes, (title, fi), share in zip(every, panels, shares, strict=True):
        axes.set_xscale("log")
        labels = _decades(float(fi["exact"].min()), float(fi["exact"].max()))[2]
        axes.set_xticks(list(labels), list(labels.values()))
        axes.xaxis.set_minor_locator(NullLocator())
        handles = [axes.axhline(1.0, color="0.4", lw=0.9, label="the definition")]
        for i, (rule, values) in enumerate(share.items()):
            points = axes.scatter(
                fi["exact"], np.maximum(values, floor), s=22, marker="o^"[i % 2],
                color=COLOURS[i], alpha=0.75, lw=0, label=RULES[rule],
            )  # fmt: skip
            handles.append(points)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("FI by the definition")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    every[0].set_ylabel("FI of all parameters / by the definition")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure
