"""Running an operator with poisoned outputs, and how far its results are from the right ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["EPS32", "EPS64", "Worst", "call", "gram_error", "poisoned", "relative"]

EPS64, EPS32 = 2.0**-52, 2.0**-23


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty returns holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def call(op: str, device: str, *args: Any) -> tuple[Tensor, ...]:
    """The operator on the device, its results on the CPU."""

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [t.to(device) for t in value]
        return value

    with poisoned():
        out = getattr(torch.ops.fastfi, op)(*map(there, args))
    results = (out,) if isinstance(out, Tensor) else tuple(out)
    for t in results:
        if t.device.type != device:
            raise AssertionError(f"{op}: expected a result on {device}, got one on {t.device}")
    return tuple(t.cpu() for t in results)


class Worst:
    """The largest error of an operator, its case, and what was allowed there."""

    def __init__(self) -> None:
        self.share, self.error, self.bound, self.case = -1.0, 0.0, 0.0, ""
        self.posed, self.problems, self.cases = 0, 0, 0

    def add(self, case: str, error: float, bound: float) -> None:
        self.cases += 1
        share = error / bound if error == error else float("inf")
        if share > self.share:
            self.share, self.error, self.bound, self.case = share, error, bound, case

    def pose(self, posed: Tensor) -> None:
        self.posed += int(posed.sum())
        self.problems += posed.numel()


def relative(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b|, 0 where both are equal; NaN counts as infinite."""
    error = torch.where(a == b, 0.0, (a - b).abs() / b.abs())
    return error.nan_to_num(nan=torch.inf)


def gram_error(worst: Worst, case: str, got: Tensor, want: Tensor, bound: float) -> None:
    """Adds the larger of the Frobenius error and the largest entry's, relative to the rows'
    lengths. want [..., n, n] float64."""
    if got.shape != want.shape or got.dtype != torch.float64:
        worst.add(f"{case}: {got.dtype} {list(got.shape)}", torch.inf, bound)
        return
    length = want.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = length[..., :, None] * length[..., None, :]
    entries = torch.where(got == want, 0.0, (got - want).abs() / scale)
    entries = entries.nan_to_num(nan=torch.inf)
    whole = relative((got - want).norm() + want.norm(), want.norm())
    most = float(entries.max()) if entries.numel() else 0.0
    worst.add(case, max(most, float(whole)), bound)
