"""The compiled CPU kernels: allocate, check, pass addresses. As many threads as torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi import _C  # type: ignore[attr-defined]
from fastfi._ops import INVERSES, check_gram, check_segments, check_solve, check_windows
from fastfi.backends.reference import rank_tolerance

__all__ = ["gram", "instruction_sets", "segment_gram", "solve_damped", "solve_exact"]
__all__ += ["solve_truncated", "window_influence"]

_EXACT, _TRUNCATED, _DAMPED = range(3)  # enum class Rule in csrc/cpu/kernels.h


def instruction_sets() -> list[str]:
    """The instruction sets this CPU can run, the one in use first."""
    return _C.instruction_sets()


def _rows(rows: Tensor) -> Tensor:
    """Rows as the kernels read them: contiguous, float32 or float64."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # exact
    return rows.contiguous()


def _gram(rows: Tensor, offsets: Tensor | None, isa: str) -> Tensor:
    rows = _rows(rows)
    batch, count, columns = rows.shape
    segments = 1 if offsets is None else offsets.shape[1] - 1
    out = rows.new_empty((batch, segments, count, count), dtype=torch.float64)
    offsets = None if offsets is None else offsets.contiguous()
    shared = offsets is None or offsets.shape[0] == 1
    _C.gram(
        rows.data_ptr(),
        rows.dtype == torch.float64,
        batch,
        count,
        columns,
        out.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        segments,
        0 if shared else segments + 1,
        torch.get_num_threads(),
        isa,
    )
    return out


def gram(rows: Tensor, *, isa: str = "") -> Tensor:
    """Gram matrices [B, R, R] float64 of rows [B, R, p]; see :func:`reference.gram`."""
    check_gram(rows)
    return _gram(rows, None, isa).squeeze(1)


def segment_gram(rows: Tensor, offsets: Tensor, *, isa: str = "") -> Tensor:
    """Gram matrices [B, G, R, R]; see :func:`reference_windows.segment_gram`."""
    check_segments(rows, offsets)
    # The kernel reads at these positions.
    inside = bool((offsets >= 0).all()) and bool((offsets <= rows.shape[2]).all())
    if not inside or bool((offsets.diff(dim=1) < 0).any()):
        raise ValueError(f"segment_gram: expected offsets rising from 0 to {rows.shape[2]}")
    return _gram(rows, offsets, isa)


def _check_labels(label: Tensor | None, classes: int) -> None:
    """The kernels read at these positions."""
    if label is not None and label.numel() > 0:
        low, high = (int(v) for v in torch.aminmax(label))
        if low < 0 or high >= classes:
            raise ValueError(f"expected label in 0..{classes - 1}, got values from {low} to {high}")


def _solve(
    rule: int,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    tau: Tensor | None,
    tolerance: float,
    row_tolerance: float,
    eps: float,
    isa: str,
) -> tuple[Tensor, Tensor]:
    _check_labels(label, log_prob.shape[1])
    gram, log_prob = gram.contiguous(), log_prob.contiguous()
    rest = [None if t is None else t.contiguous() for t in (label, grad, tau)]
    shape = gram.shape[:-2]
    fi = gram.new_empty(shape)
    rank = gram.new_empty(0 if rule == _DAMPED else shape, dtype=torch.int64)
    _C.solve(
        rule,
        gram.data_ptr(),
        log_prob.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in rest),
        tolerance,
        row_tolerance,
        eps,
        shape[0],
        shape[1:].numel(),
        gram.shape[-1],
        log_prob.shape[1],
        fi.data_ptr(),
        0 if rule == _DAMPED else rank.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return fi, rank


def solve_exact(
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    rtol: float,
    *,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_exact`."""
    check_solve("solve_exact", gram, log_prob, label, grad)
    tolerance = rank_tolerance(rtol, log_prob.shape[1])
    return _solve(_EXACT, gram, log_prob, label, grad, None, tolerance, rtol * rtol, 0.0, isa)


def solve_truncated(
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    eps: float,
    *,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_truncated`."""
    check_solve("solve_truncated", gram, log_prob, label, grad)
    tolerance = rank_tolerance(0.0, log_prob.shape[1])
    return _solve(_TRUNCATED, gram, log_prob, label, grad, None, tolerance, 0.0, eps, isa)


def solve_damped(
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    tau: Tensor,
    *,
    isa: str = "",
) -> Tensor:
    """See :func:`reference.solve_damped`."""
    check_solve("solve_damped", gram, log_prob, label, grad, tau)
    return _solve(_DAMPED, gram, log_prob, label, grad, tau, 0.0, 0.0, 0.0, isa)[0]


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
    *,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """See :func:`reference_windows.window_influence`."""
    check_windows(rows, log_prob, label, grad, scales, channels, inverse, tau)
    _check_labels(label, log_prob.shape[1])
    rule = INVERSES.index(inverse)
    rtol = parameter if rule == _EXACT else 0.0
    rows, log_prob = _rows(rows), log_prob.contiguous()
    rest = [None if t is None else t.contiguous() for t in (label, grad, tau)]
    batch, n, colours, *spatial = rows.shape
    groups = [] if channels == "joint" else [colours]
    shape = [batch, len(scales), *groups, *spatial]
    fi = log_prob.new_empty(shape)
    with_rank = with_rank and rule != _DAMPED
    rank = rows.new_empty(shape if with_rank else 0, dtype=torch.int64)
    slots = sorted(range(len(scales)), key=lambda s: scales[s])
    _C.windows(
        rule,
        rows.data_ptr(),
        rows.dtype == torch.float64,
        [batch, n, colours, *[1] * (3 - len(spatial)), *spatial],
        log_prob.shape[1],
        channels == "joint",
        [scales[s] // 2 for s in slots],
        slots,
        log_prob.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in rest),
        rank_tolerance(rtol, log_prob.shape[1]),
        rtol * rtol,
        parameter,
        fi.data_ptr(),
        rank.data_ptr() if with_rank else 0,
        torch.get_num_threads(),
        isa,
    )
    return (fi.mean(2) if channels == "mean" else fi), rank
