"""What the figures depend on: the machine and its software, and the ceilings of the same run."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from bench.gpu_clock import Clock, precision, tf32_state
from bench.gpu_report import Run

__all__ = ["ceilings", "copy_bandwidth", "environment"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _smi(query: str) -> str:
    """What nvidia-smi says, which is only asked."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or "unknown"


def environment(run: Run) -> None:
    """Notes versions, the device, and which kernel each operator runs on it."""
    import fastfi

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "float32": tf32_state(),
        "commit": run.options.get("commit", "unknown"),
    }
    if run.device == "cuda":
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _smi("driver_version"),
            "clocks_idle": _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw"),
        }
    run.note("environment", found)
    for name, value in found.items():
        print(f"{name}: {value}")
    with run.guard("backends"):
        table = fastfi.backends()
        run.note("backends", table)
        for op, kernels in table.items():
            kernel = kernels.get(run.device, kernels["default"])
            own = not kernel.startswith("torch")
            met = own if run.device == "cuda" else None
            run.add(f"kernel of {op}", note=kernel, target="not torch's", met=met, main=not own)


def cache_bytes(run: Run) -> int:
    """Of the second-level cache."""
    if run.device != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def _measure_copy(run: Run) -> float:
    """Bytes read and written a second by a copy from one buffer to another."""
    size = 1 << (22 if run.rehearsal else 31)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    timing = Clock(run.device).time(lambda _: target.copy_(source))
    return 2 * size / timing.median


def copy_bandwidth(run: Run) -> float:
    """Bytes a second: as measured in this run, or measured now."""
    if "copy_bytes_per_s" not in run.report.facts:
        run.note("copy_bytes_per_s", _measure_copy(run))
    return float(run.report.facts["copy_bytes_per_s"])


def ceilings(run: Run) -> None:
    """Copy and read bandwidth, and the rates of matrix products of random numbers."""
    clock = Clock(run.device)
    with run.guard("copy"):
        rate = _measure_copy(run)
        run.note("copy_bytes_per_s", rate)
        run.add("device-to-device copy, read + written", 1e-9 * rate, "GB/s", main=True)
    with run.guard("read"):
        size = 1 << (20 if run.rehearsal else 29)
        source = torch.randn(size, device=run.device)
        timing = clock.time(lambda _, source=source: source.sum())
        run.add("sum of float32, read", 1e-9 * source.nbytes / timing.median, "GB/s")
        del source
    plans = [("float64", torch.float64, 4096), ("float32", torch.float32, 8192),
             ("bf16", torch.bfloat16, 8192), ("TF32", torch.float32, 8192)]  # fmt: skip
    for name, dtype, full in plans:
        n = 128 if run.rehearsal else full
        with run.guard(f"matrix product, {name}"), precision(tf32=name == "TF32"):
            a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)

            def product(_: int, a: Any = a, b: Any = b, out: Any = out) -> object:
                return torch.mm(a, b, out=out)

            timing = clock.time(product)
            rate = 2 * n**3 / timing.median
            run.note("flops", {name: rate})
            label = f"{name} matrix product, {n}^3"
            run.add(label, 1e-12 * rate, "TFLOP/s", main=name != "TF32")
