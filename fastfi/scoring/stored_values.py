"""Values of stored columns as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfi.errors import OptionError

__all__ = ["filled", "largest", "numbers", "row_numbers"]


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


def row_numbers(rows: Any, n: int) -> NDArray[np.int64]:
    """Numbers of rows [m], in the order given.

    Args:
        rows: integers from 0 to n - 1, or a mask [n] of bool.

    Raises:
        OptionError: it is neither.
    """
    try:
        given = np.asarray(rows)
    except ValueError as error:  # lists of different lengths
        raise OptionError(f"rows: expected row numbers or a mask ({error})") from error
    if given.dtype == np.bool_:
        if given.shape != (n,):
            raise OptionError(f"rows: expected a mask of shape [{n}], got {list(given.shape)}")
        return np.flatnonzero(given)
    given = given.reshape(-1)
    if not len(given):  # numpy takes an empty list for floats
        return np.empty(0, np.int64)
    if given.dtype.kind not in "iu":
        raise OptionError(f"rows: expected integers or a mask of bool, got {given.dtype}")
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise OptionError(f"expected rows 0..{n - 1}, got {outside[0]}")
    return given.astype(np.int64)
