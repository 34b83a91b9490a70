"""Beyond the paper: what merging improbable classes saves, and what it changes (ten classes)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.config import NETWORKS, Config
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.section import Result
from fastfi.plot.layers import COLOURS

__all__ = ["DATASETS", "LUMPS", "NAME", "SETTINGS", "changes", "compute", "draw", "passes"]

NAME = "lumping"
SETTINGS: tuple[str, ...] = ("rule_images",)
DATASETS = ("mnist", "cifar10")
LUMPS = (1e-2, 1e-4, 1e-6, 1e-8)
RULES = ("exact", "truncated", "damped")
TITLES = {"exact": "exact", "truncated": "the authors' rule", "damped": "damped"}
MOST = {True: 100, False: 2_000}  # images on a CPU, and otherwise
WARM = 4  # images of a call before the clock starts, in which chunk sizes are measured
NOTHING = 1e-12  # a change that rounding in float64 makes
MARKERS = ("o", "s", "^")


def passes(log_prob: Tensor, y: Tensor, lump: float | None) -> Tensor:
    """Backward passes that each sample needs: [B] int64, from log P [B, K] and labels [B].

    The most probable classes are kept until the rest holds less than ``lump``; the label is kept
    as well; one class alone is not merged. m kept classes and the merged one have m contrasts,
    K classes K - 1.
    """
    classes = log_prob.shape[1]
    if lump is None:
        return torch.full_like(y, classes - 1)
    p, order = log_prob.double().exp().sort(dim=1, descending=True, stable=True)
    rest = p.flip(1).cumsum(1).flip(1)  # [B, K]: of each class and those after it
    kept = (rest >= lump).sum(1).clamp(min=1)
    position = (order == y[:, None]).int().argmax(1)
    kept = kept + (position >= kept).to(kept.dtype)
    return kept.clamp(max=classes - 1)


def changes(fi: NDArray[Any], without: NDArray[Any]) -> dict[str, Any]:
    """How FI [n] with merged classes differs from FI [n] without.

    Returns:
        The median and the largest of |change| / FI, the largest rise and fall by factors - 1 (0
        where there is none), where FI without lumping is positive; and how many are zero in one
        alone.
    """
    some = without > 0
    ratio = fi[some] / without[some] - 1
    return {
        "median": float(np.median(np.abs(ratio))) if len(ratio) else None,
        "largest": float(np.abs(ratio).max()) if len(ratio) else None,
        "rise": float(ratio.max(initial=0.0)) if len(ratio) else None,
        "fall": float(abs(ratio.min(initial=0.0))) if len(ratio) else None,
        "zero_alone": int(((fi > 0) != some).sum()),
    }


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest change, fall and number of zeros over all thresholds."""
    return {
        kind: max((row[kind] for row in rows if row[kind] is not None), default=None)
        for kind in ("largest", "fall", "zero_alone")
    }


def _timed(
    model: nn.Module, x: Tensor, y: Tensor, rule: str, lump: float | None, device: str
) -> tuple[fastfi.Influence, float]:
    options: dict[str, Any] = {"inverse": rule, "lump": lump, "dtype": torch.float64}
    fastfi.influence(model, x[:WARM], y[:WARM], **options)
    _wait(device)
    start = time.perf_counter()
    result = fastfi.influence(model, x, y, full_output=True, **options)
    _wait(device)
    assert isinstance(result, fastfi.Influence)
    return result, time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def count_of(config: Config) -> int:
    """How many images."""
    return min(config.rule_images, MOST[config.device == "cpu"])


def _network(model: nn.Module, x: Tensor, y: Tensor, device: str) -> dict[str, Any]:
    with torch.no_grad():
        log_prob = torch.cat([model(part).double().log_softmax(1).cpu() for part in x.split(500)])
    values: dict[str, Any] = {}
    for rule in RULES:
        rows = []
        without, full_seconds = _timed(model, x, y, rule, None, device)
        base = without.fi.cpu().numpy()
        for lump in (None, *LUMPS):
            found, seconds = (
                (without, full_seconds) if lump is None else _timed(model, x, y, rule, lump, device)
            )
            needed = passes(log_prob, y.cpu(), lump)
            row = {
                "lump": lump,
                "passes": float(needed.double().mean()),
                "seconds": seconds,
                **changes(found.fi.cpu().numpy(), base),
            }
            if rule == "exact":
                rank = found.rank
                assert rank is not None
                row["full_rank"] = float((rank.cpu() == needed).double().mean())
            rows.append(row)
        values[rule] = rows
    return values


def compute(context: Context, dataset: str) -> Result:
    """Cost and change of FI of the input for the true label, on random test images."""
    c = context.config
    images = context.images(dataset, "test")
    generator = torch.Generator().manual_seed(c.seed)
    at = torch.randperm(len(images), generator=generator)[: count_of(c)]
    values: dict[str, Any] = {"images": len(at), "classes": len(context.data(dataset).classes)}
    x, y = images.pixels(at).to(c.device), images.y[at].to(c.device)
    for network in NETWORKS:
        found = _network(context.model(dataset, network), x, y, c.device)
        values[network] = {
            "title": context.title(network),
            "rules": found,
            "worst": {rule: _worst(rows[1:]) for rule, rows in found.items()},
        }
    return Result(values, {"rows": images.rows[at].numpy().astype(np.int32)})


def _axis(axes: Axes, changes: Sequence[float]) -> float:
    """A logarithmic axis for the changes above 0, with a place for 0 below them, which is
    returned."""
    first = math.floor(math.log10(min(changes, default=1e-3)))
    last = math.ceil(math.log10(max(changes, default=1.0)) + 0.1)
    zero = 10.0 ** (first - 0.15 * max(2, last - first))
    step = max(1, math.ceil((last - first) / 7))
    ticks = {zero: "0"} | {10.0**d: f"$10^{{{d}}}$" for d in range(first, last + 1, step)}
    axes.set_yscale("log")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_ylim(zero / 2, 10.0**last)
    return zero


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """The median (filled) and the largest (open) change of FI against the mean number of passes;
    no change stands at a tick of its own, without lines to it."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    grid = figure.subplots(1, len(NETWORKS), sharey=True, squeeze=False)[0]
    shown = [
        row[kind]
        for network in NETWORKS
        for rows in result.values[network]["rules"].values()
        for row in rows
        for kind in ("median", "largest")
        if (row[kind] or 0.0) > NOTHING
    ]
    zero = _axis(grid[0], shown)
    for axes, network in zip(grid, NETWORKS, strict=True):
        for rule, colour, marker in zip(RULES, COLOURS, MARKERS, strict=False):
            rows = [r for r in result.values[network]["rules"][rule] if r["lump"]]
            for kind, face in (("median", colour), ("largest", "white")):
                how: dict[str, Any] = {"color": colour, "marker": marker, "mfc": face, "ms": 6}
                points = [(r["passes"], r[kind]) for r in rows if r[kind] is not None]
                axes.plot(
                    [p for p, _ in points], [v if v > NOTHING else np.nan for _, v in points],
                    ls="-" if kind == "largest" else ":", lw=1, label=f"{TITLES[rule]}, {kind}",
                    **how,
                )  # fmt: skip
                none = [p for p, v in points if v <= NOTHING]
                axes.plot(none, [zero] * len(none), ls="", **how)
        axes.set_xlim(0, result.values["classes"] - 0.5)
        axes.set_xlabel("backward passes per image, mean")
        axes.set_title(result.values[network]["title"], fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    grid[0].set_ylabel("relative change of FI")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return {"cost": figure}
