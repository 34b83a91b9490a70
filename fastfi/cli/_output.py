"""Score files: one row per image, Parquet or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from fastfi.cli._atomic import AtomicFile, Table, WriteError
from fastfi.cli._parquet import Column, ParquetTable

__all__ = ["ScoreFile", "Scores", "WriteError"]

_ROW_GROUP = 65_536  # rows collected before Parquet writes them, fewer where there are many columns
_LEAST = 4096


class Scores(NamedTuple):
    """Scores of b consecutive images, one field per column."""

    ids: Sequence[int] | Sequence[str]
    label: NDArray[np.int64] | None  # [b] the data's own label
    predicted: NDArray[np.int64]  # [b]
    log_prob: NDArray[np.float64]  # [b] of the class that FI was computed for
    fi: NDArray[np.float64]  # [b], or [b, L] for the columns of L blocks
    rank: NDArray[np.int64] | None  # likewise


@final
class ScoreFile(AtomicFile[Scores]):
    """A score file, complete or not there at all: see :class:`~fastfi.cli._atomic.AtomicFile`.

    Args:
        path: ending in .parquet or .csv.
        id_type: "int" or "str".
        metadata: stored in a Parquet file's schema, each value as JSON unless it is a string.
        overwrite: whether an existing file may be replaced.
        blocks: names of the L blocks of parameters that FI is of; None for one FI per image.
    """

    suffixes = (".parquet", ".csv")

    def __init__(
        self,
        path: Path,
        id_type: Literal["int", "str"],
        metadata: Mapping[str, Any],
        overwrite: bool = False,
        blocks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(path, overwrite)
        self._id_type, self._metadata = id_type, metadata
        ends = [""] if blocks is None else [f":{name}" for name in blocks]
        self._blocks = len(ends)
        self._columns = [
            Column("id", np.int64 if id_type == "int" else object),
            Column("label", np.int64, nullable=True),
            Column("predicted", np.int64),
            Column("log_prob", np.float64),
            *(Column(f"fi{end}", np.float64) for end in ends),
            *(Column(f"rank{end}", np.int64, nullable=True) for end in ends),
        ]

    def _table(self, file: BinaryIO) -> Table[Any]:
        if self._path.suffix.lower() == ".csv":
            return _Csv(file, [column.name for column in self._columns])
        group = max(_ROW_GROUP // self._blocks, _LEAST)
        return _Parquet(ParquetTable(file, self._columns, self._metadata, group))


def _columns(rows: Scores) -> list[Any]:
    """One sequence for each column; None where it is empty."""
    if rows.fi.ndim == 1:
        return list(rows)
    rank = [None] * rows.fi.shape[1] if rows.rank is None else list(rows.rank.T)
    return [*rows[:4], *rows.fi.T, *rank]


class _Parquet(Table[Scores]):
    """A Parquet table of scores."""

    def __init__(self, table: ParquetTable) -> None:
        self._table = table

    def write(self, rows: Scores) -> None:
        self._table.write(_columns(rows))

    def close(self) -> None:
        self._table.close()

    def abandon(self) -> None:
        self._table.abandon()


class _Csv(Table[Scores]):
    """RFC 4180 with a header line; floats with all their digits, absent values empty."""

    def __init__(self, file: BinaryIO, names: Sequence[str]) -> None:
        self._file = file
        self._append([names])

    def write(self, rows: Scores) -> None:
        empty = [None] * len(rows.ids)
        columns = [empty if c is None else c.tolist() for c in _columns(rows)[1:]]
        self._append(zip(rows.ids, *columns, strict=True))

    def close(self) -> None:
        pass

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())
