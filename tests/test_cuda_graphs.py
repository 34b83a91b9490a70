"""The CUDA kernels in a CUDA graph: captured once, replayed on other numbers. On a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfi
from fastfi._ops import INVERSES

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
if "C++" not in fastfi.backends()["solve_exact"]["cuda"]:
    pytest.skip("the compiled CUDA module is not in use", allow_module_level=True)

CLASSES = 10


def numbers(seed: int, classes: int) -> list[Tensor]:
    """Rows [64, K - 1, 3, 6, 6], log P, labels and tau on the GPU; every other sample's rows depend
    on each other."""
    torch.manual_seed(seed)
    rows = torch.randn(64, classes - 1, 3, 6, 6, dtype=torch.float64)
    rows[::2, 1] = rows[::2, 0] - 2 * rows[::2, 2]
    logits = torch.randn(64, classes, dtype=torch.float64).sort(1, descending=True).values
    label = torch.randint(0, classes, (64,))
    tau = torch.rand(64, dtype=torch.float64) + 0.1
    return [t.cuda() for t in (rows, logits.log_softmax(1), label, tau)]


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def solve(name: str, last: float | None) -> Callable[..., Any]:
    def run(rows: Tensor, log_prob: Tensor, label: Tensor, tau: Tensor) -> Any:
        flat = rows.flatten(2)
        gram = flat @ flat.mT
        rest = tau if last is None else last
        return getattr(torch.ops.fastfi, name)(gram, log_prob, label, None, rest)

    return run


def windows(inverse: str) -> Callable[..., Any]:
    def run(rows: Tensor, log_prob: Tensor, label: Tensor, tau: Tensor) -> Any:
        given = tau if inverse == "damped" else None
        return torch.ops.fastfi.window_influence(
            rows, log_prob, label, None, (1, 3), "separate", inverse, 1e-3, given, True
        )

    return run


WORK = {
    "exact": solve("solve_exact", 1e-9),
    "truncated": solve("solve_truncated", 1e-3),
    "damped": solve("solve_damped", None),
    **{f"windows, {inverse}": windows(inverse) for inverse in INVERSES},
}


@pytest.mark.parametrize("classes", [CLASSES, 20])
@pytest.mark.parametrize("name", WORK)
def test_replay(name: str, classes: int) -> None:
    work, held = WORK[name], numbers(1, classes)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(*held)  # libraries make their handles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work(*held)
    for seed in (2, 3):
        for t, new in zip(held, numbers(seed, classes), strict=True):
            t.copy_(new)
        graph.replay()
        for got, want in zip(as_tuple(out), as_tuple(work(*held)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=0.0)
