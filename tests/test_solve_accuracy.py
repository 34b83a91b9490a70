"""The accuracy contract, row by row, against the mpmath oracle.

Every bound is the contract's own. The problems are those of which float64 can give such a bound:
integer Jacobians of known rank, exact Gram matrices, and a resolution estimated beforehand
(samplers.sensitivity for the exact rule; the distance of singular values from the cut for the
truncated one). Problems of one size run as one batch, so that neighbouring lanes hold different
ranks, spreads and labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mpmath as mp
import numpy as np
import oracle
import pytest
import samplers
import torch
from oracle import Problem
from torch import Tensor

from fastfi.backends import reference

EXACT, FULL_RANK, OTHERS = 1e-10, 1e-12, 1e-8  # the contract
EPS = 1e-3  # the authors' cut
OBJECTIVES = (*samplers.LABELS, "integers", "margin", "entropy", "raw")

Group = list[Problem]

pytestmark = pytest.mark.usefixtures("one_thread")


def groups(problems: Sequence[Problem]) -> list[Group]:
    """Problems that can share a batch: the same K and the same form of objective."""
    out: dict[tuple[int, bool, bool], Group] = defaultdict(list)
    for q in problems:
        out[q.classes, q.grad is None, q.raw is None].append(q)
    return list(out.values())


def worst(problems: Group, fi: Tensor, wanted: Sequence[mp.mpf]) -> tuple[float, str]:
    """The largest relative error and the problem it belongs to."""
    errors = [oracle.relative_error(v, w) for v, w in zip(fi.tolist(), wanted, strict=True)]
    i = int(np.argmax(errors))
    q = problems[i]
    about = (
        f"problem {i}: K={q.classes} p={q.rows.shape[1]} rank={oracle.rank_of(q.rows)} "
        f"label={q.label} log P_min={q.log_prob[-1]:.0f} got {fi[i].item():.17g} "
        f"want {mp.nstr(wanted[i], 17)}"
    )
    return errors[i], about


def check(
    problems: Sequence[Problem],
    solve: Callable[..., Any],
    want: Callable[[Problem], tuple[mp.mpf, int]],
    tolerance: float,
    *rest: Any,
) -> None:
    for group in groups(problems):
        fi, rank = solve(*samplers.arguments(group), *rest)
        values, ranks = zip(*map(want, group), strict=True)
        assert rank.tolist() == list(ranks)
        error, about = worst(group, fi, values)
        assert error <= tolerance, about


@cache
def exact_set(size: str) -> list[tuple[Problem, mp.mpf, int]]:
    if size == "small":
        problems = list(samplers.sweep(1, (2, 3, 4, 6, 9, 12), OBJECTIVES))
    elif size == "medium":
        problems = list(samplers.sweep(2, (20, 30), OBJECTIVES, (1.0, 15.0, 60.0)))
    else:
        shapes = [(1, 1), (8, 8), (60, 60), (102, 30), (120, 98), (101, 99)]
        problems = [
            samplers.problem(np.random.default_rng([3, p, int(spread)]), 100, p, r, spread, kind)
            for p, r in shapes
            for spread in (1.0, 60.0)
            for kind in ("least", "raw")
        ]
    return [(q, *oracle.exact(q)) for q in problems]


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_exact(ops: Any, size: str) -> None:
    known = {id(q): (value, rank) for q, value, rank in exact_set(size)}
    problems = [q for q, _, _ in exact_set(size)]
    check(problems, ops.solve_exact, lambda q: known[id(q)], EXACT, 0.0)


@pytest.mark.parametrize("rtol", [1e-9, 12 * 2.0**-23])
def test_exact_with_the_default_tolerances_of_float64_and_float32(ops: Any, rtol: float) -> None:
    """The rank decision is made on J's geometry: rtol within the clear gap changes nothing."""
    chosen = [(q, value, rank) for q, value, rank in exact_set("small") if clear_at(q, 10 * rtol)]
    assert len(chosen) > 500
    known = {id(q): (value, rank) for q, value, rank in chosen}
    check([q for q, _, _ in chosen], ops.solve_exact, lambda q: known[id(q)], EXACT, rtol)


