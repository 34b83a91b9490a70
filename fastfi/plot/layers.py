"""``layer_profile``: FI of every layer's parameters (Figure 4 d to f of Shu and Zhu 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfi._extras import require
from fastfi.errors import InputError, OptionError
from fastfi.plot.shared import as_array, check_sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["COLOURS", "draw_layers", "kind_styles", "layer_profile"]

# Okabe and Ito's palette without yellow: distinguishable under every common colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")
# How the layers of one type are drawn: these types, and in turn any others.
LAYER = "layer"  # where no types are given
STYLES: dict[str, dict[str, Any]] = {
    LAYER: {"marker": "o"},
    "conv": {"marker": "o"},
    "norm": {"marker": "o", "mfc": "white", "ls": ":"},
    "linear": {"marker": "D", "ls": ""},
}
OTHER_STYLES: tuple[dict[str, Any], ...] = (
    {"marker": "s", "mfc": "white", "ls": "--"},
    {"marker": "^"},
    {"marker": "v", "mfc": "white", "ls": "-."},
    {"marker": "P"},
)
EXTREME = 1e150  # ticks and margins of a wider axis overflow
MOST_NAMES, LONGEST_NAME = 40, 24  # of layers that the axis names; it numbers more, or longer ones


def kind_styles(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """matplotlib's line options for each type of layer, in the order in which types first come."""
    others = cycle(OTHER_STYLES)
    return {kind: STYLES.get(kind) or next(others) for kind in dict.fromkeys(kinds)}


def _profiles(fi: Any, layers: int, name: str, count: str) -> np.ndarray:
    """Profiles [count, layers] float64, at least one; ``count`` "B" may be one profile [layers]."""
    values = as_array(fi, name)
    alone = count == "B"
    if alone and values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or values.shape[1] != layers or len(values) == 0:
        raise InputError(
            f"{name}: expected shape {f'[{layers}] or ' if alone else ''}[{count}, {layers}] for "
            f"{layers} names, got {list(np.shape(fi))}"
        )
    return values


def _drawn(fi: np.ndarray) -> np.ndarray:
    """The same, with NaN where a logarithmic axis has no place; extremes are drawn as EXTREME."""
    return np.where((fi > 0) & np.isfinite(fi), np.clip(fi, 1 / EXTREME, EXTREME), np.nan)


