"""The plots of the page, made by plotly: their traces, axes and colours.

Coordinates of the Manhattan plot depend on what the reader chooses and come from the page's
columns, so its traces are empty here: for each set of scores one trace for each colour of the
classes, then one for each colour of the misclassified samples. One colour for a trace, rather than
one for each point, is what makes 60,000 points fluid. The distribution and the layers have theirs
for every column.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfi._extras import require
from fastfi.report._sheet import Measure, Sheet
from fastfi.report._theme import THEMES, Theme

__all__ = ["STYLES", "distributions", "figures", "limits", "plain", "profiles", "styles"]

BINS = 60  # of the histogram
STEPS = 400  # points of an empirical distribution
FARTHEST = 300.0  # |log10 FI| that is drawn, beyond which plotly's arithmetic overflows
# What plotly's restyle changes with the theme.
STYLES = ("marker.color", "marker.line.color", "line.color", "fillcolor")
_HEIGHTS = {1: 460, 2: 760}  # pixels, for one and two sets of scores
_FI = "first-order influence FI"


def plain(text: str) -> str:
    """Text as plotly shows it: it would take ``<b>`` and ``&lt;`` for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _layout(**more: Any) -> dict[str, Any]:
    return {
        "template": "none",
        "autosize": True,
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 66, "r": 12, "t": 34, "b": 52},
        "hovermode": "closest",
        **more,
    }


def _log_axis(title: str) -> dict[str, Any]:
    return {"type": "log", "title": {"text": title}, "exponentformat": "power", "nticks": 8,
            "zeroline": False, "automargin": False, "ticklabeloverflow": "allow"}  # fmt: skip


def _manhattan(names: Sequence[str], theme: Theme, points: int, long: bool) -> Any:
    """``long``: names of classes may need room of their own, which takes plotly time to find.

    Misclassified samples are larger and ringed, not of another shape: for anything but circles,
    plotly first draws a field of distances, which takes 0.4 s.
    """
    go = require("plotly.graph_objects", "writing reports", "report")
    size = 6 if points < 5_000 else 4 if points < 100_000 else 3
    larger = size + (5 if points < 5_000 else 3)
    traces, axes = [], {}
    for p, name in enumerate(names):
        n = "" if p == 0 else str(p + 1)
        for wrong in (False, True):
            for colour in theme.palette:
                how = (
                    {"size": larger, "opacity": 1.0, "line": {"width": 1.5, "color": theme.ink}}
                    if wrong
                    else {"size": size, "opacity": 0.75, "line": {"width": 0, "color": colour}}
                )  # fmt: skip
                traces.append(
                    go.Scattergl(
                        x=[], y=[], mode="markers", marker={"color": colour, **how},
                        xaxis=f"x{n}", yaxis=f"y{n}", showlegend=False,
                        hovertemplate="%{text}<extra></extra>",
                        name=f"{plain(name)}, {'mis' if wrong else 'correctly '}classified",
                    )
                )  # fmt: skip
        high = 1 - p * 0.54 if len(names) > 1 else 1.0
        low = high - 0.4 if len(names) > 1 else 0.0
        axes[f"yaxis{n}"] = {**_log_axis(_FI), "domain": [low, high],
                             **({"matches": "y"} if p else {})}  # fmt: skip
        axes[f"xaxis{n}"] = {"anchor": f"y{n}", "showgrid": False, "zeroline": False,
                             "title": {"text": ""}, "automargin": long,
                             "ticklabeloverflow": "allow"}  # fmt: skip
    layout = _layout(height=_HEIGHTS[len(names)], dragmode="zoom", showlegend=False, **axes)
    return go.Figure(traces, layout)


def _histogram(names: Sequence[str], theme: Theme) -> Any:
    go = require("plotly.graph_objects", "writing reports", "report")
    traces = [
        go.Scatter(
            x=[], y=[], mode="lines", name=plain(name), fill="tozeroy",
            line={"shape": "hv", "width": 2, "color": colour, "dash": dash},
            fillcolor=f"rgba{(*_rgb(colour), 0.18)}",
            hovertemplate="FI from %{x:.3g}: %{y:.2%}",
        )
        for name, colour, dash in zip(names, theme.parts, ("solid", "dot"), strict=False)
    ]  # fmt: skip
    layout = _layout(
        height=340, xaxis=_log_axis(_FI), showlegend=len(names) > 1,
        yaxis={"title": {"text": "share of samples"}, "tickformat": ".0%", "rangemode": "tozero",
               "zeroline": False, "automargin": False, "ticklabeloverflow": "allow"},
        legend={"orientation": "h", "y": 1.12},
    )  # fmt: skip
    return go.Figure(traces, layout)


