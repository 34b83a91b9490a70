"""Other programs over the kernels: the test suite, and the memory and race checkers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from bench.gpu_report import Run

__all__ = ["CHOSEN", "sanitize", "tests"]

ROOT = Path(__file__).resolve().parent.parent
TAIL = 4000  # characters of an output that are kept

# The tests of the operators and of the public calls on a device, in processes side by side. Others
# are about the command line, readers and pictures.
# Each file that has Triton compile kernels for minutes gets a process, or two.
CHOSEN = (
    ("test_on_device.py",),
    ("test_gram.py", "test_solve_properties.py"),
    ("test_layer_ops.py",),
    ("test_segments.py", "test_ops.py", "test_windows_op.py", "test_windows_tiles.py"),
    ("test_windows_properties.py", "test_windows_oracle.py"),
    ("test_triton_gram.py", "-k", "test_integers"),
    ("test_triton_gram.py", "-k", "not test_integers"),
    ("test_triton_layers.py", "test_triton_sums.py"),
    ("test_solve_accuracy.py", "test_cuda_graphs.py"),
)


class _Program:
    """A program under way, its output in a file."""

    def __init__(self, command: Sequence[str], **variables: str) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ends it and what it started, which would keep the device busy."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self, seconds: float) -> tuple[int | None, str]:
        """Waits so long; exit status (None: it was stopped), and the end of what it said."""
        status: int | None
        try:
            status = self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            status = None
        self._file.seek(0)
        with self._file:
            return status, self._file.read().decode(errors="replace")[-TAIL:]


def tests(run: Run) -> None:
    """Runs pytest with ``--device``; the chosen files, or all."""
    groups: Sequence[Sequence[str]] = [
        [f"tests/{word}" if word.endswith(".py") else word for word in group] for group in CHOSEN
    ]
    if run.options.get("all_tests"):
        groups = [["tests"]]
    elif run.rehearsal:
        groups = [["tests/test_on_device.py", "-k", "forwarded"]]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "--no-header"]
    command += ["-p", "no:cacheprovider", "--device", run.device]
    threads = str(max(1, (os.cpu_count() or 1) // len(groups)))
    with ExitStack() as stack:
        under_way = []
        for files in groups:
            under_way.append(_Program([*command, *files], OMP_NUM_THREADS=threads))
            stack.callback(under_way[-1].stop)  # a key that is pressed does not reach it
        ends = [program.end(run.left() - 5) for program in under_way]
    for files, (status, output) in zip(groups, ends, strict=True):
        lines = output.strip().splitlines() or ["(nothing)"]
        title = f"tests of {' '.join(f.removeprefix('tests/') for f in files)}"
        run.note("tests", {title: {"status": status, "output": output}})
        run.add(title, note=lines[-1][:100], target="all pass", met=status == 0, main=True)
        if status != 0:
            why = "ran out of time" if status is None else f"ended with status {status}"
            text = f"{output}\npytest {why}: {lines[-1][:200]}"
            run.report.fail(run.section, " ".join(files), text)


def sanitize(run: Run) -> None:
    """compute-sanitizer's memcheck and racecheck over :mod:`bench.gpu_small`, at once; without
    them, that script alone."""
    script = [sys.executable, "-m", "bench.gpu_small", "--device", run.device]
    script += ["--seed", str(run.seed)]
    tools = ("memcheck", "racecheck") if run.device == "cuda" else ("",)
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    with ExitStack() as stack:
        under_way = {}
        for tool in tools:
            command = script
            if tool:
                # Libraries provoke errors of the driver's interface and handle them; kernels'
                # accesses are what counts. 9: an exit status that nothing else has.
                command = [checker, "--tool", tool, "--error-exitcode", "9"]
                command += ["--report-api-errors", "no", "--print-limit", "20", *script]
            # Every tensor an allocation of its own, or an access past its end would meet another.
            with run.guard(tool or "small shapes"):
                under_way[tool] = _Program(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
                stack.callback(under_way[tool].stop)
        ends = {tool: program.end(run.left() - 5) for tool, program in under_way.items()}
    for tool, (status, output) in ends.items():
        with run.guard(tool or "small shapes"):
            name = tool or "small shapes, not on a GPU"
            run.note("sanitize", {name: {"status": status, "output": output}})
            met = status == 0 and "all operators right" in output
            last = (output.strip().splitlines() or ["(nothing)"])[-1][:100]
            run.add(f"sanitize, {name}", note=last, target="no error", met=met, main=True)
            if not met:
                raise AssertionError(f"{output}\n{name}: expected status 0, got {status}")
