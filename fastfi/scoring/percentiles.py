"""Percentiles of FI over a data set, as in Table 2 of Shu and Zhu (2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from fastfi.errors import OptionError

__all__ = ["PERCENTILES", "percentile", "percentiles"]

PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99, 100)


def percentile(ordered: NDArray[np.float64], q: float) -> float:
    """A percentile, linearly interpolated (numpy's default); infinite values are allowed.

    Args:
        ordered: [n], n >= 1, increasing.
        q: 0 to 100.
    """
    position = q / 100 * (len(ordered) - 1)
    i = math.floor(position)
    low, high = float(ordered[i]), float(ordered[min(i + 1, len(ordered) - 1)])
    return low if low == high or position == i else low + (position - i) * (high - low)


def percentiles(
    values: NDArray[np.float64], q: float | Sequence[float] = PERCENTILES
) -> dict[float, float]:
    """Several percentiles of values in any order.

    Args:
        values: [n], n >= 1, without NaN.
        q: each 0 to 100.

    Raises:
        OptionError: a q that is no number from 0 to 100.
    """
    given = list(q) if isinstance(q, Iterable) else [q]
    for each in given:
        if isinstance(each, bool) or not isinstance(each, Real) or not 0 <= float(each) <= 100:
            raise OptionError(f"q: expected numbers from 0 to 100, got {each!r}")
    ordered = np.sort(values)
    return {each: percentile(ordered, each) for each in given}
