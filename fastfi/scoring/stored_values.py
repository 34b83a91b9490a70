"""Values of stored columns as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["filled", "largest", "numbers"]


def numbers(column: Any) -> NDArray[np.float64]:
    """A column of numbers [n] as a float64 array of its own, NaN for null."""
    return np.array(column.to_numpy(), np.float64)


def filled(column: Any) -> NDArray[np.bool_]:
    """[n]: whether a column has a value."""
    return column.is_valid().to_numpy()


def largest(values: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """Positions of the n largest values, descending, ties by position; NaN does not count."""
    at = np.flatnonzero(~np.isnan(values))
    if 0 < n < len(at):
        bound = np.partition(values[at], len(at) - n)[len(at) - n]
        at = at[values[at] >= bound]
    return at[np.argsort(-values[at], kind="stable")][:n]
