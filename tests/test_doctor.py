"""``python -m fastfi.doctor``, also where the installation is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastfi
from fastfi import doctor


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
    (found,) = [p for p in (copy / "fastfi").glob("_C*") if p.suffix in (".so", ".pyd")]
    return found


def test_a_working_installation(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert out.endswith("fastfi is ready.\n")
    assert torch.__version__ in out
    assert f"threads   {torch.get_num_threads()}" in out
    for op, kernels in fastfi.backends().items():
        line = next(line for line in out.splitlines() if line.strip().startswith(op))
        assert f"cpu: {kernels['cpu']}" in line
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
