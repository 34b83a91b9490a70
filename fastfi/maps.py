"""``influence_map``: FI of every window of pixels, at every scale (the paper's Setup 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_channels, check_scales, check_spatial
from fastfi.influence import check_dtype, finish
from fastfi.inverse import Damped, Exact, Inverse, as_inverse, damping
from fastfi.objectives import Objective
from fastfi.rows import InputRows, gram_of
from fastfi.sweep import Request, sweep

__all__ = ["InfluenceMap", "influence_map"]


class InfluenceMap(NamedTuple):
    """What :func:`influence_map` returns with ``full_output=True``.

    Attributes:
        fi: the maps, [B, S, C, *spatial], or [B, S, *spatial] with ``channels="joint"`` or "mean".
        rank: int64, the rank of each window's contrasts (Exact), or the number of its singular
            values kept (Truncated), shaped like ``fi`` (for "mean", as for "separate"); None for
            Damped.
        label: [B] int64, the class whose objective was measured.
        log_prob: [B] float64, log P of that class.
        scales: the windows' sizes in pixels, along fi's second dimension.
    """

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    scales: tuple[int, ...]


class _Part(NamedTuple):
    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    dtype: torch.dtype


def _unbounded(rows: Tensor, data: InputRows, tau: Tensor, scales: Sequence[int],
               channels: str) -> Tensor | None:  # fmt: skip
    """Windows whose FI is infinite: tau vanishes beside a gradient only where the P of every other
    class underflows, and 1 / P_y with it. None, as a rule; else bool, shaped like the maps."""
    if data.label is None or not bool(((tau == 0) & (data.label > 0)).any()):
        return None
    at = (data.label - 1).clamp(min=0)
    own = rows[torch.arange(len(rows), device=rows.device), at]  # [B, C, *spatial]
    alive = (own != 0) & ((tau == 0) & (data.label > 0)).view(-1, *[1] * (own.dim() - 1))
    pooled = alive.double().reshape(*own.shape[:2], *[1] * (5 - own.dim()), *own.shape[2:])
    sizes = pooled.shape[2:]
    maps = []
    for scale in scales:
        half = [min(scale // 2, n - 1) for n in sizes]
        width = [2 * h + 1 for h in half]
        padded = torch.nn.functional.pad(pooled, [h for n in reversed(half) for h in (n, n)])
        maps.append(torch.nn.functional.max_pool3d(padded, width, stride=1).reshape(own.shape))
    found = torch.stack(maps, 1) > 0  # [B, S, C, *spatial]
    return found if channels == "separate" else found.any(2)


def _solve(
    data: InputRows,
    spatial: Sequence[int],
    scales: tuple[int, ...],
    channels: str,
    inverse: Inverse,
    with_rank: bool,
) -> tuple[Tensor, Tensor | None]:
    """FI and rank of every window, from the rows [B, n, C * pixels] of one chunk."""
    rows = data.rows.unflatten(2, spatial)  # [B, n, C, *spatial]
    q = data.classes
    gram = gram_of(data)  # raises where rows are not finite, whatever the inverse
    tau, parameter = None, 0.0
    if isinstance(inverse, Damped):
        tau, name = damping(inverse, gram, q.log_prob), "damped"
    elif isinstance(inverse, Exact):
        parameter, name = data.rtol if inverse.rtol is None else inverse.rtol, "exact"
    else:
        parameter, name = inverse.eps, "truncated"
    fi, rank = torch.ops.fastfi.window_influence(
        rows, q.log_prob, data.label, data.grad, scales, channels, name, parameter, tau, with_rank
    )
    if tau is not None:
        unbounded = _unbounded(rows, data, tau, scales, channels)
        if unbounded is not None:
            fi = fi.masked_fill(unbounded, torch.inf)
    return fi, None if tau is not None or not with_rank else rank


def influence_map(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    scales: Sequence[int] = (1, 3, 5, 7),
    channels: str = "separate",
    inverse: Inverse | str = "damped",
    objective: str | Objective = "cross_entropy",
    outputs: str = "logits",
    lump: float | None = None,
    full_output: bool = False,
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | InfluenceMap:
    """FI of the k x k square around every pixel, for each k in ``scales``: Setup 4 of Shu and Zhu,
    "Sensitivity Analysis of Deep Neural Networks", AAAI 2019 (arXiv 1901.07152).

    Squares are clipped at the image's border. The rows of the input's Jacobian are computed once;
    every window at every scale is solved from them.

    Which inverse shows what:

    * ``"damped"``, the default, adds ``tau = alpha * trace(G)`` with G the metric of the whole
      input: FI grows with the window and with what its pixels do to the prediction, so the map
      shows where the network is vulnerable, for confident predictions too. Rescaling all of x
      changes nothing.
    * ``"exact"`` is the definition. It is invariant under any change of a window's coordinates, so
      a pixel that hardly matters counts as much as one that does: single pixels give speckle, and
      every window with at least K - 1 independent coordinates gives the same number,
      (1 - P_y) / P_y for cross-entropy. From scale 3 or 5 on its map is constant but for the
      border. Use it to compare with the theory, not to look at.
    * ``"truncated"`` is the rule that made the paper's figures. Its cut is absolute: it depends on
      the pixels' scale (the authors': 0 to 255), and confident predictions give zero everywhere.

    Args:
        model: as in :func:`influence`.
        x: floating-point images [B, C, H, W], signals [B, C, T] or volumes [B, C, D, H, W].
        y: labels [B], or None for the predicted class (as in the paper's Setup 4).
        scales: distinct odd window sizes in pixels. Every dimension has the same size.
        channels: ``"separate"``: perturb one colour channel at a time; ``"joint"``: all channels
            of the window together; ``"mean"``: the mean of the separate FI over the channels.
        inverse, objective, outputs, lump, memory_budget, dtype: as in :func:`influence`, but the
            default inverse is Damped.
        full_output: return :class:`InfluenceMap` instead of the maps alone.

    Returns:
        Maps [B, S, C, *spatial], or [B, S, *spatial] for joint and mean, on x's device; not
        negative; inf only where P_y underflows float64. Or :class:`InfluenceMap`.

    Raises:
        InputError: also for flat inputs [B, p], which have no neighbourhoods
            (:func:`region_influence` takes them); and the exceptions of :func:`influence`.

    Example:
        >>> maps = fastfi.influence_map(model, x, scales=(1, 5))  # x [B, C, H, W]
        >>> maps.shape
        torch.Size([8, 2, 3, 32, 32])
    """
    check_dtype(dtype)
    rule = as_inverse(inverse)
    scales = check_scales(scales)
    check_channels(channels)
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, lump=lump, memory_budget=memory_budget
    )
    check_spatial(x)
    with_rank = full_output and not isinstance(rule, Damped)

    def work(data: InputRows, at: Tensor) -> _Part:
        fi, rank = _solve(data, x.shape[1:], scales, channels, rule, with_rank)
        c = data.classes
        label = c.predicted if q.y is None else q.y[at]
        log_prob = c.full_log_prob.gather(1, label[:, None]).squeeze(1)
        return _Part(finish(fi, dtype, data.dtype), rank, label, log_prob, data.dtype)

    numbers = len(scales) * x[0].numel() * (3 if with_rank else 2)
    result = sweep(q, work, extra_bytes=8 * numbers)
    if not full_output:
        return result.fi
    return InfluenceMap(result.fi, result.rank, result.label, result.log_prob, scales)