def _ecdf(names: Sequence[str], theme: Theme) -> Any:
    figure = _histogram(names, theme)
    figure.update_traces(fill=None, hovertemplate="%{y:.1%} have FI up to %{x:.3g}")
    figure.update_layout(
        yaxis={"title": {"text": "share with at most this FI"}, "range": [0, 1.02]}
    )
    return figure


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _layers(names: Sequence[str], blocks: Sequence[str], theme: Theme) -> Any:
    """For each set of scores a band (lower quartile, upper quartile) and the median; then the
    chosen samples, one for each set."""
    go = require("plotly.graph_objects", "writing reports", "report")
    at = np.arange(1, len(blocks) + 1, dtype=np.int16)
    named = [plain(block) for block in blocks]
    texts = {"x": at, "y": [], "text": named}
    traces = []
    for name, colour in zip(names, theme.parts, strict=False):
        how: dict[str, Any] = {"line": {"width": 0, "color": colour}, "mode": "lines"}
        soft = f"rgba{(*_rgb(colour), 0.2)}"
        skipped = {"showlegend": False, "hoverinfo": "skip"}
        traces.append(go.Scatter(**texts, **how, **skipped))
        traces.append(go.Scatter(**texts, **how, **skipped, fill="tonexty", fillcolor=soft))
        traces.append(
            go.Scatter(
                **texts, mode="lines+markers", marker={"size": 7, "color": colour},
                line={"width": 2, "color": colour}, name=f"{plain(name)}: median, quartiles",
                hovertemplate="%{text}<br>median FI %{y:.4g}<extra></extra>",
            )
        )  # fmt: skip
    for name, dash in zip(names, ("dash", "dot"), strict=False):
        traces.append(
            go.Scatter(
                **texts, mode="lines+markers", name=f"{plain(name)}: chosen sample", visible=False,
                marker={"size": 8, "symbol": "diamond", "color": theme.ink},
                line={"width": 2, "dash": dash, "color": theme.ink},
                hovertemplate="%{text}<br>FI %{y:.4g}<extra></extra>",
            )
        )  # fmt: skip
    few = len(blocks) <= 40 and max(map(len, blocks)) <= 24
    ticks = {"tickvals": at, "ticktext": named, "tickangle": -60} if few else {"nticks": 10}
    layout = _layout(
        height=420, yaxis=_log_axis(_FI), showlegend=True, legend={"orientation": "h", "y": 1.12},
        xaxis={"title": {"text": "layer"}, "showgrid": False, "zeroline": False,
               "automargin": True, "range": [0.5, len(blocks) + 0.5], **ticks},
    )  # fmt: skip
    return go.Figure(traces, layout)


def _made(
    sheets: Sequence[Sheet], blocks: Sequence[str], theme: Theme, long: bool
) -> dict[str, Any]:
    names = [sheet.name for sheet in sheets]
    made = {
        "manhattan": _manhattan(names, theme, max(map(len, sheets)), long),
        "histogram": _histogram(names, theme),
        "ecdf": _ecdf(names, theme),
    }
    if len(blocks) > 1:
        made["layers"] = _layers(names, blocks, theme)
    return made


def figures(sheets: Sequence[Sheet], blocks: Sequence[str], long: bool) -> dict[str, Any]:
    """The plots as JSON objects, in the light theme, by the id of their place on the page.

    Args:
        long: whether names of classes are longer than a few characters.
    """
    made = _made(sheets, blocks, THEMES["light"], long)
    return {name: json.loads(figure.to_json()) for name, figure in made.items()}


