"""What the emulation of blocks and warps finds: races, barriers, launches of several threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import ROOT


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
