"""The compiled CPU kernels: allocate, check, pass addresses. As many threads as torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfi import _C  # type: ignore[attr-defined]
from fastfi._ops import check_gram, check_solve
from fastfi.backends.reference import rank_tolerance

__all__ = ["gram", "instruction_sets", "solve_damped", "solve_exact", "solve_truncated"]

_EXACT, _TRUNCATED, _DAMPED = range(3)  # enum class Rule in csrc/cpu/kernels.h


def instruction_sets() -> list[str]:
    """The instruction sets this CPU can run, the one in use first."""
    return _C.instruction_sets()


def gram(rows: Tensor, *, isa: str = "") -> Tensor:
    """Gram matrices [B, R, R] float64 of rows [B, R, p]; see :func:`reference.gram`."""
    check_gram(rows)
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # exact
    rows = rows.contiguous()
    batch, count, columns = rows.shape
    out = rows.new_empty((batch, count, count), dtype=torch.float64)
    _C.gram(
        rows.data_ptr(),
        rows.dtype == torch.float64,
        batch,
        count,
        columns,
        out.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return out


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
    if label is not None and label.numel() > 0:
        # The kernel reads at these positions.
        low, high = (int(v) for v in torch.aminmax(label))
        if low < 0 or high >= log_prob.shape[1]:
            raise ValueError(
                f"expected label in 0..{log_prob.shape[1] - 1}, got values from {low} to {high}"
            )
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
