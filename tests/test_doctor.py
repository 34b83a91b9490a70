"""``python -m fastfi.doctor``, also where the installation is broken."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastfi
from fastfi import doctor
from fastfi.backends import choose


@pytest.fixture(autouse=True)
def nothing_ruled_out(monkeypatch):
    monkeypatch.delenv("FASTFI_GPU_KERNELS", raising=False)


def run(path: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the doctor of the package found in ``path``, after ``code``."""
    start = ["-m", "fastfi.doctor"] if code is None else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *start],
        capture_output=True,
        text=True,
        cwd=path,
        env=environment,
        check=False,
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to be damaged."""
    source = Path(fastfi.__file__).parent
    shutil.copytree(source, tmp_path / "fastfi", ignore=shutil.ignore_patterns("__pycache__"))
    # An editable installation would find the modules that a test removes from the copy.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    )
    return tmp_path


def extension(copy: Path) -> Path:
    (found,) = [p for p in (copy / "fastfi").glob("_C.*") if p.suffix in (".so", ".pyd")]
    return found


def row(out: str, op: str) -> str:
    return next(line for line in out.splitlines() if line.strip().startswith(op))


def test_a_working_installation(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert out.endswith("fastfi is ready.\n")
    assert torch.__version__ in out
    assert f"threads   {torch.get_num_threads()}" in out
    for op, kernels in fastfi.backends().items():
        line = row(out, op)
        assert f"cpu: {kernels['cpu']}" in line
        assert f"cuda: {kernels['cuda']}" in line
        assert f"other devices: {kernels['default']}" in line
    assert "CPU instruction set in use: " in out
    assert "NVIDIA driver: " in out


def test_the_command_needs_no_extra(copy):
    """Without typer, rich, pyarrow, ...: the report says so and is no failure."""
    code = (
        "import sys\n"
        "for n in ('typer', 'rich', 'pyarrow', 'PIL', 'safetensors', 'matplotlib'):\n"
        "    sys.modules[n] = None\n"
        "from fastfi.doctor import main\n"
        "sys.exit(main())\n"
    )
    done = run(copy, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not installed") >= 6
    assert 'pip install "fastfi[cli]"' in done.stdout
    assert 'pip install "fastfi[plot]"' in done.stdout


def test_the_compiled_module_is_missing(copy):
    extension(copy).unlink()
    done = run(copy)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM: fastfi's compiled module does not import" in done.stdout
    assert "it was not built" in done.stdout
    assert "Do: install fastfi again" in done.stdout
    assert torch.__version__ in done.stdout  # the rest of the report is there
    assert "Traceback" not in done.stderr


def test_the_compiled_module_is_damaged(copy):
    extension(copy).write_bytes(b"not a library")
    done = run(copy)
    assert done.returncode == 1, done.stderr
    assert "was built for another Python or system, or is damaged" in done.stdout
    assert extension(copy).name in done.stdout


@pytest.fixture
def cuda_module(monkeypatch, tmp_path):
    """Called with a text, or None: fastfi._CUDA is the module of that text, or is not there."""
    name, real = "fastfi._CUDA", getattr(fastfi, "_CUDA", None)
    finders = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(fastfi, "__path__", [str(tmp_path)])  # its modules are imported already
    monkeypatch.setattr(doctor, "_built", lambda name: [])
    monkeypatch.setitem(sys.modules, name, None)  # to be restored
    del sys.modules[name]

    def replace(text: str | None) -> None:
        if text is not None:
            (tmp_path / "_CUDA.py").write_text(text)

    yield replace
    vars(fastfi).pop("_CUDA", None)  # importing it set this
    if real is not None:
        fastfi._CUDA = real


def test_the_cuda_module_was_not_built(cuda_module, capsys):
    """No problem, and what to do to get it."""
    cuda_module(None)
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "compiled CUDA kernels (fastfi._CUDA): not built" in out
    for part in ("nvcc was not found", "FASTFI_CUDA=0", "the CUDA toolkit", "FASTFI_CUDA=1"):
        assert part in out
    assert "cuda: torch reference" in row(out, "solve_exact")


def test_the_cuda_module_was_built(cuda_module, capsys):
    text = "def targets():\n    return ['sm_80', 'sm_90', 'compute_90']\n"
    cuda_module(text)
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "(fastfi._CUDA): built for sm_80, sm_90, compute_90" in out
    assert "cuda: CUDA C++ (sm_80, sm_90, compute_90)" in row(out, "window_influence")


def test_the_cuda_module_misses_a_library(cuda_module, capsys):
    """An error of importing something else is not taken for a module that was not built. It is a
    problem also without a GPU: the module is there to be used."""
    cuda_module("import no_such_module_of_anybody\n")
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "PROBLEM: fastfi's compiled CUDA module does not import (ModuleNotFoundError" in out
    assert "'no_such_module_of_anybody'" in out and "(fastfi._CUDA): broken" in out
    assert "which kernels run is unclear" in out
    assert "CPU instruction set in use" in out  # the rest of the report is there


def test_the_cuda_module_is_damaged(copy):
    name = extension(copy).name.replace("_C.", "_CUDA.")
    (copy / "fastfi" / name).write_bytes(b"not a library")
    done = run(copy)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM: fastfi's compiled CUDA module does not import (ImportError" in done.stdout
    assert name in done.stdout and "Do: install fastfi again" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture
def a_gpu(monkeypatch):
    """torch sees a GPU that is called nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize(("usable", "code"), [(True, 1), (False, 0)])
