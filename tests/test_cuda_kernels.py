"""The CUDA kernels' sources, run by the emulation: launches, teams, order, memory, refusals.

Their accuracy is tested with that of all other implementations (fixtures ``ops``, ``window_ops``).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import ROOT, emulated_ops, kernel_module
from torch import Tensor

from fastfi.backends import cpu, reference_windows

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = ("0", "1", "12345")  # of threads that can go on: forwards, backwards, at random
SOLVES = ("solve_exact", "solve_truncated", "solve_damped")
INVERSES = ("exact", "truncated", "damped")
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@pytest.fixture(scope="module")
def gpu() -> Any:
    return emulated_ops()


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFI_EMULATED_ORDER", request.param)


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


# shape [B, C, *spatial], classes, scales, channels
WINDOWS = {
    "an image": ((2, 3, 6, 7), 10, (1, 3, 5), "separate"),
    "channels together, scales in any order": ((2, 3, 6, 7), 10, (5, 1, 3), "joint"),
    "wider than a block's 64 columns": ((1, 1, 9, 130), 4, (1, 3), "separate"),
    "a signal longer than a block": ((2, 2, 150), 7, (1, 9, 3), "mean"),
    "a volume": ((1, 1, 3, 4, 5), 5, (1, 3), "separate"),
    "teams of 16": ((1, 2, 5, 4), 14, (1, 3), "separate"),
    "warps": ((1, 1, 4, 4), 20, (3,), "separate"),
    "one pixel": ((2, 1, 1, 1), 3, (1, 3), "separate"),
    "more scales than a launch takes": ((1, 1, 2, 3), 2, tuple(range(1, 41, 2)), "separate"),
    "two classes": ((2, 2, 4, 5), 2, (1, 3), "joint"),
}


def window_inputs(shape: tuple[int, ...], classes: int, mode: str) -> tuple[Tensor, ...]:
    gram, log_prob, label, grad = inputs(sum(shape) + classes, shape[0], classes, 3, mode)
    return torch.randn(shape[0], gram.shape[-1], *shape[1:]), log_prob, label, grad  # type: ignore[return-value]


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("mode", ["label", "grad", "raw"])
def test_windows(gpu: Any, poisoned: None, name: str, mode: str) -> None:
    shape, classes, scales, channels = WINDOWS[name]
    args = window_inputs(shape, classes, mode)
    for inverse in INVERSES:
        tau = torch.linspace(0.2, 0.9, shape[0]).double() if inverse == "damped" else None
        rest = (scales, channels, inverse, parameter(inverse), tau, True)
        same(gpu.window_influence(*args, *rest), cpu.window_influence(*args, *rest), 1e-8)


@pytest.mark.parametrize("inverse", INVERSES)
def test_windows_too_wide_for_shared_memory(gpu: Any, inverse: str) -> None:
    args = window_inputs((1, 1, 1, 420), 10, "label")
    tau = torch.ones(1, dtype=torch.float64) if inverse == "damped" else None
    rest = ((801,), "separate", inverse, parameter(inverse), tau, True)
    problem = (args[0][..., :6], *args[1:])  # the reference on all of it would take minutes
    small = ((11,), "separate", inverse, parameter(inverse), tau, True)
    same(gpu.window_influence(*problem, *small), cpu.window_influence(*problem, *small), 1e-8)
    same(gpu.window_influence(*args, *rest), cpu.window_influence(*args, *rest), 1e-8)


@pytest.mark.parametrize("kilobytes", [99, 163])
def test_windows_on_smaller_devices(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    """Compute capability 8.6 and 8.0: tiles and teams fit the device's shared memory."""
    monkeypatch.setenv("FASTFI_EMULATED_SHARED", str(kilobytes << 10))
    args = window_inputs((1, 1, 6, 150), 10, "grad")
    for inverse in INVERSES:
        tau = torch.ones(1, dtype=torch.float64) if inverse == "damped" else None
        rest = ((1, 7, 151), "separate", inverse, parameter(inverse), tau, True)
        same(gpu.window_influence(*args, *rest), cpu.window_influence(*args, *rest), 1e-8)
    for classes, mode in ((17, "label"), (16, "raw")):
        teams = inputs(17, 2, classes, 20, mode)
        for name in SOLVES:
            want = getattr(cpu, name)(*teams, last(name, 2))
            same(getattr(gpu, name)(*teams, last(name, 2)), want, 1e-8)


