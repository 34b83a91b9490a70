"""The CUDA kernels' own sources, compiled for the CPU with an emulation of blocks and warps.

``emulated_ops()`` gives ``fastfi.backends.cuda`` on top of that build: the same Python, the same
kernels, CPU tensors. It is built once (some 20 s) and again when a source changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pybind11
from torch import device

import fastfi

__all__ = ["build", "emulated_ops", "kernel_module"]

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "emulation" / "cuda_on_cpu.h"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra"]
FLAGS += ["-Werror"] if os.environ.get("FASTFI_STRICT") == "1" else []
# About vector types in signatures, which the CPU's lanes are made of; and nvcc's own pragmas.
FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"]


def build() -> Path:
    """The shared object of the emulated kernels, built if it is not there yet."""
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/bind_cuda.cpp"]
    headers = [SHIM, *sorted((ROOT / "csrc").rglob("*.h"))]
    compiler = os.environ.get("CXX", "g++")
    state = hashlib.sha256(" ".join([compiler, *FLAGS, sys.version]).encode())
    for path in [*sources, *headers]:
        state.update(path.read_bytes())
    folder = ROOT / "build" / "emulation" / state.hexdigest()[:16]
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    module = folder / f"_emulated{suffix}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, others wait for it
        if not module.exists():
            _compile(compiler, sources, module)
    return module


def _compile(compiler: str, sources: list[Path], module: Path) -> None:
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compiled(source: Path) -> str:
        out = module.parent / f"{source.name}.o"
        command = [compiler, *FLAGS, *include, "-include", str(SHIM), "-x", "c++", "-c"]
        subprocess.run([*command, str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    unfinished = module.parent / f"unfinished-{module.name}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(unfinished)], check=True)
    unfinished.rename(module)
    for path in objects:
        Path(path).unlink()


@lru_cache(maxsize=1)
def kernel_module() -> ModuleType:
    """The compiled part: what ``fastfi._CUDA`` is on a machine with nvcc, and a few questions to
    the emulation."""
    return _load("_emulated", build())


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def emulated_ops() -> ModuleType:
    """A copy of ``fastfi.backends.cuda`` that runs the emulated kernels."""
    kernels = kernel_module()
    path = ROOT / "fastfi" / "backends" / "cuda.py"
    with (
        mock.patch.dict(sys.modules, {"fastfi._CUDA": kernels}),
        mock.patch.object(fastfi, "_CUDA", kernels, create=True),
    ):
        module = _load("emulated_cuda", path)

    def no_stream(where: device) -> int:
        assert where.type == "cpu"
        return 0

    module._stream = no_stream  # type: ignore[attr-defined]
    return module
