"""The compiled CUDA kernels: workspace and the current stream; no call waits for the device.

A label outside the classes therefore cannot be refused: it gives NaN. All memory comes from torch's
allocator, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastfi import _CUDA  # type: ignore[attr-defined]
from fastfi.backends import compiled

__all__ = ["solve_damped", "solve_exact", "solve_truncated", "targets", "window_influence"]


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


def _solves(like: Tensor, label: Tensor | None, classes: int, *arguments: object) -> None:
    if like.numel() > 0:
        _run(_CUDA.Solve(*arguments), like)


def _windows(like: Tensor, label: Tensor | None, classes: int, *arguments: object) -> None:
    if like.numel() > 0:
        _run(_CUDA.Windows(*arguments), like)


def solve_exact(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, rtol: float
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_exact`."""
    return compiled.solve_exact(_solves, gram, log_prob, label, grad, rtol)


def solve_truncated(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.solve_truncated`."""
    return compiled.solve_truncated(_solves, gram, log_prob, label, grad, eps)


def solve_damped(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, tau: Tensor
) -> Tensor:
    """See :func:`reference.solve_damped`."""
    return compiled.solve_damped(_solves, gram, log_prob, label, grad, tau)


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
    return compiled.window_influence(
        _windows, rows, log_prob, label, grad, scales, channels, inverse, parameter, tau, with_rank
    )
