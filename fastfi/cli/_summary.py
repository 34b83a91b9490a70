"""The percentiles of FI over a data set, as in Table 2 of Shu and Zhu (2019)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastfi.scoring.percentiles import percentile

__all__ = ["PERCENTILES", "percentile", "percentile_table"]

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def percentile_table(fi: NDArray[np.float64], name: str = "FI") -> str:
    """Two Markdown lines of percentiles and their header.

    Args:
        fi: [n] in any order, n >= 1.
        name: the row's title.
    """
    ordered = np.sort(fi)
    heads = ["", "min", *(f"{q} %" for q in PERCENTILES), "max"]
    values = [ordered[0], *(percentile(ordered, q) for q in PERCENTILES), ordered[-1]]
    cells = [name, *(f"{v:.4g}" for v in values)]
    widths = [max(len(h), len(c), 3) for h, c in zip(heads, cells, strict=True)]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return "\n".join([line(heads), rule, line(cells)])
