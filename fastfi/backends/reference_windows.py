"""The operators on windows and segments in plain torch: the definition, pixel by pixel.

Each window's coordinates are gathered, its Gram matrix formed and solved by
:mod:`fastfi.backends.reference`. Windows are taken in blocks that bound the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi._ops import check_segments, check_windows
from fastfi.backends.reference import solve_damped, solve_exact, solve_truncated

__all__ = ["segment_gram", "window_columns", "window_influence"]

_BLOCK = 1 << 22  # numbers of a block's gathered rows and Gram matrices


def segment_gram(rows: Tensor, offsets: Tensor) -> Tensor:
    """Gram matrices of runs of columns: rows [B, R, p] -> [B, G, R, R] float64.

    Args:
        offsets: int64 [B, G + 1], or [1, G + 1] for all samples; segment g holds the columns from
            offsets[b, g] up to offsets[b, g + 1].
    """
    check_segments(rows, offsets)
    batch, n, _ = rows.shape
    groups = offsets.shape[1] - 1
    out = rows.new_zeros((batch, groups, n, n), dtype=torch.float64)
    samples = [slice(None)] if offsets.shape[0] == 1 else [slice(b, b + 1) for b in range(batch)]
    for bounds, at in zip(offsets.tolist(), samples, strict=False):
        for g in range(groups):
            part = rows[at, :, bounds[g] : bounds[g + 1]].double()
            out[at, g] = part @ part.mT
    return out


def window_columns(spatial: Sequence[int], scale: int) -> Tensor:
    """The pixels of every window of one scale: [P, w] flat positions, P for "outside the image".

    Args:
        spatial: the image's size, with P pixels.
        scale: pixels along each side, odd.
    """
    pixels = 1
    inside, flat = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    for size in spatial:
        radius = min(scale // 2, size - 1)
        at = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)  # [size, k]
        ok = (at >= 0) & (at < size)
        shape = (flat.shape[0] * size, -1)
        flat = (flat[:, None, :, None] * size + at[None, :, None]).reshape(shape)
        inside = (inside[:, None, :, None] & ok[None, :, None]).reshape(shape)
        pixels *= size
    return torch.where(inside, flat, pixels)


def window_influence(
    rows: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    scales: Sequence[int],
    channels: str,
    inverse: str,
    parameter: float,
    tau: Tensor | None,
    with_rank: bool,
) -> tuple[Tensor, Tensor]:
    """FI of every window of pixels (Shu and Zhu 2019, Setup 4), and its rank.

    Args:
        rows: [B, n, C, *spatial], 1 to 3 spatial dimensions; n = K - 1, or K where the last is h.
        log_prob, label, grad: as the solves of :mod:`fastfi._ops`.
        scales: odd sizes of the windows, in pixels.
        channels: "separate", "joint" or "mean".
        inverse: "exact", with ``parameter`` its rtol; "truncated", with its eps; or "damped".
        tau: [B] float64, for "damped".
        with_rank: whether the rank is wanted.

    Returns:
        fi: float64 [B, S, C, *spatial], or [B, S, *spatial] for joint and mean. rank: int64 [B, S,
        C, *spatial] (also for mean), or [B, S, *spatial] for joint; [0] if not wanted, or damped.
    """
    check_windows(rows, log_prob, label, grad, scales, channels, inverse, tau)
    batch, n, colours, *spatial = rows.shape
    groups = 1 if channels == "joint" else colours
    padded = torch.nn.functional.pad(rows.double().flatten(3), (0, 1))  # [B, n, C, P + 1]
    fis, ranks = [], []
    for scale in scales:
        columns = window_columns(spatial, scale).to(rows.device)  # [P, w]
        width = columns.shape[1]
        numbers = batch * colours * n * width + batch * groups * n * n  # for each window
        for part in columns.split(max(1, _BLOCK // max(1, numbers))):
            block = padded[..., part]  # [B, n, C, M, w]
            block = block.permute(0, 2, 3, 1, 4)  # [B, C, M, n, w]
            if channels == "joint":
                block = block.permute(0, 2, 3, 1, 4).flatten(3)[:, None]  # [B, 1, M, n, C w]
            gram = block @ block.mT
            rank = None
            if inverse == "exact":
                fi, rank = solve_exact(gram, log_prob, label, grad, parameter)
            elif inverse == "truncated":
                fi, rank = solve_truncated(gram, log_prob, label, grad, parameter)
            else:
                assert tau is not None
                fi = solve_damped(gram, log_prob, label, grad, tau)
            fis.append(fi)  # [B, groups, M]
            if rank is not None and with_rank:
                ranks.append(rank)

    def assemble(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts, 2).reshape(batch, groups, len(scales), *spatial)
        return joined.transpose(1, 2).contiguous()

    fi = assemble(fis)
    if channels != "separate":
        fi = fi.mean(2)
    if not ranks:
        return fi, rows.new_empty(0, dtype=torch.int64)
    rank = assemble(ranks)
    return fi, rank.squeeze(2) if channels == "joint" else rank
