"""``python -m fastfi.doctor``: what is installed, which kernels will run, what is missing.

Needs the standard library only, so that it can explain an installation in which torch or fastfi's
own compiled module does not import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

__all__ = ["main", "report"]

# import name, distribution, extra, what it is for
_OPTIONAL = (
    ("typer", "typer", "cli", "the fastfi command"),
    ("rich", "rich", "cli", "the fastfi command's progress bar"),
    ("pyarrow", "pyarrow", "cli", "Parquet data and Parquet scores"),
    ("PIL", "Pillow", "cli", "compressed images (Parquet data, image folders)"),
    ("safetensors", "safetensors", "cli", "safetensors weights"),
    ("matplotlib", "matplotlib", "plot", "plots"),
)


def report() -> tuple[list[str], list[str]]:
    """Examines the installation.

    Returns:
        The report's lines, and one entry per problem that keeps fastfi from running: what is
        wrong and what to do about it. Missing options are in the report, they are no problem.
    """
    lines: list[str] = []
    problems: list[str] = []
    here = Path(__file__).parent
    lines.append(f"fastfi    {_version('fastfi')} in {here}")
    lines.append(f"python    {platform.python_version()} ({sys.executable})")
    lines.append(f"system    {platform.platform()}, {os.cpu_count()} logical CPUs")
    torch = _required("torch", "pip install torch", lines, problems)
    _required("numpy", "pip install numpy", lines, problems)
    if torch is not None:
        lines.append(f"threads   {torch.get_num_threads()} (torch.set_num_threads changes it)")
    lines += ["", "Kernels"]
    lines += [f"  {line}" for line in _kernels(torch, problems)]
    lines += ["", "GPU"]
    lines += [f"  {line}" for line in _gpu(torch, problems)]
    lines += ["", "Options"]
    for name, distribution, extra, purpose in _OPTIONAL:
        state = _optional(name, distribution)
        advice = "" if state.startswith("ok") else f': pip install "fastfi[{extra}]"'
        lines.append(f"  {distribution:<12} {state:<16} {purpose}{advice}")
    return lines, problems


def _version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a distribution)"


def _required(name: str, remedy: str, lines: list[str], problems: list[str]) -> ModuleType | None:
    module, error = _import(name)
    if module is None:
        lines.append(f"{name:<9} cannot be imported")
        problems.append(f"{name} cannot be imported ({error}). Do: {remedy}")
    else:
        lines.append(f"{name:<9} {getattr(module, '__version__', 'unknown version')}")
    return module


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why not. A damaged package can raise anything when imported."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _optional(name: str, distribution: str) -> str:
    module, error = _import(name)
    if module is not None:
        return f"ok {_version(distribution)}"
    return "not installed" if error.startswith("ModuleNotFoundError") else f"broken ({error})"


def _kernels(torch: ModuleType | None, problems: list[str]) -> list[str]:
    if torch is None:
        return ["unknown without torch"]
    compiled, error = _import("fastfi._C")
    if compiled is None:
        problems.append(_explain_extension(error))
        return ["the compiled module fastfi._C cannot be imported: no kernels"]
    package, error = _import("fastfi.backends")
    if package is None:
        problems.append(f"fastfi.backends cannot be imported ({error}). Do: reinstall fastfi")
        return ["fastfi.backends cannot be imported: no kernels"]
    sets = compiled.instruction_sets()
    lines = [
        f"CPU instruction set in use: {sets[0]} (this CPU and build can run: {', '.join(sets)})",
        f"torch's own CPU capability: {torch.backends.cpu.get_cpu_capability()}",
    ]
    backends: Callable[[], dict[str, dict[str, str]]] = package.backends
    try:
        table = backends()
    except ValueError as error:  # the environment asks for what there is not
        problems.append(f"{error}. Do: unset or change the environment variable")
        return [*lines, "which kernels run is unclear (see PROBLEM below)"]
    except ImportError:  # the compiled CUDA module, which is examined with the GPU
        return [*lines, "which kernels run is unclear (see PROBLEM below)"]
    for op, kernels in table.items():
        row = (f"{'other devices' if d == 'default' else d}: {k}" for d, k in kernels.items())
        lines.append(f"{op:<16} {'; '.join(row)}")
    return lines


def _built(name: str) -> list[str]:
    """File names of a compiled module of fastfi, whatever Python they were built for."""
    here = Path(__file__).parent
    return sorted(p.name for p in here.glob(f"{name}.*") if p.suffix in (".so", ".pyd"))


def _explain_extension(error: str) -> str:
    """What is wrong with fastfi._C and what to do about it."""
    here = Path(__file__).parent
    found = _built("_C")
    if not found:
        why = f"there is none in {here}: it was not built"
        if (here.parent / "setup.py").exists():
            why += (
                ", and this is a source tree (start Python elsewhere to use an installed fastfi, "
                "or build in place with: pip install -e .)"
            )
    else:
        why = (
            f"{', '.join(found)} in {here} was built for another Python or system, or is damaged "
            f"(this is {platform.python_implementation()} {platform.python_version()} on "
            f"{platform.machine()})"
        )
    return (
        f"fastfi's compiled module does not import ({error}): {why}. "
        "Do: install fastfi again (pip install --force-reinstall --no-deps, from where it came), "
        "which needs a C++17 compiler where there is no wheel for this system"
    )


def _gpu(torch: ModuleType | None, problems: list[str]) -> list[str]:
    driver = _nvidia_driver()
    lines = [f"NVIDIA driver: {driver or 'none found'}"]
    if torch is None:
        return lines
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else ""
    lines.append(f"torch built for: {built or 'CPU only'}")
    usable = torch.cuda.is_available()
    if usable:
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            capability = f"{properties.major}.{properties.minor}"
            if not hip and (properties.major, properties.minor) < (8, 0):
                capability += ": too old for fastfi's kernels (8.0), runs plain torch"
            lines.append(f"cuda:{i}: {properties.name}, {memory:.0f} GiB, capability {capability}")
    elif driver and not built:
        lines.append("there is a GPU but this torch cannot use it: install a CUDA build of torch")
    elif driver or built:
        lines.append("torch finds no usable GPU: everything runs on the CPU")
    else:
        lines.append("no GPU: everything runs on the CPU, and cuda: above tells what one would run")
    lines += [*_cuda_module(problems), _triton(usable, problems)]
    chosen = os.environ.get("FASTFI_GPU_KERNELS")
    if chosen:
        lines.append(f"FASTFI_GPU_KERNELS={chosen}: of the GPU's kernels, only these and torch's")
    return lines


def _cuda_module(problems: list[str]) -> list[str]:
    """The state of fastfi._CUDA, which is optional: a problem only where it is broken."""
    module, error = _import("fastfi._CUDA")
    name = "compiled CUDA kernels (fastfi._CUDA)"
    if module is not None:
        return [f"{name}: built for {', '.join(module.targets())}"]
    found = _built("_CUDA")
    if not found and error == "ModuleNotFoundError: No module named 'fastfi._CUDA'":
        return [
            f"{name}: not built",
            "  because nvcc was not found at build time, or FASTFI_CUDA=0 was set. To get them:",
            "  install the CUDA toolkit, then fastfi again; FASTFI_CUDA=1 makes the build insist",
        ]
    problems.append(
        f"fastfi's compiled CUDA module does not import ({error}): {', '.join(found) or 'it'} was "
        "built for another Python or system, or is damaged. Do: install fastfi again (pip install "
        "--force-reinstall --no-deps, from where it came; FASTFI_CUDA=0 builds without the "
        "module). Until then FASTFI_GPU_KERNELS=triton or torch does without"
    )
    return [f"{name}: broken"]


def _triton(usable: bool, problems: list[str]) -> str:
    """The state of triton, which is optional: a problem only where it is broken and a GPU would run
    it."""
    state = _optional("triton", "triton")
    if state.startswith("broken") and usable:
        problems.append(
            f"triton cannot be imported ({state}). Do: install it again (pip install "
            "--force-reinstall triton). Until then FASTFI_GPU_KERNELS=torch does without"
        )
    lacking = _lacking_for_triton() if state.startswith("ok") and usable else ""
    if lacking:
        problems.append(
            "triton builds its launchers with a C compiler when they are first used, and there is "
            f"no {lacking}. Do: install it, or run without triton: FASTFI_GPU_KERNELS=compiled or "
            "torch"
        )
    what = "Gram matrices and norms' sums on a GPU"
    advice = ': pip install "fastfi[gpu]"' if state == "not installed" else ""
    choose, _ = _import("fastfi.backends.choose")
    if choose is not None and state.startswith("ok") and choose.triton_is_old():
        advice = ", too old for them: 3.5 is the first with products of float64 matrices"
    return f"triton: {state} ({what}){advice}"


def _lacking_for_triton() -> str:
    """What triton needs beside itself to run on a GPU and does not find; empty if nothing."""
    # As triton looks for it (triton/runtime/build.py).
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "gcc or clang in PATH, and no other compiler named by CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.exists() else f"{header} (python3-dev in Debian and Ubuntu)"


def _nvidia_driver() -> str:
    """Version of the driver and name of the first GPU, empty if nvidia-smi finds none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def main() -> int:
    """Prints the report.

    Returns:
        0, or 1 if something keeps fastfi from running.
    """
    lines, problems = report()
    print("\n".join(lines))
    print()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    if not problems:
        print("fastfi is ready.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
