"""The CUDA module as it is built: warnings, targets, and what it links. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")


def compiled_modules() -> list[str]:
    """fastfi._C, and fastfi._CUDA where it was built."""
    specs = [importlib.util.find_spec(f"fastfi.{name}") for name in ("_C", "_CUDA")]
    return [spec.origin for spec in specs if spec is not None and spec.origin is not None]


@needs_nvcc
@pytest.mark.parametrize("target", ["compute_80", "compute_90"])
def test_no_warning_from_nvcc_or_the_host_compiler(target: str, tmp_path: Path) -> None:
    """Front ends for device and host, for every target, warnings as errors; the code generator,
    which has nothing to say, is left at its fastest."""
    assert NVCC is not None
    host = "-Wall,-Wextra,-Werror,-Wno-psabi,-Wno-ignored-attributes"
    command = [NVCC, "-std=c++17", "-ptx", f"-arch={target}", "-Werror", "all-warnings"]
    command += ["-Xcompiler", host, "-Xcicc", "-O0"]

    def problems(source: Path) -> str:
        out = tmp_path / f"{source.stem}.ptx"
        done = subprocess.run(
            [*command, str(source), "-o", str(out)], capture_output=True, text=True, check=False
        )
        return "" if done.returncode == 0 and out.exists() else f"{source.name}: {done.stderr}"

    assert len(SOURCES) >= 7
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert not any(found := [p for p in pool.map(problems, SOURCES) if p]), "\n".join(found)


@needs_nvcc
def test_the_module_is_there_where_nvcc_is() -> None:
    if os.environ.get("FASTFI_CUDA") == "0":
        pytest.skip("FASTFI_CUDA=0: built without")
    from fastfi import _CUDA  # type: ignore[attr-defined]

    assert _CUDA.targets() == ["sm_80", "sm_90", "compute_90"]


@needs_nvcc
def test_code_for_every_target() -> None:
    """What the module says of itself is in the file: machine code and PTX."""
    assert NVCC is not None
    triton = importlib.util.find_spec("triton")  # brings the tool too
    places = [Path(NVCC).resolve().parent]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    tool = shutil.which("cuobjdump", path=os.pathsep.join(map(str, places)))
    modules = [m for m in compiled_modules() if "_CUDA" in Path(m).name]
    if tool is None or not modules:
        pytest.skip("no cuobjdump here, or no module")

    def listed(option: str) -> str:
        command = [tool, option, modules[0]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert all(f".{target}.cubin" in listed("--list-elf") for target in ("sm_80", "sm_90"))
    assert ".sm_90.ptx" in listed("--list-ptx")


def test_modules_link_neither_torch_nor_cuda() -> None:
    """They survive an upgrade of torch, and load where there is no CUDA at all."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf here")
    modules = compiled_modules()
    assert modules
    for module in modules:
        command = [readelf, "--dynamic", "--wide", module]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed = [line for line in said.splitlines() if "(NEEDED)" in line]
        assert any("libc.so" in line for line in needed), said  # the list was understood
        for name in ("torch", "c10", "cudart", "libcuda", "nvrtc", "cublas"):
            assert not any(name in line for line in needed), f"{module} links {name}"


def test_a_setting_that_setup_does_not_know(tmp_path: Path) -> None:
    environment = {**os.environ, "FASTFI_CUDA": "yes"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    if "No module named" not in done.stderr:  # setuptools and pybind11, which the build brings
        assert "FASTFI_CUDA: expected 0, 1 or nothing, got 'yes'" in done.stderr


@pytest.mark.parametrize("wanted", ["", "0", "1"])
def test_an_nvcc_that_fails(tmp_path: Path, wanted: str) -> None:
    """What it said and what to do about it are told; in a folder with a space in its name."""
    nvcc = tmp_path / "a toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho nvcc is out of order >&2\nexit 3\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "FASTFI_CUDA": wanted, "CUDA_HOME": str(nvcc.parent.parent)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "No module named" in done.stderr:
        pytest.skip("needs setuptools and pybind11, which the build brings")
    assert (done.returncode == 0) == (wanted == "0"), done.stderr
    if wanted != "0":
        assert "nvcc is out of order" in done.stderr
        assert "FASTFI_CUDA=0 builds without" in done.stderr
        assert "Traceback" not in done.stderr
