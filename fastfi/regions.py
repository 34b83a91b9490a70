"""``region_influence``: FI of every region of a labelled image (superpixels, patches, organs)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_regions
from fastfi.errors import InputError
from fastfi.influence import check_dtype, finish
from fastfi.inverse import Damped, Inverse, as_inverse, damping, solve
from fastfi.objectives import Objective
from fastfi.rows import InputRows, gram_of
from fastfi.sweep import Request, sweep

__all__ = ["RegionInfluence", "region_influence"]

_BLOCK_BYTES = 64 << 20  # of the Gram matrices that are held at once, or a quarter of the budget


class RegionInfluence(NamedTuple):
    """What :func:`region_influence` returns with ``full_output=True``.

    Attributes:
        fi: [B, n_regions].
        rank: [B, n_regions] int64, as in :class:`Influence`; None for Damped.
        label: [B] int64, the class whose objective was measured.
        log_prob: [B] float64, log P of that class.
    """

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor


def _sorted(regions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The pixels' order by region, background first, and each region's bounds in it.

    Args:
        regions: [M, P] int64, -1 to count - 1.

    Returns:
        order [M, P]; offsets [M, count + 1].
    """
    order = regions.argsort(dim=1, stable=True)
    sizes = torch.zeros(len(regions), count + 1, dtype=torch.int64, device=regions.device)
    sizes.scatter_add_(1, regions + 1, torch.ones_like(regions))
    return order, sizes.cumsum(1)


def _by_region(rows: Tensor, channels: int, order: Tensor) -> Tensor:
    """Rows [B, n, C * P] with the columns of a pixel side by side, pixels in ``order`` [B or 1, P]:
    [B, n, P * C]."""
    by_pixel = rows.unflatten(2, (channels, -1)).transpose(2, 3)  # [B, n, P, C]
    at = order[:, None, :, None].expand(len(rows), by_pixel.shape[1], -1, channels)
    return by_pixel.gather(2, at).flatten(2)


def region_influence(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    regions: Tensor | None = None,
    *,
    inverse: Inverse | str = "damped",
    objective: str | Objective = "cross_entropy",
    outputs: str = "logits",
    lump: float | None = None,
    full_output: bool = False,
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | RegionInfluence:
    """FI of perturbing all pixels of a region, in all channels, for every region of each sample.

    The regions may be superpixels, the patches of a vision transformer, organs: any integer map.
    What the three inverses show is said in :func:`influence_map`; Damped is the default here too,
    relative to the metric of the whole input.

    Args:
        model, x, y: as in :func:`influence`; x is [B, C, *spatial], or flat, [B, p].
        regions: integers, x.shape[2:] (for flat inputs [p]) for all samples alike, or one map for
            each, [B, ...]. Region r holds the pixels with value r; -1 is background, in no region.
            Regions need not be connected.
        inverse, objective, outputs, lump, memory_budget, dtype: as in :func:`influence_map`.
        full_output: return :class:`RegionInfluence` instead of FI alone.

    Returns:
        FI [B, n_regions], n_regions = the largest value + 1; 0 for a region without pixels. Or
        :class:`RegionInfluence`.

    Raises:
        InputError: ``regions`` has another shape, no region, values below -1, or values that are
            not below the number of pixels; and the exceptions of :func:`influence`.

    Example:
        >>> patches = torch.arange(14 * 14).reshape(14, 14)  # of 16 x 16 pixels
        >>> patches = patches.repeat_interleave(16, 0).repeat_interleave(16, 1)
        >>> fastfi.region_influence(vit, x, None, patches).shape  # x [B, 3, 224, 224]
        torch.Size([8, 196])
    """
    check_dtype(dtype)
    rule = as_inverse(inverse)
    if regions is None:
        raise InputError("regions: expected integers, as the fourth argument (y=None for the "
                         "predicted class), got None")  # fmt: skip
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, lump=lump, memory_budget=memory_budget
    )
    maps, count = check_regions(regions, x)  # [B or 1, P]
    channels = x.shape[1] if x.dim() > 2 else 1
    order, bounds = _sorted(maps, count)
    bounds = bounds * channels
    block = _BLOCK_BYTES if memory_budget is None else min(_BLOCK_BYTES, memory_budget // 4)

    def work(data: InputRows, at: Tensor) -> RegionInfluence:
        c = data.classes
        mine = at if len(maps) > 1 else torch.zeros(1, dtype=torch.int64, device=at.device)
        rows = _by_region(data.rows, channels, order[mine])
        whole = gram_of(data)  # raises where rows are not finite
        tau = damping(rule, whole, c.log_prob) if isinstance(rule, Damped) else None
        size = max(1, block // (8 * rows.shape[0] * rows.shape[1] ** 2))
        fis, ranks = [], []
        for first in range(0, count, size):
            part = bounds[mine, first : min(first + size, count) + 1]
            gram = torch.ops.fastfi.segment_gram(rows, part)  # [b, g, n, n]
            fi, rank = solve(rule, gram, c.log_prob, data.label, data.grad, data.rtol, tau)
            fis.append(fi)
            if rank is not None and full_output:
                ranks.append(rank)
        label = c.predicted if q.y is None else q.y[at]
        log_prob = c.full_log_prob.gather(1, label[:, None]).squeeze(1)
        fi = finish(torch.cat(fis, 1), dtype, data.dtype)
        return RegionInfluence(fi, torch.cat(ranks, 1) if ranks else None, label, log_prob)

    result = sweep(q, work, extra_bytes=8 * count * (2 if full_output else 1), row_copies=1)
    return result if full_output else result.fi
