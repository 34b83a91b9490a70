"""Peak memory of one call, in a process of its own. Linux only."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["AVAILABLE", "in_fresh_process", "peak_growth"]

_PROC = Path("/proc/self")
AVAILABLE = (_PROC / "status").exists()


def _status(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def _return_free_memory() -> None:
    """Gives freed heap pages back to the system, where the C library can: reused, they would not
    be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_growth(call: Callable[[], object]) -> tuple[int, bool]:
    """Bytes that the resident set grows by while ``call`` runs, at most; and whether the kernel let
    the process reset its high-water mark. Where it did not, an earlier peak may hide some."""
    _return_free_memory()
    try:
        (_PROC / "clear_refs").write_text("5")
        reset = True
    except OSError:
        reset = False
    before = _status("VmRSS") if reset else _status("VmHWM")
    result = call()  # kept until the mark is read
    growth = _status("VmHWM") - before
    del result
    return max(growth, 0), reset


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Runs ``python -m module arguments`` and reads the line of JSON that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)