def test_windows_in_any_order(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = window_inputs((1, 2, 5, 9), 9, "label")
    for inverse in INVERSES:
        tau = torch.ones(1, dtype=torch.float64) if inverse == "damped" else None
        seen = []
        for order in (*ORDERS, "8"):
            monkeypatch.setenv("FASTFI_EMULATED_ORDER", order)
            seen.append(gpu.window_influence(
                *args, (1, 3, 7), "separate", inverse, parameter(inverse), tau, True))  # fmt: skip
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_of_rows(gpu: Any, dtype: torch.dtype) -> None:
    rows, *rest = window_inputs((2, 1, 4, 4), 6, "label")
    rows = rows.to(dtype)
    got = gpu.window_influence(rows, *rest, (1, 3), "separate", "exact", 1e-6, None, True)
    want = reference_windows.window_influence(
        rows, *rest, (1, 3), "separate", "exact", 1e-6, None, True
    )
    same(got, want, 1e-8)


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


def run_on_the_emulation(
    folder: Path, program: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Compiles a program with the emulation, and runs it."""
    source, out = folder / "program.cpp", folder / "program"
    source.write_text(program)
    include = ["-include", str(ROOT / "tests/emulation/cuda_on_cpu.h"), f"-I{ROOT / 'csrc'}"]
    command = ["g++", "-std=c++17", *options, *include, str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    return subprocess.run([str(out)], capture_output=True, text=True, check=False)


def test_a_launch_takes_no_shared_memory_from_another_threads(tmp_path: Path) -> None:
    """What a kernel may have is a setting of the kernel: it must never become less."""
    done = run_on_the_emulation(tmp_path, """
        #include "cuda/runtime.h"
        struct Nothing {};
        void kernel(Nothing) { FASTFI_SHARED(s); s[0] = 1.0; }
        int main() {
          using fastfi::gpu::launch;
          fastfi::gpu::emulate(kernel, 1, 32, 60 << 10, Nothing{});
          if (cudaGetLastError() == cudaSuccess) return 1;  // nobody asked for more than 48 KiB
          if (launch(kernel, 1, 32, 200 << 10, nullptr, Nothing{}) != cudaSuccess) return 2;
          if (launch(kernel, 1, 32, 60 << 10, nullptr, Nothing{}) != cudaSuccess) return 3;
          // Another thread, that asked for its 200 KiB before the call above, launches now.
          fastfi::gpu::emulate(kernel, 1, 32, 200 << 10, Nothing{});
          return cudaGetLastError() == cudaSuccess ? 0 : 4;
        }
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_emulation_finds_a_barrier_that_not_all_reach(tmp_path: Path) -> None:
    """And writes beyond shared memory, and an order that matters: what these tests rely on."""
    done = run_on_the_emulation(tmp_path, """
        #include "cuda/runtime.h"
        struct Nothing { int* out; };
        void stuck(Nothing) { if (threadIdx.x < 32) __syncthreads(); }
        void beyond(Nothing) { FASTFI_SHARED(s); s[4] = 1.0; }
        void race(Nothing n) { if (threadIdx.x == 0) *n.out = 1; else *n.out = 2; }
        int main() {
          int out = 0;
          const Nothing n{&out};
          const auto run = [&](void (*kernel)(Nothing)) {
            return fastfi::gpu::launch(kernel, 1, 64, 32, nullptr, n) != cudaSuccess;
          };
          if (!run(stuck) || !run(beyond) || run(race)) return 1;
          const int forwards = out;
          setenv("FASTFI_EMULATED_ORDER", "1", 1);
          if (run(race)) return 2;
          return forwards == out ? 3 : 0;
        }
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a barrier that not all threads reach" in done.stderr
    assert "writes beyond its shared memory" in done.stderr


THREAD_SANITIZER = ("-O1", "-g", "-fsanitize=thread", "-Wno-psabi", "-Wno-ignored-attributes")


@pytest.fixture(scope="module")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Its options, where the compiler has it and the system lets it run."""
    folder = tmp_path_factory.mktemp("sanitizer")
    (folder / "nothing.cpp").write_text("int main() {}")
    command = ["g++", "-fsanitize=thread", str(folder / "nothing.cpp"), "-o", str(folder / "out")]
    built = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not built or subprocess.run([str(folder / "out")], check=False).returncode != 0:
        pytest.skip("no thread sanitizer here")
    return THREAD_SANITIZER


def test_no_race_in_any_order(thread_sanitizer: tuple[str, ...], tmp_path: Path) -> None:
    """Also where the order that the emulation takes hides it: between a team's members only
    barriers order reads and writes, as on a GPU, and shuffles do not."""
    program = (ROOT / "tests/emulation/races.cpp").read_text()
    done = run_on_the_emulation(tmp_path, program, *thread_sanitizer)
    assert done.returncode == 0, done.stderr[:4000]


def test_the_sanitizer_finds_a_shuffle_in_a_barriers_place(
    thread_sanitizer: tuple[str, ...], tmp_path: Path
) -> None:
    program = """
        #include "cuda/runtime.h"
        struct Nothing {};
        template <bool Barrier>
        void kernel(Nothing) {
          FASTFI_SHARED(s);
          s[threadIdx.x] = threadIdx.x;
          double x = __shfl_xor_sync(~0u, 1.0, 1);
          if (Barrier) __syncwarp(~0u);
          s[32 + threadIdx.x] = x + s[threadIdx.x ^ 1];
        }
        int main() {
          return fastfi::gpu::launch(kernel<BARRIER>, 1, 32, 512, nullptr, Nothing{});
        }
    """
    done = run_on_the_emulation(tmp_path, program, *thread_sanitizer, "-DBARRIER=true")
    assert done.returncode == 0, done.stderr
    done = run_on_the_emulation(tmp_path, program, *thread_sanitizer, "-DBARRIER=false")
    assert done.returncode != 0
    assert "data race" in done.stderr
