"""The CUDA solves' sources, run by the emulation: launches, teams, order, memory, refusals.

Their accuracy is tested with that of all other implementations (fixture ``ops``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_problems import INVERSES, ORDERS, SOLVES, inputs, last, results, same
from emulated import emulated_ops, kernel_module

from fastfi.backends import cpu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpu() -> Any:
    return emulated_ops()


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFI_EMULATED_ORDER", request.param)


# 2..10 classes: a thread for each problem, in four compiled sizes, with places left over at 3, 5
# and 9; 11..17: teams of 16 lanes in shared memory (17 with h as a row: too many); 18: warps.
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 7, 9, 10, 11, 16, 17, 18])
@pytest.mark.parametrize("mode", ["label", "grad", "raw"])
@pytest.mark.parametrize("full", [True, False])
def test_every_size(gpu: Any, poisoned: None, classes: int, mode: str, full: bool) -> None:
    """Both are within the contract's 1e-8 of the truth on problems of moderate condition."""
    width = classes + 2 if full else max(1, classes // 2)
    args = inputs(classes, 3, classes, width, mode, 2)
    for name in SOLVES:
        want = getattr(cpu, name)(*args, last(name, 3))
        same(getattr(gpu, name)(*args, last(name, 3)), want, 1e-8)


@pytest.mark.parametrize("mode", ["label", "grad"])
def test_many_problems_of_mixed_rank(gpu: Any, order: None, mode: str) -> None:
    """More than a block's 128, not a multiple of it; some are left to teams, most are not. Whatever
    order the threads run in, no digit changes."""
    gram, log_prob, label, grad = inputs(3, 150, 10, 13, mode, 2)
    dependent = torch.zeros(150, 2, dtype=torch.bool)
    dependent[::7, 0] = dependent[3::11, 1] = True
    few = torch.randn(150, 2, 9, 4, dtype=torch.float64)
    gram[dependent] = (few @ few.mT)[dependent]
    for name in SOLVES:
        args = (gram, log_prob, label, grad, last(name, 150))
        got = getattr(gpu, name)(*args)
        same(got, getattr(cpu, name)(*args), 1e-8)
        if name == "solve_exact":
            assert torch.equal(got[1], torch.where(dependent, 4, 9))
        alone = getattr(gpu, name)(
            gram[100:101], log_prob[100:101], None if label is None else label[100:101],
            None if grad is None else grad[100:101],
            args[4][100:101] if name == "solve_damped" else args[4],
        )  # fmt: skip
        for one, all_ in zip(results(alone), results(got), strict=True):
            assert torch.equal(one, all_[100:101])


@pytest.mark.parametrize("name", SOLVES)
def test_order_of_threads_changes_nothing(
    gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for classes, width in ((10, 4), (14, 16), (21, 9)):
        args = (*inputs(5, 3, classes, width, "label"), last(name, 3))
        seen = []
        for order in (*ORDERS, "2", "3"):
            monkeypatch.setenv("FASTFI_EMULATED_ORDER", order)
            seen.append(results(getattr(gpu, name)(*args)))
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("mode", ["label", "grad"])
def test_absent_classes(gpu: Any, mode: str) -> None:
    """Lumped samples: classes of probability zero, whose contrasts are zero."""
    gram, log_prob, label, grad = inputs(7, 6, 8, 12, mode)
    for sample, kept in enumerate((2, 3, 8, 5, 7, 2)):
        log_prob[sample, kept:] = -torch.inf
        log_prob[sample] = log_prob[sample].log_softmax(0)
        gram[sample, :, kept - 1 :] = gram[sample, :, :, kept - 1 :] = 0.0
        if label is not None:
            label[sample] = sample % kept
        if grad is not None:
            grad[sample, kept:] = 0.0
            grad[sample] -= grad[sample].sum() / kept
            grad[sample, kept:] = 0.0
    for name in SOLVES:
        args = (gram, log_prob, label, grad, last(name, 6))
        got = getattr(gpu, name)(*args)
        same(got, getattr(cpu, name)(*args), 1e-8)
        if name == "solve_exact":
            assert got[1].squeeze(1).tolist() == [1, 2, 7, 4, 6, 1]


def test_labels_outside_the_classes_give_nan(gpu: Any) -> None:
    for classes in (4, 12, 19):
        gram, log_prob, label, _ = inputs(9, 4, classes, classes + 1, "label")
        assert label is not None
        label[1], label[2] = classes, -1
        for name in SOLVES:
            fi, *rank = results(getattr(gpu, name)(gram, log_prob, label, None, last(name, 4)))
            assert fi.isnan().squeeze(1).tolist() == [False, True, True, False]
            assert all(r[1] == 0 and r[2] == 0 for r in rank)
    rows = torch.randn(3, 4, 1, 3, 3)
    log_prob = torch.randn(3, 5).double().log_softmax(1)
    label = torch.tensor([0, 5, 1])
    for inverse in INVERSES:
        tau = torch.ones(3, dtype=torch.float64) if inverse == "damped" else None
        fi, _ = gpu.window_influence(
            rows, log_prob, label, None, (1, 3), "joint", inverse, 1e-3, tau, False
        )
        assert fi.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert not fi[[0, 2]].isnan().any()


def test_nothing_to_do(gpu: Any) -> None:
    gram, log_prob, label, _ = inputs(1, 3, 4, 5, "label")
    for name in SOLVES:
        empty = (gram[:0], log_prob[:0], label[:0] if label is not None else None, None)
        out = results(getattr(gpu, name)(*empty, last(name, 0)))
        assert all(t.shape == (0, 1) for t in out)
        no_blocks = (gram[:, :0], log_prob, label, None)
        assert all(
            t.shape == (3, 0) for t in results(getattr(gpu, name)(*no_blocks, last(name, 3)))
        )
    fi, _ = gpu.window_influence(
        torch.empty(0, 3, 1, 4, 4), log_prob[:0], label[:0] if label is not None else None, None,
        (1, 3), "separate", "exact", 1e-6, None, True,
    )  # fmt: skip
    assert fi.shape == (0, 2, 1, 4, 4)


def test_strided_inputs(gpu: Any) -> None:
    gram, log_prob, label, _ = inputs(11, 4, 6, 7, "label")
    assert label is not None
    odd = torch.stack([gram, gram + 1], 0).flatten(0, 1)[:4].transpose(2, 3)
    wide = torch.cat([log_prob, log_prob], 1)[:, :6]
    labels = torch.stack([label, label], 1)[:, 0]
    assert not wide.is_contiguous() and not labels.is_contiguous()
    same(
        gpu.solve_exact(odd, wide, labels, None, 1e-9),
        gpu.solve_exact(gram, log_prob, label, None, 1e-9),
        1e-12,
    )


def test_results_stay_inside_their_memory(gpu: Any) -> None:
    """The kernels are given the middle of a larger buffer, for results and workspace alike."""
    kernels = kernel_module()
    gram, log_prob, label, _ = inputs(13, 131, 10, 4, "label")
    assert label is not None
    n = 131
    fi = torch.full((n + 64,), -7.0, dtype=torch.float64)
    rank = torch.full((n + 64,), -7, dtype=torch.int64)
    for rule in range(2):
        problem = kernels.Solve(
            rule, gram.data_ptr(), log_prob.data_ptr(), label.data_ptr(), 0, 0, 1e-12, 1e-18, 1e-3,
            n, 1, 9, 10, fi[32:].data_ptr(), rank[32:].data_ptr(),
        )  # fmt: skip
        work = torch.full((problem.workspace() + 64,), -7.0, dtype=torch.float64)
        problem.run(0, 0, work[32:].data_ptr())
        for t in (fi, rank, work):
            assert (t[:32] == -7).all() and (t[-32:] == -7).all()
        assert (fi[32:-32] >= 0).all() and (rank[32:-32] > 0).all()


def test_device_guard(gpu: Any) -> None:
    kernels = kernel_module()
    gram, log_prob, label, _ = inputs(15, 2, 4, 5, "label")
    assert label is not None
    fi = torch.empty(2, dtype=torch.float64)
    tau = torch.ones(2, dtype=torch.float64)
    problem = kernels.Solve(
        2, gram.data_ptr(), log_prob.data_ptr(), label.data_ptr(), 0, tau.data_ptr(), 0.0, 0.0,
        0.0, 2, 1, 3, 4, fi.data_ptr(), 0,
    )  # fmt: skip
    problem.run(1, 0, 0)
    assert kernels.last_device() == 1
    assert kernels.device() == 0  # as before the call
    with pytest.raises(RuntimeError, match="CUDA error: invalid device ordinal"):
        problem.run(2, 0, 0)
    assert kernels.device() == 0
    problem.run(0, 0, 0)  # an error does not stay
    assert kernels.last_device() == 0


def test_workspace_is_bounded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many problems: scratch of teams stays below 512 MiB, lists of windows below 256."""
    monkeypatch.setenv("FASTFI_EMULATED_BLOCKS", "gpu")
    kernels = kernel_module()

    def windows(classes: int, n: int, samples: int) -> Any:
        return kernels.Windows(
            0, 0, False, [samples, n, 3, 1, 224, 224], classes, False, [0, 1, 2, 3], [0, 1, 2, 3],
            0, 1, 0, 0, 1e-12, 1e-18, 0.0, 0, 0,
        )  # fmt: skip

    for classes in (100, 300):
        problem = kernels.Solve(
            0, 0, 0, 1, 0, 0, 1e-12, 1e-18, 0.0, 10**6, 100, classes - 1, classes, 0, 0
        )
        # Near it: as many teams as the memory has room for.
        assert 500 << 20 <= problem.workspace() * 8 <= 512 << 20
        assert 500 << 20 <= windows(classes, classes - 1, 10**4).workspace() * 8 <= 512 << 20
    assert windows(10, 9, 10**5).workspace() * 8 <= 257 << 20
