"""The compiled CPU kernels, with as many threads as torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi import _C  # type: ignore[attr-defined]
from fastfi._ops import check_gram, check_segments
from fastfi.backends import compiled

__all__ = ["gram", "instruction_sets", "segment_gram", "solve_damped", "solve_exact"]
__all__ += ["solve_truncated", "window_influence"]


def instruction_sets() -> list[str]:
    """The instruction sets this CPU can run, the one in use first."""
    return _C.instruction_sets()


def _gram(rows: Tensor, offsets: Tensor | None, isa: str) -> Tensor:
    rows = compiled.readable(rows)
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


def _solves(isa: str) -> compiled.Run:
    def run(like: Tensor, label: Tensor | None, classes: int, *arguments: object) -> None:
        _check_labels(label, classes)
        _C.solve(*arguments, torch.get_num_threads(), isa)

    return run


def _windows(isa: str) -> compiled.Run:
    def run(like: Tensor, label: Tensor | None, classes: int, *arguments: object) -> None:
        _check_labels(label, classes)
        _C.windows(*arguments, torch.get_num_threads(), isa)

    return run


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
    return compiled.solve_exact(_solves(isa), gram, log_prob, label, grad, rtol)


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
    return compiled.solve_truncated(_solves(isa), gram, log_prob, label, grad, eps)


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
    return compiled.solve_damped(_solves(isa), gram, log_prob, label, grad, tau)


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
    return compiled.window_influence(
        _windows(isa), rows, log_prob, label, grad, scales, channels, inverse, parameter, tau,
        with_rank,
    )  # fmt: skip