def styles(sheets: Sequence[Sheet], blocks: Sequence[str]) -> dict[str, Any]:
    """For each theme: the layout's keys; for each plot what restyle takes; colours of marks."""
    found = {}
    for key, theme in THEMES.items():
        made = _made(sheets, blocks, theme, long=False)
        found[key] = {
            "layout": theme.layout(),
            "ink": theme.ink,
            "muted": theme.muted,
            "panel": theme.panel,
            "traces": {
                name: {style: [_find(trace, style) for trace in figure.data] for style in STYLES}
                for name, figure in made.items()
            },
        }
    return found


def _find(trace: Any, style: str) -> Any:
    try:
        return trace[style]
    except (KeyError, ValueError):  # this type of trace has no such property
        return None


def _logs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """log10 of the finite, positive values, as they are drawn."""
    return np.clip(np.log10(values[(values > 0) & np.isfinite(values)]), -FARTHEST, FARTHEST)


def limits(sheets: Sequence[Sheet], measure: Measure) -> dict[str, Any]:
    """Where the axis of FI ends, and where 0 and infinity are drawn: log10; None where no value is
    0 or infinite. The same for all sets of scores."""
    every = np.concatenate([sheet.columns[measure.column] for sheet in sheets])
    logs = _logs(every)
    low, high = (float(logs.min()), float(logs.max())) if len(logs) else (-1.0, 1.0)
    pad = min(max(0.06 * (high - low), 0.3), 2.0)
    zeros, infinite = int((every == 0).sum()), int(np.isposinf(every).sum())
    return {
        "low": low - (3.0 if zeros else 1.0) * pad,
        "high": high + (3.0 if infinite else 1.0) * pad,
        "zero": low - 2.0 * pad if zeros else None,
        "infinity": high + 2.0 * pad if infinite else None,
    }


def distributions(sheets: Sequence[Sheet], measure: Measure) -> dict[str, Any]:
    """Coordinates of the histogram and of the empirical distribution, one array for each set of
    scores: shares of all samples that have a score, of which 0 and infinity have no place on the
    axis."""
    columns = [sheet.columns[measure.column] for sheet in sheets]
    scored = [column[~np.isnan(column)] for column in columns]
    logs = [_logs(column) for column in scored]
    every = np.concatenate(logs)
    found: dict[str, Any] = {"histogram": {"x": [], "y": []}, "ecdf": {"x": [], "y": []}}
    if not len(every):
        return found
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low - 1e-9, high + 1e-9, BINS + 1) if high > low else [low - 0.1, low + 0.1]
    for values, all_values in zip(logs, scored, strict=True):
        n = max(len(all_values), 1)
        counts = np.histogram(values, edges)[0] / n
        found["histogram"]["x"].append((10.0 ** np.asarray(edges)).astype(np.float64))
        found["histogram"]["y"].append(np.append(counts, 0.0).astype(np.float32))
        ordered = np.sort(values)
        at = np.unique(np.linspace(0, len(ordered) - 1, min(STEPS, len(ordered))).astype(np.int64))
        below = int((all_values == 0).sum())
        found["ecdf"]["x"].append(10.0 ** ordered[at])
        found["ecdf"]["y"].append(((below + at + 1) / n).astype(np.float32))
    return found


def profiles(
    sheets: Sequence[Sheet], measures: Sequence[Measure], blocks: Sequence[str], variant: str
) -> list[Any]:
    """y of the layers' plot: for each set of scores the lower quartile, the upper quartile and the
    median over its samples, [L] each; NaN where a logarithmic axis has no place."""
    columns = {m.block: m.column for m in measures if m.variant == variant}
    found = []
    for sheet in sheets:
        rows = []
        for block in blocks:
            values = sheet.columns[columns[block]] if block in columns else np.empty(0)
            values = values[~np.isnan(values)]
            # "inverted_cdf" takes values that are there: no difference of infinite ones
            q = (0.25, 0.75, 0.5)
            rows.append(
                np.quantile(values, q, method="inverted_cdf") if len(values) else [np.nan] * 3
            )
        quartiles = np.array(rows, np.float64).T  # [3, L]
        drawn = np.clip(quartiles, 10.0**-FARTHEST, 10.0**FARTHEST)
        found += list(np.where((quartiles > 0) & np.isfinite(quartiles), drawn, np.nan))
    return found
