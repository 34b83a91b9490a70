"""What every solve promises beside accuracy: signs, zeros, shapes, padding, and that a problem's
result does not depend on its neighbours, its place in the batch, or the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import samplers
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Problem
from torch import Tensor

from fastfi.backends import cpu, reference

EPS = 1e-3
RULES = ("exact", "truncated", "damped")
Solve = Callable[..., tuple[Tensor, Tensor]]


def solver(ops: Any, rule: str) -> Solve:
    """fi and rank of a rule with fixed options; the rank of the damped rule is zeros."""

    def solve(
        gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if rule == "exact":
            return ops.solve_exact(gram, log_prob, label, grad, 0.0)
        if rule == "truncated":
            return ops.solve_truncated(gram, log_prob, label, grad, EPS)
        tau = torch.full(gram.shape[:1], 0.5, dtype=torch.float64)
        fi = ops.solve_damped(gram, log_prob, label, grad, tau)
        return fi, torch.zeros(fi.shape, dtype=torch.int64)

    return solve


def batch(
    seed: int, count: int, classes: int, objective: str, spread: float = 5.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Problems of one size with different ranks."""
    rng = np.random.default_rng([seed, classes, len(objective)])
    shapes = list(samplers.ranks(rng, classes))
    return samplers.arguments(
        [
            samplers.problem(rng, classes, *shapes[i % len(shapes)], spread, objective)
            for i in range(count)
        ]
    )


def rows_of(args: tuple[Tensor | None, ...], index: Any) -> tuple[Any, ...]:
    return tuple(None if t is None else t[index] for t in args)