def _draw_stages(axes: Axes, names: Sequence[str]) -> None:
    """Shades every other run of layers whose names begin alike, and writes that beginning above it,
    where it fits."""
    locator = require("matplotlib.ticker", "plotting", "plot").MaxNLocator
    heads = [name.partition(".")[0] for name in names]
    starts = [i for i, head in enumerate(heads) if i == 0 or head != heads[i - 1]]
    for n, (start, stop) in enumerate(zip(starts, [*starts[1:], len(names)], strict=True)):
        if n % 2:
            axes.axvspan(start + 0.5, stop + 0.5, color="0.955", lw=0, zorder=0)
        where, align = (start + stop + 1) / 2, "center"
        if stop - start < 0.02 * len(heads[start]) * len(names):  # too narrow
            if start > 0 and stop < len(names):
                continue
            where, align = (start + 0.6, "left") if start else (stop + 0.4, "right")
        axes.text(
            where, 1.01, heads[start], ha=align, va="bottom", fontsize=8, color="0.35",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlim(0.5, len(names) + 0.5)
    axes.xaxis.set_major_locator(locator(8, integer=True))


def draw_layers(
    axes: Axes,
    names: Sequence[str],
    fi: np.ndarray,
    kinds: Sequence[str] | None = None,
    others: np.ndarray | None = None,
) -> list[Line2D]:
    """Draws what :func:`layer_profile` describes into axes of the caller's.

    Args:
        axes: matplotlib's.
        fi: [B, L] float64.
        names, kinds, others: as in :func:`layer_profile`.

    Returns:
        One line for each sample, for a legend.
    """
    every = np.array([LAYER] * len(names) if kinds is None else list(kinds))
    styles = kind_styles(every.tolist())
    runs = [(np.flatnonzero(every == kind), style) for kind, style in styles.items()]
    axes.set_yscale("log")
    _draw_stages(axes, names)
    if others is not None:
        with np.errstate(invalid="ignore"):  # between two infinite values; a gap either way
            low, middle, high = _drawn(np.quantile(others, (0.05, 0.5, 0.95), axis=0))
        for at, style in runs:
            axes.fill_between(at + 1, low[at], high[at], color="0.5", alpha=0.18, lw=0, zorder=1)
            axes.plot(at + 1, middle[at], color="0.25", lw=1.0, ms=2.5, zorder=2, **style)
    lines = []
    for b, profile in enumerate(_drawn(fi)):
        colour = COLOURS[b % len(COLOURS)]
        how: dict[str, Any] = {"color": colour, "lw": 1.0, "ms": 3.2, "mew": 0.8, "zorder": 3}
        each = [axes.plot(at + 1, profile[at], **how, **style)[0] for at, style in runs]
        lines.append(each[0])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return lines


def layer_profile(
    names: Sequence[str],
    fi: Any,
    *,
    kinds: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    others: Any = None,
    title: str | None = None,
) -> Figure:
    """FI of each layer's parameters over the layers, in one colour for each sample, on a
    logarithmic axis: Figure 4 d to f (Setup 2.2) of Shu and Zhu, "Sensitivity Analysis of Deep
    Neural Networks", AAAI 2019.

    Draw profiles of :class:`fastfi.Damped`: under Exact, every layer of full rank has the same FI,
    (1 - P_y) / P_y, and the picture is flat. Stages, which are runs of layers whose names begin
    alike ("stage1.0.conv1", "stage1.1.conv2"), are shaded in turn. The axis names up to 40 layers
    and numbers more. Values that are zero, infinite or NaN leave a gap.

    Args:
        names: L layers, in the order in which they are drawn; ``Influence.names``.
        fi: [B, L], or [L] for one sample; ``Influence.fi``. Seven colours are used in turn.
        kinds: L types of layer, "conv" and "norm" say; the layers of one type are joined by a line
            of their own, since types differ more than neighbours do. None joins all of them.
        labels: B texts for the legend.
        others: [N, L], samples to compare with, in grey: their median, and a band from their 5th to
            their 95th percentile.
        title: of the figure.

    Returns:
        A new Figure.

    Raises:
        InputError: shapes do not fit. OptionError: an option has no meaning.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> r = fastfi.influence(model, x, y, wrt="layers", inverse="damped", full_output=True)
        >>> fastfi.plot.layer_profile(r.names, r.fi).savefig("layers.png")
    """
    texts = isinstance(names, Sequence) and not isinstance(names, str)
    if not texts or len(names) == 0 or not all(isinstance(name, str) for name in names):
        raise OptionError(f"names: expected the names of the layers, got {names!r}")
    values = _profiles(fi, len(names), "fi", "B")
    compared = None if others is None else _profiles(others, len(names), "others", "N")
    check_sequence(kinds, "kinds", len(names), "layers")
    check_sequence(labels, "labels", len(values), "samples")
    line = require("matplotlib.lines", "plotting", "plot").Line2D
    patch = require("matplotlib.patches", "plotting", "plot").Patch
    longest = max(map(len, names))
    named = len(names) <= MOST_NAMES and longest <= LONGEST_NAME
    figure = require("matplotlib.figure", "plotting", "plot").Figure(
        figsize=(8.0, 3.6 + 0.06 * longest * named), layout="constrained"
    )
    axes = figure.subplots()
    lines = draw_layers(axes, names, values, kinds, compared)
    if named:
        axes.set_xticks(range(1, len(names) + 1), names, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("first-order influence FI", fontsize=9)
    handles = []
    if labels is not None:
        handles += [line([], [], color=drawn.get_color(), label=text)
                    for drawn, text in zip(lines, labels, strict=True)]  # fmt: skip
    if kinds is not None:
        handles += [line([], [], color="0.25", lw=1.0, ms=4, label=kind, **style)
                    for kind, style in kind_styles(kinds).items()]  # fmt: skip
    if compared is not None:
        handles.append(patch(color="0.5", alpha=0.25, lw=0, label="others: median, 5-95 %"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(5, len(handles)),
            frameon=False, fontsize=8,
        )  # fmt: skip
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure
