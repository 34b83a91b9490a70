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

__all__ = ["COLUMNS", "ScoreFile", "Scores", "WriteError"]

COLUMNS = ("id", "label", "predicted", "log_prob", "fi", "rank")
_ROW_GROUP = 65_536  # rows collected before Parquet writes them


class Scores(NamedTuple):
    """Scores of b consecutive images, one field per column."""

    ids: Sequence[int] | Sequence[str]
    label: NDArray[np.int64] | None  # [b] the data's own label
    predicted: NDArray[np.int64]  # [b]
    log_prob: NDArray[np.float64]  # [b] of the class that FI was computed for
    fi: NDArray[np.float64]  # [b]
    rank: NDArray[np.int64] | None  # [b]


@final
class ScoreFile(AtomicFile[Scores]):
    """A score file, complete or not there at all: see :class:`~fastfi.cli._atomic.AtomicFile`.

    Args:
        path: ending in .parquet or .csv.
        id_type: "int" or "str".
        metadata: stored in a Parquet file's schema, each value as JSON unless it is a string.
        overwrite: whether an existing file may be replaced.
    """

    suffixes = (".parquet", ".csv")

    def __init__(
        self,
        path: Path,
        id_type: Literal["int", "str"],
        metadata: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        super().__init__(path, overwrite)
        self._id_type, self._metadata = id_type, metadata

    def _table(self, file: BinaryIO) -> Table[Any]:
        if self._path.suffix.lower() == ".csv":
            return _Csv(file)
        columns = [
            Column("id", np.int64 if self._id_type == "int" else object),
            Column("label", np.int64, nullable=True),
            Column("predicted", np.int64),
            Column("log_prob", np.float64),
            Column("fi", np.float64),
            Column("rank", np.int64, nullable=True),
        ]
        return ParquetTable(file, columns, self._metadata, _ROW_GROUP)


class _Csv(Table[Scores]):
    """RFC 4180 with a header line; floats with all their digits, absent values empty."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._append([COLUMNS])

    def write(self, rows: Scores) -> None:
        empty = [None] * len(rows.ids)
        columns = [empty if c is None else c.tolist() for c in rows[1:]]
        self._append(zip(rows.ids, *columns, strict=True))

    def close(self) -> None:
        pass

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())
