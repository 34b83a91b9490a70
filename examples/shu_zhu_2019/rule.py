"""Beyond the paper: how far the authors' rule is from the definition, image by image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.section import Result
from fastfi.plot.layers import COLOURS

__all__ = [
    "BANDS",
    "DATASETS",
    "NAME",
    "SETTINGS",
    "UnitPixels",
    "band_values",
    "ceiling",
    "compute",
    "draw",
]

NAME = "rule"
SETTINGS: tuple[str, ...] = ("rule_images",)
DATASETS = ("mnist", "cifar10")
BANDS = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)  # of P of the true label; the last one includes 1
SCALES = ("255", "1")  # pixels 0..255, the networks' own, and 0..1
QUANTILES = (0.05, 0.5, 0.95)
SPLITS = ("train", "test")
RANKS = ("rank", *(f"kept_{scale}" for scale in SCALES))  # stored as integers
BATCH = 500
EPS = fastfi.Truncated().eps
SMALLEST = 3  # images that a rank correlation needs
LOWEST = 1e-12  # of the axes: smaller FI stands there


class UnitPixels(nn.Module):
    """The same network for pixels 0..1: FI is invariant under that, the authors' cut is not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(255 * x)


def ceiling(eps: float = EPS) -> float:
    """What FI of cross-entropy cannot exceed under the authors' rule, whatever the network.

    It is ((sqrt(P) + eps) / (P + eps))^2 times the sum of the squares of one coordinate of
    orthonormal vectors, at most 1; the factor is largest at sqrt(P) = sqrt(eps + eps^2) - eps."""
    root = math.sqrt(eps + eps**2) - eps
    return 1 / (2 * root) ** 2


def _scores(
    model: nn.Module, unit: nn.Module, x: Tensor, y: Tensor
) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """Of one batch: log P of the label, exact FI and its rank, FI and rank under the authors' rule
    at both scales; and exact FI at the other scale."""
    options: dict[str, Any] = {"full_output": True, "dtype": torch.float64}
    exact = fastfi.influence(model, x, y, **options)
    found = {"log_prob": exact.log_prob, "exact": exact.fi, "rank": exact.rank}
    for scale, network, pixels in ((SCALES[0], model, x), (SCALES[1], unit, x / 255)):
        rule = fastfi.influence(network, pixels, y, inverse="truncated", **options)
        found |= {f"rule_{scale}": rule.fi, f"kept_{scale}": rule.rank}
    again = fastfi.influence(unit, x / 255, y, dtype=torch.float64)
    return {name: value.cpu().numpy() for name, value in found.items()}, again.cpu().numpy()


def _quantiles(values: NDArray[Any]) -> list[float] | None:
    return [float(q) for q in np.quantile(values, QUANTILES)] if len(values) else None


def _correlation(statistic: Any, a: NDArray[Any], b: NDArray[Any]) -> float | None:
    """None where it is not defined: too few images, or all values equal."""
    if len(a) < SMALLEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    value = float(statistic(a, b).statistic)
    return value if math.isfinite(value) else None


def band_values(exact: NDArray[Any], rule: NDArray[Any], kept: NDArray[Any]) -> dict[str, Any]:
    """The authors' rule against exact FI on the images of one band.

    Args:
        exact, rule: [n] FI.
        kept: [n], singular values that the rule keeps.

    Returns:
        Number of images, share where the rule gives 0, quantiles of rule / exact where it does not,
        rank correlations (zeros are ties), mean number of singular values kept, largest FI of both.
    """
    some = (rule > 0) & (exact > 0)
    return {
        "images": len(exact),
        "zero": float((rule == 0).mean()) if len(exact) else None,
        "ratio": _quantiles(rule[some] / exact[some]),
        "spearman": _correlation(spearmanr, exact, rule),
        "kendall": _correlation(kendalltau, exact, rule),
        "kept": float(kept.mean()) if len(exact) else None,
        "largest": [float(exact.max()), float(rule.max())] if len(exact) else None,
    }


def _bands(p: NDArray[Any]) -> list[tuple[str, NDArray[np.bool_]]]:
    """The bands' names, and which images they hold; all of them first."""
    bands = [("all", np.ones(len(p), dtype=bool))]
    for low, high in itertools.pairwise(BANDS):
        last = high == BANDS[-1]
        name = f"P < {high:g}" if low == 0 else f"P >= {low:g}" if last else f"{low:g} to {high:g}"
        bands.append((name, (p >= low) & ((p < high) | last)))
    return bands


