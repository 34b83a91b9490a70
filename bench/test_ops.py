"""Each operator's C++ kernel against its reference and against torch.linalg."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastfi  # noqa: F401  registers the operators
from bench.race import AT_LEAST, Side, race
from bench.workloads import Problems, problems
from fastfi.backends import reference

ops = torch.ops.fastfi

RTOL = 10 * torch.finfo(torch.float64).eps
# Problems of size n: how many, and for each rule the factor aimed at over eigh (10 x 10 only).
SIZES = {10: 8192, 99: 64}
ROUNDS = {10: 21, 99: 9}
TARGETS = {"damped": 100.0, "exact": 25.0, "truncated": 8.0}


def solve(rule: str, namespace: object, q: Problems) -> Callable[[], object]:
    """One call of a solve operator, compiled (``torch.ops.fastfi``) or reference."""
    function = getattr(namespace, f"solve_{rule}")
    option = {"exact": RTOL, "truncated": 1e-3, "damped": q.tau}[rule]
    return lambda: function(q.gram, q.log_prob, q.label, None, option)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rule", TARGETS)
def test_solve_against_eigh(benchmark: BenchmarkFixture, rule: str, n: int) -> None:
    q = problems(SIZES[n], n, 4 * n)
    work = Side(f"solve_{rule}", solve(rule, ops, q), SIZES[n])
    yardstick = Side("torch.linalg.eigh, float64", lambda: torch.linalg.eigh(q.gram), SIZES[n])
    target = TARGETS[rule] if n == 10 else None
    section = f"solve, {n} x {n}"
    race(
        benchmark, work, yardstick, section=section, rounds=ROUNDS[n], kind=AT_LEAST, target=target
    )


def test_deficient_exact_against_eigh(benchmark: BenchmarkFixture) -> None:
    q = problems(SIZES[10], 10, 5)  # rank 5: the closed form of full rank does not apply
    work = Side("solve_exact, rank 5", solve("exact", ops, q), SIZES[10])
    yardstick = Side("torch.linalg.eigh, float64", lambda: torch.linalg.eigh(q.gram), SIZES[10])
    race(
        benchmark,
        work,
        yardstick,
        section="solve, 10 x 10",
        rounds=ROUNDS[10],
        kind=AT_LEAST,
        target=TARGETS["exact"],
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rule", TARGETS)
def test_solve_against_reference(benchmark: BenchmarkFixture, rule: str, n: int) -> None:
    count = SIZES[n] // 4
    q = problems(count, n, 4 * n)
    work = Side(f"solve_{rule}", solve(rule, ops, q), count)
    yardstick = Side("reference (plain torch)", solve(rule, reference, q), count)
    race(
        benchmark,
        work,
        yardstick,
        section=f"solve, {n} x {n}",
        rounds=ROUNDS[n] // 3,
        kind=AT_LEAST,
    )


def bmm(rows: Tensor) -> Tensor:
    """The Gram matrix in float64 as torch does it: convert, then multiply."""
    wide = rows.double()
    return torch.bmm(wide, wide.mT)


@pytest.mark.parametrize(("r", "batch"), [(9, 256), (99, 16)])
@pytest.mark.parametrize("yard", ["torch.bmm, float64", "reference (plain torch)"])
def test_gram(benchmark: BenchmarkFixture, yard: str, r: int, batch: int) -> None:
    rows = torch.randn(batch, r, 3072, generator=torch.Generator().manual_seed(0))
    function = bmm if yard.startswith("torch") else reference.gram
    work = Side("gram, float32 rows", lambda: ops.gram(rows), batch)
    yardstick = Side(yard, lambda: function(rows), batch)
    race(benchmark, work, yardstick, section=f"gram, {r} x 3072", rounds=15, kind=AT_LEAST)
