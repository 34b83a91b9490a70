"""The compiled CUDA kernels: allocate, check, pass addresses and the current stream.

Nothing here waits for the device, so a label outside the classes cannot be refused: it gives NaN.
All memory comes from torch's allocator, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastfi import _CUDA  # type: ignore[attr-defined]
from fastfi._ops import INVERSES, check_solve, check_windows
from fastfi.backends.reference import rank_tolerance

__all__ = ["solve_damped", "solve_exact", "solve_truncated", "targets", "window_influence"]

_EXACT, _TRUNCATED, _DAMPED = range(3)  # enum class Rule in csrc/problems.h


def targets() -> list[str]:
    """What the kernels were compiled for, such as "sm_90"."""
    return _CUDA.targets()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _run(problem: Any, like: Tensor) -> None:
    """Runs a prepared problem on the current stream of a tensor's device."""
    device = like.device
    # Current for torch too, which then has no need of a context on another device.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Freed when this function returns: what the stream does later with this memory comes after.
        workspace = like.new_empty(problem.workspace(), dtype=torch.float64)
        problem.run(device.index or 0, _stream(device), workspace.data_ptr())


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
) -> tuple[Tensor, Tensor]:
    gram, log_prob = gram.contiguous(), log_prob.contiguous()
    label, grad, tau = (None if t is None else t.contiguous() for t in (label, grad, tau))
    shape = gram.shape[:-2]
    fi = gram.new_empty(shape)
    rank = gram.new_empty(0 if rule == _DAMPED else shape, dtype=torch.int64)
    if fi.numel() > 0:
        problem = _CUDA.Solve(
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
        _run(problem, gram)
    return fi, rank


def solve_exact(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, rtol: float
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_exact`."""
    check_solve("solve_exact", gram, log_prob, label, grad)
    tolerance = rank_tolerance(rtol, log_prob.shape[1])
    return _solve(_EXACT, gram, log_prob, label, grad, None, tolerance, rtol * rtol, 0.0)


def solve_truncated(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_truncated`."""
    check_solve("solve_truncated", gram, log_prob, label, grad)
    tolerance = rank_tolerance(0.0, log_prob.shape[1])
    return _solve(_TRUNCATED, gram, log_prob, label, grad, None, tolerance, 0.0, eps)


def solve_damped(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, tau: Tensor
) -> Tensor:
    """See :func:`reference.solve_damped`."""
    check_solve("solve_damped", gram, log_prob, label, grad, tau)
    return _solve(_DAMPED, gram, log_prob, label, grad, tau, 0.0, 0.0, 0.0)[0]


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
    """See :func:`reference_windows.window_influence`."""
    check_windows(rows, log_prob, label, grad, scales, channels, inverse, tau)
    rule = INVERSES.index(inverse)
    rtol = parameter if rule == _EXACT else 0.0
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # exact
    rows, log_prob = rows.contiguous(), log_prob.contiguous()
    label, grad, tau = (None if t is None else t.contiguous() for t in (label, grad, tau))
    batch, n, colours, *spatial = rows.shape
    groups = [] if channels == "joint" else [colours]
    shape = [batch, len(scales), *groups, *spatial]
    fi = log_prob.new_empty(shape)
    with_rank = with_rank and rule != _DAMPED
    rank = rows.new_empty(shape if with_rank else 0, dtype=torch.int64)
    slots = sorted(range(len(scales)), key=lambda s: scales[s])
    if fi.numel() > 0:
        problem = _CUDA.Windows(
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
        _run(problem, rows)
    return (fi.mean(2) if channels == "mean" else fi), rank
