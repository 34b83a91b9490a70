"""The compiled module itself: every instruction set, threads, and addresses."""

from __future__ import annotations

import pytest
import torch

from fastfi import _C
from fastfi.backends import cpu, reference

ALL = cpu.instruction_sets()

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(seed: int, batch: int, classes: int, p: int):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, classes, dtype=torch.float64, generator=g) * 3
    z = z.sort(1, descending=True).values
    d = torch.randint(-9, 10, (batch, classes - 1, p), generator=g).double()
    label = torch.randint(0, classes, (batch,), generator=g)
    return d @ d.mT, z.log_softmax(1), label


def test_the_portable_build_is_always_there():
    assert ALL[-1] == "portable"


def test_an_unknown_instruction_set_is_refused():
    gram, log_prob, label = problem(0, 2, 3, 4)
    with pytest.raises(ValueError, match="instruction set 'mmx' is not available on this CPU"):
        cpu.solve_exact(gram, log_prob, label, None, 1e-9, isa="mmx")


@pytest.mark.parametrize("isa", ALL)
# Compiled sizes (2..16 classes), the general path in lanes (to 33), one problem at a time (34..).
@pytest.mark.parametrize("classes", [2, 3, 9, 10, 16, 17, 33, 34, 60])
@pytest.mark.parametrize("low_rank", [False, True])
def test_every_instruction_set_agrees_with_the_reference(isa, classes, low_rank):
    p = max(1, classes // 2) if low_rank else classes + 3
    for batch in (1, 13):
        gram, log_prob, label = problem(classes, batch, classes, p)
        tau = 0.01 * gram.diagonal(dim1=1, dim2=2).sum(1) + 1.0
        args = (gram, log_prob, label, None)
        # Both are within 1e-10 of the truth (tests/test_solve_accuracy.py).
        want, rank = reference.solve_exact(*args, 1e-9)
        got, got_rank = cpu.solve_exact(*args, 1e-9, isa=isa)
        torch.testing.assert_close(got, want, rtol=2e-10, atol=0)
        assert torch.equal(rank, got_rank)
        want, rank = reference.solve_truncated(*args, 1e-3)
        got, got_rank = cpu.solve_truncated(*args, 1e-3, isa=isa)
        torch.testing.assert_close(got, want, rtol=2e-8, atol=0)
        assert torch.equal(rank, got_rank)
        want = reference.solve_damped(*args, tau)
        got = cpu.solve_damped(*args, tau, isa=isa)
        torch.testing.assert_close(got, want, rtol=2e-8, atol=0)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize(("count", "p"), [(1, 1), (3, 7), (9, 784), (10, 513), (50, 33), (100, 9)])
def test_gram_on_every_instruction_set(isa, count, p):
    rows = torch.randn(5, count, p, generator=torch.Generator().manual_seed(p))
    got, want = cpu.gram(rows, isa=isa), reference.gram(rows)
    # Sums of p products in float64, in another order.
    bound = 2 * p * torch.finfo(torch.float64).eps
    scale = want.diagonal(dim1=1, dim2=2).sqrt()
    assert bool(((got - want).abs() <= bound * scale[:, :, None] * scale[:, None]).all())


@pytest.mark.parametrize("isa", ALL)
def test_every_output_is_written(isa):
    gram, log_prob, label = problem(1, 21, 7, 3)
    fi = torch.full((21,), torch.nan, dtype=torch.float64)
    rank = torch.full((21,), -99)
    for rule in range(3):
        fi.fill_(torch.nan)
        tau = torch.ones(21, dtype=torch.float64)
        _C.solve(rule, gram.data_ptr(), log_prob.data_ptr(), label.data_ptr(), 0, tau.data_ptr(),
                 1e-12, 0.0, 1e-3, 21, 1, 6, 7, fi.data_ptr(), rank.data_ptr(), 3, isa)  # fmt: skip
        assert bool(fi.isfinite().all())
        assert int(rank.min()) >= 0
    rows = torch.rand(3, 5, 11)
    out = torch.full((3, 5, 5), torch.nan, dtype=torch.float64)
    _C.gram(rows.data_ptr(), False, 3, 5, 11, out.data_ptr(), 0, 1, 0, 2, isa)
    assert bool(out.isfinite().all())


def test_threads_follow_torch_and_do_not_change_results():
    gram, log_prob, label = problem(2, 5000, 10, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(torch.ops.fastfi.solve_exact(gram, log_prob, label, None, 1e-9)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_labels_outside_the_classes_are_refused_before_the_kernel_reads_them():
    gram, log_prob, label = problem(3, 4, 5, 9)
    label[2] = 5
    with pytest.raises(ValueError, match=r"expected label in 0\.\.4, got values from . to 5"):
        torch.ops.fastfi.solve_exact(gram, log_prob, label, None, 1e-9)
