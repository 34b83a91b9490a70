"""Scored rows that wait to be written, in memory that is taken once.

Keeping each batch's own arrays instead would scatter small blocks over the heap, between which the
memory of the network's activations cannot be used again: with a small CNN, 8,192 rows of 60 bytes
held 130 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastfi.scoring.scorer import Columns

__all__ = ["RowBuffer"]

_FIRST = 8192  # rows that there is room for from the beginning


class RowBuffer:
    """Columns of consecutive rows.

    Args:
        kinds: "float" or "int" for each column of numbers, without label and predicted.
        most: rows that may be put, at most.
    """

    def __init__(self, kinds: Mapping[str, str], most: int) -> None:
        kinds = {"label": "int", "predicted": "int", **kinds}
        self._room = min(_FIRST, most)
        dtypes = {name: np.float64 if k == "float" else np.int64 for name, k in kinds.items()}
        self._numbers: dict[str, Any] = {
            name: np.ma.masked_all(self._room, dtype) for name, dtype in dtypes.items()
        }
        self._ids: list[Any] = []
        self._errors: list[str | None] = []

    def put(self, at: int, columns: Columns) -> None:
        """Puts rows at a position; what was there and behind it is gone."""
        n = len(columns["id"])
        if at + n > self._room:
            self._room = max(at + n, 2 * self._room)
            for name, values in self._numbers.items():
                larger = np.ma.masked_all(self._room, values.dtype)
                larger[:at] = values[:at]
                self._numbers[name] = larger
        for name, values in self._numbers.items():
            values[at : at + n] = columns[name]
        self._ids[at:] = columns["id"]
        self._errors[at:] = columns["error"]

    def first(self, n: int) -> Columns:
        """The first n rows."""
        numbers = {name: values[:n] for name, values in self._numbers.items()}
        return {"id": self._ids[:n], **numbers, "error": self._errors[:n]}
