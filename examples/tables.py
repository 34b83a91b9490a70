"""What the examples print and save: percentiles, the most influential images, score files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["number", "percentiles", "save_scores"]

PERCENTILES = (5, 25, 50, 75, 90, 95, 99, 100)

Column = np.ndarray  # one value per image


def number(value: float) -> str:
    """Three significant digits, in powers of ten where that is shorter to read."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return f"{value:.2e}"


def percentiles(scores: Mapping[str, Column]) -> str:
    """A Markdown table: one row per set of scores, one column per percentile of FI."""
    names = [f"{p}th" for p in PERCENTILES[:-1]] + ["max"]
    width = max(len(name) for name in scores)
    head = f"| {'percentile of FI':<{width}} | " + " | ".join(f"{n:>8}" for n in names) + " |"
    rule = f"|:{'-' * (width + 1)}|" + f"{'-' * 9}:|" * len(names)
    rows = [head, rule]
    for name, values in scores.items():
        cells = " | ".join(f"{number(v):>8}" for v in np.percentile(values, PERCENTILES))
        rows.append(f"| {name:<{width}} | {cells} |")
    return "\n".join(rows)


def save_scores(out: Path, columns: Mapping[str, Column | Sequence[str]]) -> list[Path]:
    """Writes scores.csv, and scores.parquet where pyarrow is installed.

    Args:
        out: an existing folder.
        columns: columns of equal length, in order. Floats are written so that they read back
            exactly.

    Returns:
        The files written.
    """
    paths = [out / "scores.csv"]
    lists = [c.tolist() if isinstance(c, np.ndarray) else list(c) for c in columns.values()]
    with paths[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*lists, strict=True))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        print("pyarrow is not installed: no scores.parquet")
        return paths
    paths.append(out / "scores.parquet")
    pq.write_table(pa.table(dict(zip(columns, lists, strict=True))), paths[-1])
    return paths