def clear_at(problem: Problem, rtol: float) -> bool:
    """Whether every subset of rows that could be a basis stays independent at this tolerance: the
    first independent rows in order of probability and those by length do."""
    by_length = np.argsort(-np.square(problem.rows.astype(np.float64)).sum(1), kind="stable")
    for order in (np.arange(len(problem.rows)), by_length):
        rows = problem.rows[order].astype(np.float64)
        basis = oracle.relations(problem.rows[order])[0]
        least = np.abs(np.diag(np.linalg.qr(rows[basis].T)[1])).min()
        noise = np.linalg.cond(rows[basis])
        if least < rtol * noise * np.linalg.norm(rows, axis=1).max():
            return False
    return True


@pytest.mark.parametrize("spread", [*samplers.SPREADS, 150.0])
def test_exact_cross_entropy_at_full_rank(ops: Any, spread: float) -> None:
    """1e-12 for any spread. 1/P_y - 1 would lose every digit of the top class."""
    for k in (2, 3, 5, 10, 30, 100):
        rng = np.random.default_rng([4, k, int(spread)])
        rows = samplers.integer_rows(rng, k, k + 1, k - 1)
        log_prob = samplers.log_probabilities(rng, k, spread)
        labels = {0, 1, 2 % k, k // 2, k - 1}  # P_y above the underflow of float64
        problems = [
            Problem(rows, log_prob, label=y) for y in labels if log_prob[0] - log_prob[y] < 700
        ]
        fi, rank = ops.solve_exact(*samplers.arguments(problems), 0.0)
        assert rank.tolist() == [k - 1] * len(problems)
        wanted = [oracle.full_rank(log_prob, q.label) for q in problems]
        error, about = worst(problems, fi, wanted)
        assert error <= FULL_RANK, about


@cache
def truncated_set(size: str) -> list[tuple[Problem, mp.mpf, int]]:
    """Scales 1, 2^-4 and 2^-10 put the largest singular value between 0.01 and 1e4 times the cut.

    Kept when every singular value is at least 5 % of eps away from it: s_i^2 is computed to a few
    K eps64 s_1^2, so this gap decides the rank with certainty up to s_1 / eps = 1e6.
    """
    if size == "small":
        problems = list(samplers.sweep(5, (2, 3, 6, 10), OBJECTIVES))
    else:
        problems = [
            samplers.problem(np.random.default_rng([6, k, p, int(spread)]), k, p, r, spread, kind)
            for k, p, r in [(30, 6, 6), (100, 5, 5), (100, 8, 3)]
            for spread in (1.0, 30.0)
            for kind in ("top", "middle", "integers", "raw")
        ]
    out = []
    for i, q in enumerate(problems):
        scaled = q.scaled((0, -4, -10)[i % 3])
        value, kept, gap = oracle.truncated(scaled, EPS)
        if gap >= 0.05:
            out.append((scaled, value, kept))
    return out


@pytest.mark.parametrize(("size", "at_least"), [("small", 400), ("large", 20)])
def test_truncated(ops: Any, size: str, at_least: int) -> None:
    known = {id(q): (value, kept) for q, value, kept in truncated_set(size)}
    problems = [q for q, _, _ in truncated_set(size)]
    assert len(problems) >= at_least
    assert {kept for _, _, kept in truncated_set("small")} >= {0, 1, 5}
    check(problems, ops.solve_truncated, lambda q: known[id(q)], OTHERS, EPS)


def test_truncated_follows_its_cut(ops: Any) -> None:
    q = samplers.problem(np.random.default_rng(8), 6, 9, 5, 1.0, "middle")
    seen = set()
    for eps in (1e-6, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 50.0):
        value, kept, gap = oracle.truncated(q, eps)
        assert gap > 0.01
        seen.add(kept)
        fi, rank = ops.solve_truncated(*samplers.arguments([q]), eps)
        assert rank.item() == kept
        assert oracle.relative_error(fi.item(), value) <= OTHERS
    assert seen == {0, 1, 2, 3, 4, 5}


@cache
def damped_set(size: str) -> list[tuple[Problem, float, mp.mpf]]:
    """tau = alpha trace G for alpha 1, 1e-2, 1e-4, at three scales. (M + tau I has condition up to
    1 / alpha, so float64 gives about 10 eps64 / alpha: 2e-11 at 1e-4.)"""
    if size == "small":
        problems = list(samplers.sweep(9, (2, 3, 6, 12), OBJECTIVES))
    else:
        problems = [
            samplers.problem(np.random.default_rng([10, k, p, int(spread)]), k, p, r, spread, kind)
            for k, p, r in [(30, 12, 12), (100, 5, 5), (100, 103, 40)]
            for spread in (1.0, 15.0, 60.0)
            for kind in ("top", "middle", "integers", "raw")
            if p < 100 or spread == 15.0
        ]
    out = []
    for i, q in enumerate(problems):
        scaled = q.scaled((0, -10, 20)[i % 3])
        tau = float((1.0, 1e-2, 1e-4)[i // 3 % 3] * oracle.trace(scaled))
        out.append((scaled, tau, oracle.damped(scaled, tau)))
    return out


@pytest.mark.parametrize("size", ["small", "large"])
def test_damped(ops: Any, size: str) -> None:
    known = {id(q): (tau, value) for q, tau, value in damped_set(size)}
    for group in groups([q for q, _, _ in damped_set(size)]):
        taus, values = zip(*(known[id(q)] for q in group), strict=True)
        tau = torch.tensor(taus, dtype=torch.float64)
        fi = ops.solve_damped(*samplers.arguments(group), tau)
        error, about = worst(group, fi, values)
        assert error <= OTHERS, about


@pytest.mark.parametrize("classes", [300, 1000])
def test_many_classes_of_small_rank(kernels: Any, classes: int) -> None:
    rng = np.random.default_rng([11, classes])
    for kind in ("top", "least", "integers", "raw"):
        q = samplers.problem(rng, classes, 6, 6, 5.0, kind)
        args = samplers.arguments([q])
        fi, rank = kernels.solve_exact(*args, 0.0)
        assert rank.item() == 6
        assert oracle.relative_error(fi.item(), oracle.exact(q)[0]) <= EXACT
        value, kept, gap = oracle.truncated(q, EPS)
        assert gap >= 0.05
        fi, rank = kernels.solve_truncated(*args, EPS)
        assert rank.item() == kept
        assert oracle.relative_error(fi.item(), value) <= OTHERS
        fi = kernels.solve_damped(*args, torch.ones(1, dtype=torch.float64))
        assert oracle.relative_error(fi.item(), oracle.damped(q, 1.0)) <= OTHERS


def test_many_classes_of_large_rank_against_the_reference(kernels: Any) -> None:
    rng = np.random.default_rng(13)
    generators = rng.integers(-3, 4, (150, 320))
    mix = rng.integers(-1, 2, (299, 150)) * (rng.random((299, 150)) < 0.02)
    mix[rng.permutation(299)[:150]] = np.eye(150, dtype=np.int64)
    rows = torch.from_numpy(mix @ generators)[None].double()
    lp = torch.tensor([samplers.log_probabilities(rng, 300, 5.0)], dtype=torch.float64)
    label = torch.tensor([299])
    got, got_rank = kernels.solve_exact(rows @ rows.mT, lp, label, None, 0.0)
    want, rank = reference.solve_exact(rows @ rows.mT, lp, label, None, 0.0)
    assert rank.item() == got_rank.item() == 150
    torch.testing.assert_close(got, want, rtol=2 * EXACT, atol=0.0)


def test_many_classes_at_full_rank_is_the_closed_form(kernels: Any) -> None:
    rng = np.random.default_rng(12)
    classes = 1000
    rows = torch.from_numpy(rng.integers(-3, 4, (1, classes - 1, classes + 200))).double()
    log_prob = samplers.log_probabilities(rng, classes, 15.0)
    label = torch.tensor([classes // 2])
    lp = torch.tensor([log_prob], dtype=torch.float64)
    fi, rank = kernels.solve_exact(rows @ rows.mT, lp, label, None, 0.0)
    assert rank.item() == classes - 1
    assert oracle.relative_error(fi.item(), oracle.full_rank(log_prob, classes // 2)) <= FULL_RANK
