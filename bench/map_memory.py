"""Peak memory of one way to compute maps, in a process of its own; prints one line of JSON.

    python -m bench.map_memory window_influence damped
    python -m bench.map_memory eigh damped

The rows are made first and the code is run once on a corner of the image, so that neither they nor
libraries loaded late are counted: the peak is what the resident set grows above that level,
results included. Linux only.
"""

from __future__ import annotations

import argparse
import json

from bench.map_baselines import eigh_maps
from bench.map_problems import RULES, noise_problem, solve_maps
from bench.memory import peak_growth

__all__ = ["METHODS", "main"]

METHODS = ("window_influence", "eigh")


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
    line = {"peak_bytes": peak, "yardstick_bytes": q.rows.nbytes, "reset": reset}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
