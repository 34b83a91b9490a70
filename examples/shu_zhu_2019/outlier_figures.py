"""Figures of the part with overlapped digits: curves by network, and some of the digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.section import Result
from fastfi.plot.layers import COLOURS

__all__ = ["MEASURES", "draw"]

# Colour and dashes, so that lines differ in print, too.
MEASURES: dict[str, tuple[str, str, Any]] = {
    "exact": ("FI, exact", COLOURS[0], "-"),
    "truncated": ("FI, Truncated(1e-3)", COLOURS[4], (0, (5, 1.5))),
    "truncated_small": ("FI, Truncated(1e-8)", COLOURS[6], (0, (1, 1))),
    "damped": ("FI, Damped", COLOURS[2], (0, (6, 1.5, 1, 1.5))),
    "jacobian": ("Jacobian norm", COLOURS[5], (0, (3, 1))),
    "cook": ("Cook, largest", COLOURS[3], (0, (4, 1, 1, 1, 1, 1))),
}


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", lw=0.6)
    axes.set_axisbelow(True)


def _curves(result: Result, name: str, measures: Sequence[str]) -> Figure:
    """ROC and precision-recall curves of a set of images, a row for each network."""
    figure = Figure(
        figsize=(9.0, (4.6 if len(measures) < 3 else 4.9) * len(NETWORKS)), layout="constrained"
    )
    for pair, network in zip(figure.subplots(len(NETWORKS), 2), NETWORKS, strict=True):
        found = result.values["networks"][network]
        for measure in measures:
            title, colour, dashes = MEASURES[measure]
            areas = found[name]["scores"][measure]
            for axes, kind in zip(pair, ("roc", "precision"), strict=True):
                x, y = result.arrays[f"{network}_{name}_{measure}_{kind}"]
                label = f"{title}: {areas[kind]:.3f}"
                # Wide and first: rules that order images alike lie on top of it.
                width = 3.2 if measure == "exact" and len(measures) > 2 else 1.6
                axes.plot(x, y, color=colour, ls=dashes, lw=width, label=label)
        prevalence = found[name]["prevalence"]
        pair[0].plot([0, 1], [0, 1], color="0.75", lw=0.8)
        pair[1].axhline(prevalence, color="0.75", lw=0.8)
        _finish(
            pair[0], f"{found['title']}: ROC", "ordinary images above the threshold (share)",
            "outliers above it (share)",
        )  # fmt: skip
        _finish(
            pair[1], f"{found['title']}: precision and recall",
            "recall: outliers above the threshold (share)",
            f"precision (by chance {prevalence:.3f})",
        )  # fmt: skip
        for axes, title in zip(pair, ("area below the curve", "average precision"), strict=True):
            axes.legend(
                title=title, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2,
                fontsize=8.5, title_fontsize=9, frameon=False,
            )  # fmt: skip
    return figure


def _images(result: Result) -> Figure:
    """Outliers from the most to the least influential, a row for each network."""
    count = len(result.values["networks"][NETWORKS[0]]["shown"])
    figure = Figure(figsize=(9.0, 2.1 * len(NETWORKS)), layout="constrained")
    for row, network in zip(figure.subfigures(len(NETWORKS), 1), NETWORKS, strict=True):
        found = result.values["networks"][network]
        row.suptitle(f"{found['title']}, FI falling from left to right", fontsize=11)
        images = result.arrays[f"{network}_shown"]
        for axes, image, facts in zip(row.subplots(1, count), images, found["shown"], strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(
                f"FI {facts['fi']:.3g}\nlabel {facts['label']}, predicted {facts['predicted']}",
                fontsize=8.5, linespacing=1.4,
            )  # fmt: skip
    return figure


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """``curves``: exact FI and the Jacobian norm; ``measures``: all measures on the subset;
    ``images``: some outliers."""
    name = "whole" if result.values["everywhere"] else "sample"
    return {
        "curves": _curves(result, name, ("exact", "jacobian")),
        "measures": _curves(result, "subset", tuple(MEASURES)),
        "images": _images(result),
    }