def test_triton_is_broken(monkeypatch, a_gpu, capsys, usable, code):
    """A problem for those whose GPU would run it."""
    known = doctor._import

    def importing(name):
        return (None, "OSError: libtriton.so") if name == "triton" else known(name)

    monkeypatch.setattr(doctor, "_import", importing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert doctor.main() == code
    out = capsys.readouterr().out
    assert "triton: broken (OSError: libtriton.so)" in out
    assert ("PROBLEM: triton cannot be imported" in out) == usable


@pytest.mark.parametrize("lacks", ["compiler", "header", ""])
def test_triton_finds_what_it_builds_with(a_gpu, monkeypatch, tmp_path, capsys, lacks):
    monkeypatch.setattr(doctor, "_optional", lambda name, distribution: "ok 3.6.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "")
    found = None if lacks == "compiler" else "/usr/bin/gcc"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: found)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if lacks != "header":
        (tmp_path / "Python.h").touch()
    assert doctor.main() == (1 if lacks else 0)
    out = capsys.readouterr().out
    want = {"compiler": "there is no gcc or clang in PATH", "header": "Python.h (python3-dev"}
    assert ("PROBLEM: triton builds its launchers" in out) == bool(lacks)
    assert want.get(lacks, "fastfi is ready") in out


def test_triton_is_too_old(monkeypatch, capsys):
    pytest.importorskip("triton")
    version = importlib.metadata.version
    old = {"triton": "3.4.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda n: old.get(n) or version(n))
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "triton: ok 3.4.0" in said
    assert "too old for them: 3.5 is the first with products of float64 matrices" in said


def test_triton_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "triton: not installed" in out and 'pip install "fastfi[gpu]"' in out
    assert "cuda: torch reference" in row(out, "gram")
    assert "cuda: torch matrix products" in row(out, "conv_gram")


def test_kernels_ruled_out(monkeypatch, capsys):
    monkeypatch.setenv("FASTFI_GPU_KERNELS", "torch")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "FASTFI_GPU_KERNELS=torch" in out
    assert all(f"cuda: {k['default']}" in row(out, op) for op, k in fastfi.backends().items())


def test_a_bad_word_in_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("FASTFI_GPU_KERNELS", "fast")
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "PROBLEM: FASTFI_GPU_KERNELS: expected one of" in out and "got 'fast'" in out
    assert "NVIDIA driver: " in out  # the rest of the report is there


@pytest.mark.parametrize(("major", "old"), [(7, True), (8, False), (9, False)])
def test_a_gpu_that_is_too_old(monkeypatch, capsys, major, old):
    properties = SimpleNamespace(name="NVIDIA", total_memory=16 << 30, major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 5))
    monkeypatch.setattr(doctor, "_lacking_for_triton", lambda: "")
    monkeypatch.setattr(choose, "found", lambda: (False, True))
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert f"cuda:0: NVIDIA, 16 GiB, capability {major}.5" in out
    assert ("too old for fastfi's kernels" in out) == old
    assert ("cuda: torch reference" in row(out, "gram")) == old


def test_torch_is_missing(copy):
    (copy / "torch.py").write_text("raise ImportError('libsomething.so.1: cannot open')")
    done = run(copy)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM: torch cannot be imported (ImportError: libsomething.so.1" in done.stdout
    assert "Do: pip install torch" in done.stdout


def test_a_gpu_that_torch_cannot_use(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "580.65.06, NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "NVIDIA driver: 580.65.06, NVIDIA H200" in out
    assert "this torch cannot use it: install a CUDA build of torch" in out


def test_nvidia_smi_that_fails(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._nvidia_driver() == ""
    tool.write_text("#!/bin/sh\necho 580.65.06, NVIDIA H200\necho second\n")
    assert doctor._nvidia_driver() == "580.65.06, NVIDIA H200"
