"""``compare``: two sets of scores, sample by sample or as distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastfi._extras import require
from fastfi.errors import InputError, OptionError
from fastfi.plot.layers import COLOURS, EXTREME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastfi.scoring.comparison import Comparison, Pairs

__all__ = ["compare"]

BLUE, ORANGE = COLOURS[0], COLOURS[1]
GREY = "0.6"
STEPS = 2000  # of a distribution function; more are not seen
LABEL, PREDICTION = ("same label", "another label"), ("same prediction", "another prediction")


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """A logarithmic axis for the finite, positive values, with room on both sides."""
    shown = values[(values > 0) & np.isfinite(values)]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (1.0, 1.0)
    low, high = np.clip([low, high], 1 / EXTREME, EXTREME).tolist()
    room = max((high / low) ** 0.04, 1.5)
    return low / room, high * room


def _clipped(values: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.float64]:
    """Zeros and infinite values go to the axis' ends."""
    return np.clip(values, *limits)


def _groups(pairs: Pairs) -> list[tuple[NDArray[np.bool_], str, str]]:
    """(which pairs, colour, name): by label if labels differ anywhere, else by prediction."""
    labels, predictions = pairs.same_label, pairs.same_prediction
    for same, (yes, no) in ((labels, LABEL), (predictions, PREDICTION)):
        if same is not None and not same.all():
            return [(same, BLUE, yes), (~same, ORANGE, no)]
    return [(np.ones(len(pairs.a), bool), BLUE, LABEL[0] if labels is not None else "samples")]


def _scatter(axes: Axes, pairs: Pairs) -> None:
    limits = _limits(np.concatenate([pairs.a, pairs.b]))
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    axes.set_aspect("equal")
    axes.plot(limits, limits, color=GREY, lw=0.8, zorder=1)
    x, y = _clipped(pairs.a, limits), _clipped(pairs.b, limits)
    for which, colour, name in _groups(pairs):
        count = int(which.sum())
        alpha = float(np.clip((500 / max(count, 1)) ** 0.4, 0.08, 0.8))
        points = axes.scatter(
            x[which], y[which], s=8, color=colour, alpha=alpha, lw=0, zorder=2, clip_on=False,
            rasterized=True, label=f"{name} ({count:,})",
        )  # fmt: skip
        points.set_in_layout(False)


def _steps(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values in increasing order and the part of samples up to each, at most STEPS of them."""
    ordered = np.sort(values)
    at = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), STEPS)).astype(int))
    return ordered[at], (at + 1) / len(ordered)


def _gap(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float, float]:
    """Where the distribution functions differ most, and both there."""
    at = np.unique(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(v), at, "right") / len(v) for v in (a, b)]
    most = int(np.abs(below[0] - below[1]).argmax())
    return float(at[most]), float(below[0][most]), float(below[1][most])


def _distributions(axes: Axes, result: Comparison, names: Sequence[str]) -> None:
    limits = _limits(np.concatenate(result.values))
    axes.set(xscale="log", xlim=limits, ylim=(0, 1))
    for values, colour, name in zip(result.values, (BLUE, ORANGE), names, strict=True):
        x, y = _steps(values)
        x, y = np.concatenate([limits[:1], _clipped(x, limits)]), np.concatenate([[0.0], y])
        if np.isfinite(values).all():
            x, y = np.append(x, limits[1]), np.append(y, 1.0)
        axes.step(
            x, y, where="post", color=colour, lw=1.3, label=f"{name} ({len(values):,})",
        )  # fmt: skip
    x0, low, high = _gap(*result.values)
    if result.ks > 0:
        x0 = float(_clipped(np.array([x0]), limits)[0])
        axes.plot([x0, x0], [low, high], color="0.25", lw=1.0, ls=":", label=f"KS {result.ks:.3g}")
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)


def compare(
    result: Comparison, *, names: Sequence[str] = ("first", "second"), title: str | None = None
) -> Figure:
    """Two sets of scores: where samples are paired, one point for each on logarithmic axes, with
    the diagonal on which both scores are equal; otherwise the two distribution functions, and where
    they differ most.

    Points are coloured by whether the labels are equal; where all are, by whether the predictions
    are. Zeros and infinite values lie on the edges.

    Args:
        result: of :func:`fastfi.scoring.comparison.compare`.
        names: of the two.
        title: of the figure.

    Returns:
        A new Figure.

    Raises:
        InputError: ``result`` is no Comparison. OptionError: not two names.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> result = compare("resnet", "wide-resnet")
        >>> fastfi.plot.compare(result, names=["ResNet", "wide"]).savefig("compare.png")
    """
    from fastfi.scoring.comparison import Comparison  # which is not needed for other pictures

    if not isinstance(result, Comparison):
        raise InputError(f"result: expected a Comparison, got {type(result).__name__}")
    if isinstance(names, str) or len(names) != 2:
        raise OptionError(f"names: expected two names, got {names!r}")
    figure: Any = require("matplotlib.figure", "plotting", "plot").Figure(
        figsize=(5.2, 5.4) if result.pairs is not None else (6.4, 4.2), layout="constrained"
    )
    axes = figure.subplots()
    texts = [_plain(name) for name in names]
    fi = [_plain(f"{'FI' if c == 'fi' else c}") for c in result.columns]
    if result.pairs is not None:
        _scatter(axes, result.pairs)
        axes.set_xlabel(f"{fi[0]}, {texts[0]}", fontsize=9)
        axes.set_ylabel(f"{fi[1]}, {texts[1]}", fontsize=9)
    else:
        _distributions(axes, result, texts)
        axes.set_xlabel(" and ".join(dict.fromkeys(fi)), fontsize=9)
        axes.set_ylabel("part of the samples up to here", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    legend = figure.legend(
        loc="outside lower center", ncols=3, frameon=False, fontsize=8, markerscale=1.8,
        title=_edges(result), title_fontsize=8,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    if title is not None:
        figure.suptitle(_plain(title), fontsize=11)
    return figure


def _edges(result: Comparison) -> str | None:
    """What the legend says about samples that logarithmic axes have no place for."""
    if result.pairs is None:
        return None
    shown = [(v > 0) & np.isfinite(v) for v in (result.pairs.a, result.pairs.b)]
    count = int((~(shown[0] & shown[1])).sum())
    return f"on the edges: {count:,} with a zero or infinite value" if count else None


def _plain(text: str) -> str:
    """The same text, in which matplotlib reads no formula between dollar signs."""
    return str(text).replace("$", r"\$")
