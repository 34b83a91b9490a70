"""The columns of the page: typed arrays in base64, as plotly writes them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfi.report._sheet import Measure, Sheet

__all__ = ["class_list", "column_bytes", "pack", "pack_sheet", "within"]

_TYPES = {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4",
          "uint32": "u4", "float32": "f4", "float64": "f8"}  # fmt: skip
MOST_ERRORS = 1000  # whose texts the page's search knows
COLUMNS_BUDGET = (
    8_000_000  # bytes of base64 for columns of FI; a page of 60,000 points and 25 layers
)


def pack(values: NDArray[Any]) -> dict[str, str]:
    """``{"dtype": "f4", "bdata": base64}``, little-endian."""
    array = np.ascontiguousarray(values)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {
        "dtype": _TYPES[array.dtype.name],
        "bdata": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _smallest(values: NDArray[np.int64]) -> NDArray[Any]:
    """The same integers in the narrowest type that JavaScript has an array for."""
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32):
        info = np.iinfo(dtype)
        if not len(values) or (values.min() >= info.min and values.max() <= info.max):
            return values.astype(dtype)
    return values.astype(np.float64)  # exact up to 2^53


def class_list(sheets: Sequence[Sheet]) -> list[int]:
    """The classes that labels and predictions hold, in order."""
    every = np.concatenate([np.unique(a) for s in sheets for a in (s.label, s.predicted)])
    return [int(k) for k in np.unique(every) if k >= 0]


def _classes(values: NDArray[np.int64], classes: Sequence[int]) -> dict[str, str]:
    """Positions in ``classes``; their number stands for none."""
    at = np.searchsorted(np.asarray(classes, np.int64), values)
    return pack(_smallest(np.where(values < 0, len(classes), at).astype(np.int64)))


def _ids(ids: Sequence[int] | Sequence[str]) -> dict[str, Any]:
    """Ids as a range, numbers, or a list of texts."""
    if all(type(i) is int for i in ids):
        if all(i == row for row, i in enumerate(ids)):
            return {"range": len(ids)}
        if all(abs(int(i)) < 2**53 for i in ids):
            return {"numbers": pack(_smallest(np.array(ids, np.int64)))}
    return {"texts": [str(i) for i in ids]}


def _logarithms(fi: NDArray[np.float64]) -> dict[str, str]:
    """log10 FI in float32: seven digits of an exponent, and no bounds. -inf is 0, NaN none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return pack(np.log10(fi).astype(np.float32))


def column_bytes(sheets: Sequence[Sheet]) -> int:
    """What one column of FI takes on the page."""
    return sum(len(sheet) for sheet in sheets) * 16 // 3


def within(sheets: Sequence[Sheet], wanted: Sequence[Measure]) -> list[Measure]:
    """The measures whose columns the page holds: all, or those of so many layers, in order, as fit
    into the budget; at least one layer."""
    blocks = list(dict.fromkeys(m.block for m in wanted))
    variants = len({m.variant for m in wanted})
    count = max(1, COLUMNS_BUDGET // (column_bytes(sheets) * variants))
    kept = set(blocks[:count])
    return [m for m in wanted if m.block in kept]


def pack_sheet(sheet: Sheet, wanted: Sequence[Measure], classes: Sequence[int]) -> dict[str, Any]:
    """One set of scores, as report.js reads it."""
    fi = {m.column for m in wanted}
    others = {n for m in wanted for n in (m.log_prob, m.rank) if n in sheet.columns}
    numbers: dict[str, Any] = {name: _logarithms(sheet.columns[name]) for name in fi}
    for name in others:
        values = sheet.columns[name]
        if name.endswith("log_prob"):
            numbers[name] = pack(values.astype(np.float32))
        elif not np.isnan(values).all():
            numbers[name] = pack(_smallest(np.where(np.isnan(values), -1, values).astype(np.int64)))
    return {
        "name": sheet.name,
        "rows": len(sheet),
        "ids": _ids(sheet.ids),
        "label": _classes(sheet.label, classes),
        "predicted": _classes(sheet.predicted, classes),
        "numbers": dict(sorted(numbers.items())),
        "failed": pack(_smallest(np.array([row for row, _ in sheet.errors], np.int64))),
        "errors": [list(error) for error in sheet.errors[:MOST_ERRORS]],
    }