def random_batch(seed: int, count: int, classes: int, scale: float, spread: float) -> Any:
    """Arbitrary floating-point problems, clear rank or not."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, classes + 3))
    rows = rng.normal(0.0, scale, (count, classes - 1, width))
    rows[rng.random(rows.shape) < 0.2] = 0.0
    rows[0] = 0.0
    rows = torch.from_numpy(rows)
    logits = np.sort(rng.normal(0.0, spread, (count, classes)), 1)[:, ::-1].copy()
    label = torch.from_numpy(rng.integers(0, classes, count))
    return rows @ rows.mT, torch.from_numpy(logits).log_softmax(1), label


@given(
    seed=st.integers(0, 2**31),
    classes=st.sampled_from([2, 3, 5, 10, 17]),
    log_scale=st.integers(-60, 60),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 100.0, 1000.0]),
    rule=st.sampled_from(RULES),
    compiled=st.booleans(),
)
def test_never_negative_never_nan(
    seed: int, classes: int, log_scale: int, spread: float, rule: str, compiled: bool
) -> None:
    """For any finite logits; infinite only where P_y underflows float64."""
    ops = torch.ops.fastfi if compiled else reference
    gram, log_prob, label = random_batch(seed, 5, classes, 2.0**log_scale, spread)
    fi, _ = solver(ops, rule)(gram, log_prob, label, None)
    assert not fi.isnan().any()
    assert (fi >= 0).all()
    assert fi[0] == 0  # no derivative at all
    own = log_prob.gather(1, label[:, None]).squeeze(1)
    if rule == "exact":  # the others' size depends on J's as well
        assert fi[own > -690].isfinite().all()
    elif log_scale < 30:
        assert fi.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objective", ["middle", "integers", "raw"])
def test_no_derivative_gives_zero(ops: Any, rule: str, objective: str) -> None:
    gram, log_prob, label, grad = batch(1, 5, 6, objective)
    fi, rank = solver(ops, rule)(torch.zeros_like(gram), log_prob, label, grad)
    assert fi.tolist() == [0.0] * 5
    assert rank.tolist() == [0] * 5


@pytest.mark.parametrize("rule", RULES)
def test_no_objective_gives_zero(ops: Any, rule: str) -> None:
    gram, log_prob, _, grad = batch(2, 5, 6, "integers")
    fi, _ = solver(ops, rule)(gram, log_prob, None, torch.zeros_like(grad))
    assert fi.tolist() == [0.0] * 5
    gram, log_prob, *_ = batch(2, 5, 6, "raw")
    gram[:, -1], gram[:, :, -1] = 0.0, 0.0
    fi, _ = solver(ops, rule)(gram, log_prob, None, None)
    assert fi.tolist() == [0.0] * 5


def test_damped_with_a_metric_that_vanishes(ops: Any) -> None:
    gram, log_prob, label, _ = batch(3, 4, 5, "middle")
    fi = ops.solve_damped(gram * 0, log_prob, label, None, torch.zeros(4, dtype=torch.float64))
    assert fi.tolist() == [0.0] * 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objective", ["middle", "integers", "raw"])
@pytest.mark.parametrize("classes", [2, 7, 10, 33])
def test_place_and_neighbours_do_not_matter(
    kernels: Any, rule: str, objective: str, classes: int
) -> None:
    """Bit for bit, in every batch size from 1 to 20 and at every position of the largest."""
    solve = solver(kernels, rule)
    args = batch(4, 20, classes, objective)
    alone = [solve(*rows_of(args, slice(i, i + 1))) for i in range(20)]
    fi = torch.cat([a for a, _ in alone])
    rank = torch.cat([r for _, r in alone])
    for size in range(1, 21):
        got, got_rank = solve(*rows_of(args, slice(0, size)))
        assert torch.equal(got, fi[:size])
        assert torch.equal(got_rank, rank[:size])
    for shift in range(1, 20):
        index = torch.arange(20).roll(shift)
        got, got_rank = solve(*rows_of(args, index))
        assert torch.equal(got, fi[index])
        assert torch.equal(got_rank, rank[index])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objective", ["middle", "integers", "raw"])
def test_blocks_share_their_samples_probabilities(ops: Any, rule: str, objective: str) -> None:
    """[B, 3, 2] blocks equal 6 B samples; so do non-contiguous arguments."""
    solve = solver(ops, rule)
    rng = np.random.default_rng(6)
    samples, parts = 3, []
    for _ in range(samples):
        first = samplers.problem(rng, 5, 3, 3, 5.0, objective)
        for _ in range(6):
            rows = samplers.integer_rows(rng, 5, 6, int(rng.integers(1, 5)))
            raw = None if first.raw is None else rng.integers(-7, 8, 6)
            parts.append(Problem(rows, first.log_prob, first.label, first.grad, raw))
    flat = samplers.arguments(parts)
    want, want_rank = solve(*flat)
    gram, log_prob, label, grad = flat
    every = slice(None, None, 6)
    blocks = gram.reshape(samples, 3, 2, *gram.shape[1:])
    fi, rank = solve(blocks, *rows_of((log_prob, label, grad), every))
    assert fi.shape == rank.shape == (samples, 3, 2)
    torch.testing.assert_close(fi.flatten(), want, rtol=1e-12, atol=0.0)
    assert torch.equal(rank.flatten(), want_rank)
    swapped = blocks.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([log_prob, log_prob], 2)[..., 0]  # strides 2 K, 2
    assert not swapped.is_contiguous()
    assert not wide.is_contiguous()
    again, _ = solve(swapped, *rows_of((wide, label, grad), every))
    torch.testing.assert_close(again, fi, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objective", ["top", "middle", "integers", "raw"])
@pytest.mark.parametrize("rank", [2, 4])
def test_absent_classes_change_nothing(ops: Any, rule: str, objective: str, rank: int) -> None:
    """Padding: log_prob -inf and zero rows. At rank 4 the present classes have full rank."""
    solve = solver(ops, rule)
    q = samplers.problem(np.random.default_rng([7, rank]), 5, 4, rank, 15.0, objective)
    pad = 3
    zero = np.zeros((pad, 4), dtype=q.rows.dtype)
    padded = Problem(
        np.vstack([q.rows, zero]),
        q.log_prob + (float("-inf"),) * pad,
        q.label,
        None if q.grad is None else q.grad + (0.0,) * pad,
        q.raw,
    )
    want, want_rank = solve(*samplers.arguments([q]))
    fi, got_rank = solve(*samplers.arguments([padded]))
    assert torch.equal(got_rank, want_rank)
    # Sums of other lengths may round otherwise: a few eps64, far below the contract.
    torch.testing.assert_close(fi, want, rtol=1e-11, atol=0.0)
    if rule == "exact":
        assert oracle.relative_error(fi.item(), oracle.exact(padded)[0]) <= 1e-10


@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_threads_does_not_matter(
    kernels: Any, rule: str, threads_restored: None
) -> None:
    solve = solver(kernels, rule)
    args = batch(8, 67, 6, "middle")
    out = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        out.append(solve(*args))
    for fi, rank in out[1:]:
        assert torch.equal(fi, out[0][0])
        assert torch.equal(rank, out[0][1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_every_instruction_set(rule: str, isa: str) -> None:
    """Each holds the contract by itself."""
    for classes, objective in [(2, "middle"), (6, "least"), (10, "integers"), (13, "raw")]:
        rng = np.random.default_rng([9, classes])
        problems = [
            samplers.problem(rng, classes, p, r, 15.0, objective)
            for p, r in samplers.ranks(rng, classes)
        ]
        args = samplers.arguments(problems)
        if rule == "exact":
            fi, _ = cpu.solve_exact(*args, 0.0, isa=isa)
            wanted = [oracle.exact(q)[0] for q in problems]
        elif rule == "truncated":
            fi, _ = cpu.solve_truncated(*args, EPS, isa=isa)
            wanted = [oracle.truncated(q, EPS)[0] for q in problems]
        else:
            fi = cpu.solve_damped(*args, torch.full((len(problems),), 0.5).double(), isa=isa)
            wanted = [oracle.damped(q, 0.5) for q in problems]
        tolerance = 1e-10 if rule == "exact" else 1e-8
        for value, want in zip(fi.tolist(), wanted, strict=True):
            assert oracle.relative_error(value, want) <= tolerance


@pytest.mark.parametrize("shift", [-200, 200])
def test_exact_does_not_depend_on_units(ops: Any, shift: int) -> None:
    """Multiplying every derivative by a power of two changes no digit."""
    for objective in ("middle", "integers", "raw"):
        rng = np.random.default_rng([10, len(objective)])
        problems = [samplers.problem(rng, 6, p, r, 5.0, objective) for p, r in [(3, 3), (8, 4)]]
        want, rank = ops.solve_exact(*samplers.arguments(problems), 0.0)
        moved = [q.scaled(shift) for q in problems]
        fi, got_rank = ops.solve_exact(*samplers.arguments(moved), 0.0)
        assert torch.equal(fi, want)
        assert torch.equal(rank, got_rank)


@pytest.mark.parametrize("spread", [1.0, 15.0, 60.0])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_dependent_rows_rounded_to_float32(ops: Any, spread: float, rank: int) -> None:
    """Rows of this rank, rounded to float32, whose noise makes all of them independent to the last
    bit: the rank is found with the rule that the package uses for float32 rows, rtol = K eps32, and
    FI to the contract's 1e-3. Condition of the rows at most 100: their rounding, 6e-8, times the
    most that any 7 of 9 such rows amplify it, is far below."""
    rng = np.random.default_rng([11, rank, int(spread)])
    mix, generators = rng.normal(size=(100, 9, rank)), rng.normal(size=(100, rank, 40))
    clear = np.linalg.cond(mix) < 100
    assert clear.sum() > 80
    rows = torch.from_numpy(mix @ generators)[torch.from_numpy(clear)]
    count = len(rows)
    log_prob = torch.tensor(
        [samplers.log_probabilities(rng, 10, spread) for _ in range(count)], dtype=torch.float64
    )
    label = torch.from_numpy(rng.integers(0, 10, count))
    single = rows.float().double()
    fi, found = ops.solve_exact(single @ single.mT, log_prob, label, None, 10 * 2.0**-23)
    want, _ = ops.solve_exact(rows @ rows.mT, log_prob, label, None, 10 * 2.0**-52)
    assert found.tolist() == [rank] * count
    torch.testing.assert_close(fi, want, rtol=1e-3, atol=0.0)


def test_dependent_rows_are_not_counted(ops: Any) -> None:
    """Duplicates, multiples and zero rows, under P from 1 to 1e-80."""
    rows = np.array([[1, 2, 0], [2, 4, 0], [0, 0, 0], [1, 2, 3], [1, 2, 0], [-1, -2, -3]])
    log_prob = oracle.log_softmax([0.0, -3.0, -40.0, -60.0, -90.0, -130.0, -190.0])
    problems = [Problem(rows, log_prob, label=y) for y in range(7)]
    fi, rank = ops.solve_exact(*samplers.arguments(problems), 0.0)
    assert rank.tolist() == [2] * 7
    for value, q in zip(fi.tolist(), problems, strict=True):
        assert oracle.relative_error(value, oracle.exact(q)[0]) <= 1e-10
