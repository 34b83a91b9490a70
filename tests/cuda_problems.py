"""Problems for the CUDA kernels' emulation, and comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["INVERSES", "ORDERS", "SOLVES", "inputs", "last", "parameter", "results", "same"]
__all__ += ["window_inputs"]

ORDERS = ("0", "1", "12345")  # of threads that can go on: forwards, backwards, at random
SOLVES = ("solve_exact", "solve_truncated", "solve_damped")
INVERSES = ("exact", "truncated", "damped")
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def inputs(seed: int, batch: int, classes: int, width: int, mode: str, blocks: int = 1) -> Inputs:
    """Gram matrices of random rows, full of rank or not by width, and one form of objective."""
    torch.manual_seed(seed)
    n = classes if mode == "raw" else classes - 1
    rows = torch.randn(batch, blocks, n, width, dtype=torch.float64)
    logits = 2 * torch.randn(batch, classes, dtype=torch.float64)
    log_prob = logits.sort(1, descending=True).values.log_softmax(1)
    label = torch.randint(0, classes, (batch,)) if mode == "label" else None
    grad = None
    if mode == "grad":
        grad = torch.randn(batch, classes, dtype=torch.float64)
        grad -= grad.mean(1, keepdim=True)
    return rows @ rows.mT, log_prob, label, grad


def last(name: str, batch: int) -> Any:
    tau = torch.linspace(0.1, 1.0, batch, dtype=torch.float64)
    return {"solve_exact": 1e-9, "solve_truncated": 1e-3, "solve_damped": tau}[name]


def parameter(inverse: str) -> float:
    return 1e-9 if inverse == "exact" else 1e-3


def results(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def same(got: Any, want: Any, rtol: float) -> None:
    for g, w in zip(results(got), results(want), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=rtol, atol=0.0)


def window_inputs(shape: tuple[int, ...], classes: int, mode: str) -> tuple[Tensor, ...]:
    gram, log_prob, label, grad = inputs(sum(shape) + classes, shape[0], classes, 3, mode)
    return torch.randn(shape[0], gram.shape[-1], *shape[1:]), log_prob, label, grad  # type: ignore[return-value]
