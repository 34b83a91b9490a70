"""Peak memory of one way to compute maps, in a process of its own; prints one line of JSON.

    python -m bench.map_memory window_influence damped
    python -m bench.map_memory eigh damped

The rows are made first and the code is run once on a corner of the image, so that neither they nor
libraries loaded late are counted: the peak is what the resident set grows above that level,
results included. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from pathlib import Path

from bench.map_baselines import eigh_maps
from bench.map_problems import RULES, noise_problem, solve_maps

__all__ = ["METHODS", "main", "peak_growth"]

METHODS = ("window_influence", "eigh")
_PROC = Path("/proc/self")


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


def main() -> None:
    """Measures on 224 x 224 x 3, ten classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("rule", choices=RULES)
    options = parser.parse_args()
    solve = solve_maps if options.method == "window_influence" else eigh_maps
    q = noise_problem()
    solve(q._replace(rows=q.rows[..., :8, :8].contiguous()), options.rule)
    peak, reset = peak_growth(lambda: solve(q, options.rule))
    rows = q.rows.nbytes
    print(json.dumps({"peak_bytes": peak, "rows_bytes": rows, "reset": reset}))


if __name__ == "__main__":
    main()