def _summary(scores: dict[str, NDArray[Any]], again: NDArray[Any], classes: int) -> dict[str, Any]:
    p, exact = np.exp(scores["log_prob"]), scores["exact"]
    rules = {
        scale: [
            {"band": name, **band_values(exact[at], rule[at], kept[at])} for name, at in _bands(p)
        ]
        for scale, rule, kept in (
            (scale, scores[f"rule_{scale}"], scores[f"kept_{scale}"]) for scale in SCALES
        )
    }
    positive = exact > 0
    change = np.abs(again[positive] / exact[positive] - 1)
    return {
        "images": len(p),
        "full_rank": float((scores["rank"] == classes - 1).mean()),
        "exact_change": float(change.max()) if len(change) else None,
        "rules": rules,
    }


def compute(context: Context, dataset: str) -> Result:
    """Exact FI against the authors' rule for the true label, at two scales of the pixels."""
    c, data = context.config, context.data(dataset)
    values: dict[str, Any] = {"quantiles": list(QUANTILES), "scales": list(SCALES)}
    values["ceiling"] = ceiling()
    arrays: dict[str, NDArray[Any]] = {}
    for network in NETWORKS:
        model = context.model(dataset, network)
        unit = UnitPixels(model).eval()
        values[network] = {"title": context.title(network)}
        for split in SPLITS:
            images = context.images(dataset, split)
            generator = torch.Generator().manual_seed(c.seed)
            at = torch.randperm(len(images), generator=generator)[: c.rule_images].sort().values
            parts = [
                _scores(model, unit, images.pixels(some).to(c.device), images.y[some].to(c.device))
                for some in at.split(BATCH)
            ]
            scores = {k: np.concatenate([part[k] for part, _ in parts]) for k in parts[0][0]}
            again = np.concatenate([other for _, other in parts])
            values[network][split] = _summary(scores, again, len(data.classes))
            arrays |= {
                f"{network}_{split}_{k}": v.astype(np.uint8 if k in RANKS else np.float32)
                for k, v in scores.items()
            }
            arrays[f"{network}_{split}_row"] = images.rows[at].numpy().astype(np.int32)
    return Result(values, arrays)


def _panel(axes: Axes, result: Result, network: str, scale: str, floor: float, top: float) -> None:
    """Exact FI against the rule's, both logarithmic; zeros on the floor, with a mark of theirs."""
    for split, colour in zip(SPLITS, COLOURS, strict=False):
        exact = np.maximum(result.arrays[f"{network}_{split}_exact"], floor)
        rule = result.arrays[f"{network}_{split}_rule_{scale}"]
        zero = rule == 0
        axes.scatter(
            exact[~zero], np.maximum(rule[~zero], floor), s=9, color=colour, lw=0, alpha=0.6,
            label=f"{split} images", rasterized=True,
        )  # fmt: skip
        shift = 0.45 if split == SPLITS[0] else 0.18  # rows of their own below the axis' values
        if not zero.any():
            continue
        axes.scatter(
            exact[zero], np.full(zero.sum(), floor * 10.0**-shift), s=14, marker="|",
            color=colour, lw=0.7, alpha=0.6, label=f"{split} images, the rule gives 0",
            rasterized=True,
        )  # fmt: skip
    axes.plot([floor, top], [floor, top], color="0.25", lw=0.8, ls=(0, (5, 3)), label="equal")
    axes.set(xscale="log", yscale="log", xlim=(floor, top), ylim=(floor * 10.0**-0.8, top))
    axes.set_title(f"{result.values[network]['title']}, pixels 0..{scale}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", lw=0.6)
    axes.set_axisbelow(True)
    axes.minorticks_off()


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """Scatter plots by network and scale of the pixels."""
    names = [
        f"{network}_{split}_{kind}"
        for network in NETWORKS
        for split in SPLITS
        for kind in ("exact", *(f"rule_{scale}" for scale in SCALES))
    ]
    positive = np.concatenate([v[v > 0] for v in (result.arrays[name] for name in names)])
    low = max(float(positive.min(initial=1.0)), LOWEST)
    floor = 10.0 ** math.floor(math.log10(low))
    top = 10.0 ** math.ceil(math.log10(max(float(positive.max(initial=1.0)), 1.0)) + 0.1)
    figure = Figure(figsize=(8.6, 8.2), layout="constrained")
    grid = figure.subplots(len(NETWORKS), len(SCALES), sharex=True, sharey=True)
    for row, network in zip(grid, NETWORKS, strict=True):
        for axes, scale in zip(row, SCALES, strict=True):
            _panel(axes, result, network, scale, floor, top)
        row[0].set_ylabel("FI under the authors' rule")
    for axes in grid[-1]:
        axes.set_xlabel("exact FI")
    marks = {
        label: handle
        for axes in grid.ravel()
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        marks.values(), marks.keys(), loc="outside lower center", ncols=3, frameon=False,
        fontsize=9, markerscale=2,
    )  # fmt: skip
    return {"scatter": figure}
