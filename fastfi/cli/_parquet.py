"""Parquet tables written row group by row group."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastfi._extras import require
from fastfi.cli._atomic import Table

__all__ = ["Column", "ParquetTable"]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: in the file.
        dtype: of the numbers; object for strings.
        nullable: whether values may be absent.
        width: numbers in each row, None for a plain column. Others are fixed-size lists.
    """

    name: str
    dtype: DTypeLike
    nullable: bool = False
    width: int | None = None


class ParquetTable(Table[Iterable[Any]]):
    """Rows as one sequence per column, of the same length; None where a column is absent.

    Args:
        file: open for writing.
        columns: see :class:`Column`.
        metadata: stored in the schema, each value as JSON unless it is a string.
        group: rows in a row group.
    """

    def __init__(
        self, file: BinaryIO, columns: Sequence[Column], metadata: Mapping[str, Any], group: int
    ) -> None:
        pa = self._pa = require("pyarrow", "writing Parquet files")
        parquet = require("pyarrow.parquet", "writing Parquet files")
        self._described, self._group = columns, group

        def kind(c: Column) -> Any:
            one = pa.string() if c.dtype is object else pa.from_numpy_dtype(c.dtype)
            return one if c.width is None else pa.list_(one, c.width)

        self._schema = pa.schema(
            [pa.field(c.name, kind(c), c.nullable) for c in columns],
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()},
        )
        plain = [c.name for c in columns if c.width is None]  # numbers of maps do not recur
        self._writer = parquet.ParquetWriter(file, self._schema, use_dictionary=plain)
        # One buffer for all row groups. Keeping each batch's own arrays instead would scatter small
        # blocks over the heap, between which the memory of large batches cannot be used again.
        self._columns: list[NDArray[Any]] = [
            np.empty(group if c.width is None else (group, c.width), c.dtype) for c in columns
        ]
        self._absent = [False] * len(columns)
        self._rows = 0

    def write(self, rows: Iterable[Any]) -> None:
        columns = list(rows)
        n, done = len(columns[0]), 0
        while done < n:
            start = self._rows
            stop = min(start + n - done, self._group)
            part = slice(done, done + stop - start)
            for i, values in enumerate(columns):
                self._absent[i] = values is None
                if values is not None:
                    self._columns[i][start:stop] = values[part]
            self._rows, done = stop, part.stop
            if stop == self._group:
                self._flush()

    def _flush(self) -> None:
        columns = [
            self._array(i, field.type) if not absent else self._pa.nulls(self._rows, field.type)
            for i, (field, absent) in enumerate(zip(self._schema, self._absent, strict=True))
        ]
        self._writer.write_batch(self._pa.record_batch(columns, schema=self._schema))
        self._rows = 0

    def _array(self, i: int, kind: Any) -> Any:
        values, width = self._columns[i][: self._rows], self._described[i].width
        if width is None:
            return self._pa.array(values, kind)
        return self._pa.FixedSizeListArray.from_arrays(self._pa.array(values.reshape(-1)), width)

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def abandon(self) -> None:
        self._writer.close()
