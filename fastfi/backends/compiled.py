"""What both compiled backends do with a call: prepare its arguments, allocate, pass addresses.

Each gives a ``run`` that takes the numbers and addresses in the order of the binding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastfi._ops import INVERSES, check_solve, check_windows
from fastfi.backends.reference import rank_tolerance

__all__ = ["Run", "readable", "solve_damped", "solve_exact", "solve_truncated", "window_influence"]

_EXACT, _TRUNCATED, _DAMPED = range(3)  # enum class Rule in csrc/problems.h


class Run(Protocol):
    """Runs a kernel."""

    def __call__(
        self, like: Tensor, label: Tensor | None, classes: int, *arguments: object
    ) -> None:
        """``like`` and ``label`` are tensors among the arguments; labels outside 0..classes - 1 are
        the backend's to refuse."""


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _solve(
    run: Run,
    rule: int,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    tau: Tensor | None,
    tolerance: float,
    row_tolerance: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    gram, log_prob = gram.contiguous(), log_prob.contiguous()
    label, grad, tau = (None if t is None else t.contiguous() for t in (label, grad, tau))
    shape = gram.shape[:-2]
    fi = gram.new_empty(shape)
    rank = gram.new_empty(0 if rule == _DAMPED else shape, dtype=torch.int64)
    run(
        gram,
        label,
        log_prob.shape[1],
        rule,
        gram.data_ptr(),
        log_prob.data_ptr(),
        _address(label),
        _address(grad),
        _address(tau),
        tolerance,
        row_tolerance,
        eps,
        shape[0],
        shape[1:].numel(),
        gram.shape[-1],
        log_prob.shape[1],
        fi.data_ptr(),
        0 if rule == _DAMPED else rank.data_ptr(),
    )
    return fi, rank


def solve_exact(
    run: Run,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    rtol: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_exact`."""
    check_solve("solve_exact", gram, log_prob, label, grad)
    tolerance = rank_tolerance(rtol, log_prob.shape[1])
    return _solve(run, _EXACT, gram, log_prob, label, grad, None, tolerance, rtol * rtol, 0.0)


def solve_truncated(
    run: Run,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_truncated`."""
    check_solve("solve_truncated", gram, log_prob, label, grad)
    tolerance = rank_tolerance(0.0, log_prob.shape[1])
    return _solve(run, _TRUNCATED, gram, log_prob, label, grad, None, tolerance, 0.0, eps)


def solve_damped(
    run: Run,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    tau: Tensor,
) -> Tensor:
    """See :func:`reference.solve_damped`."""
    check_solve("solve_damped", gram, log_prob, label, grad, tau)
    return _solve(run, _DAMPED, gram, log_prob, label, grad, tau, 0.0, 0.0, 0.0)[0]


def readable(rows: Tensor) -> Tensor:
    """Rows as the kernels read them: contiguous, float32 or float64."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # exact
    return rows.contiguous()


def window_influence(
    run: Run,
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
    """See :func:`reference_windows.window_influence`."""
    check_windows(rows, log_prob, label, grad, scales, channels, inverse, tau)
    rule = INVERSES.index(inverse)
    rtol = parameter if rule == _EXACT else 0.0
    rows, log_prob = readable(rows), log_prob.contiguous()
    label, grad, tau = (None if t is None else t.contiguous() for t in (label, grad, tau))
    batch, n, colours, *spatial = rows.shape
    groups = [] if channels == "joint" else [colours]
    shape = [batch, len(scales), *groups, *spatial]
    fi = log_prob.new_empty(shape)
    with_rank = with_rank and rule != _DAMPED
    rank = rows.new_empty(shape if with_rank else 0, dtype=torch.int64)
    slots = sorted(range(len(scales)), key=lambda s: scales[s])
    run(
        rows,
        label,
        log_prob.shape[1],
        rule,
        rows.data_ptr(),
        rows.dtype == torch.float64,
        [batch, n, colours, *[1] * (3 - len(spatial)), *spatial],
        log_prob.shape[1],
        channels == "joint",
        [scales[s] // 2 for s in slots],
        slots,
        log_prob.data_ptr(),
        _address(label),
        _address(grad),
        _address(tau),
        rank_tolerance(rtol, log_prob.shape[1]),
        rtol * rtol,
        parameter,
        fi.data_ptr(),
        rank.data_ptr() if with_rank else 0,
    )
    return (fi.mean(2) if channels == "mean" else fi), rank
