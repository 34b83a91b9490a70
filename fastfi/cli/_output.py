"""Score files: written beside their destination, put there when they are complete."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from fastfi._extras import require
from fastfi.errors import FastfiError, OptionError

__all__ = ["COLUMNS", "ScoreFile", "Scores", "WriteError", "check_output"]

COLUMNS = ("id", "label", "predicted", "log_prob", "fi", "rank")
_DTYPES = (np.int64, np.int64, np.float64, np.float64, np.int64)  # of all columns but id
_ROW_GROUP = 65_536  # rows collected before Parquet writes them


class WriteError(FastfiError, OSError):
    """The scores cannot be written."""


class Scores(NamedTuple):
    """Scores of b consecutive images, one field per column."""

    ids: Sequence[int] | Sequence[str]
    label: NDArray[np.int64] | None  # [b] the data's own label
    predicted: NDArray[np.int64]  # [b]
    log_prob: NDArray[np.float64]  # [b] of the class that FI was computed for
    fi: NDArray[np.float64]  # [b]
    rank: NDArray[np.int64] | None  # [b]


def check_output(path: Path, overwrite: bool) -> None:
    """Checks that scores may be written to ``path``.

    Raises:
        OptionError: neither .parquet nor .csv, no such folder, or something is there already.
    """
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise OptionError(f"--out {path}: expected a name ending in .parquet or .csv")
    if not path.parent.is_dir():
        raise OptionError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OptionError(f"--out {path}: is a folder")
    if path.exists() and not overwrite:
        raise OptionError(f"--out {path}: exists already; --overwrite replaces it")


@final
class ScoreFile:
    """A context manager that writes a score file completely or not at all.

    Rows go to a hidden temporary file in the same folder. When the block ends without an exception
    it is renamed to ``path``; otherwise (an error, Ctrl-C) it is removed and whatever ``path`` held
    stays as it was.

    Args:
        path: ending in .parquet or .csv.
        id_type: "int" or "str".
        metadata: stored in a Parquet file's schema, each value as JSON unless it is a string.
        overwrite: whether an existing file may be replaced.

    Raises:
        OptionError: see :func:`check_output`.
        WriteError: the disk is full, no permission, ...
    """

    def __init__(
        self,
        path: Path,
        id_type: Literal["int", "str"],
        metadata: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self._path, self._overwrite = path, overwrite
        self._id_type, self._metadata = id_type, metadata

    def __enter__(self) -> ScoreFile:
        check_output(self._path, self._overwrite)
        self._part = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.part")
        with self._reporting():
            # O_EXCL: never another process's file; 0o666 is what open() uses, less the umask
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._file = os.fdopen(os.open(self._part, flags, 0o666), "wb")
        try:
            with self._reporting():
                table = _Parquet if self._path.suffix.lower() == ".parquet" else _Csv
                self._table: _Table = table(self._file, self._id_type, self._metadata)
        except BaseException:
            self._file.close()
            self._part.unlink()
            raise
        return self

    def write(self, scores: Scores) -> None:
        """Appends rows."""
        with self._reporting():
            self._table.write(scores)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with self._reporting():
                self._table.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                check_output(self._path, self._overwrite)  # again: hours may have passed
                os.replace(self._part, self._path)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        # Closing flushes what is buffered, which fails again where writing has just failed; the
        # exception that brought us here is the one to report.
        with suppress(OSError, ValueError):
            self._table.close()
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FastfiError):
                raise
            raise WriteError(f"cannot write {self._path}: {error.strerror or error}") from error


class _Table(ABC):
    """Rows to an open file, which stays open."""

    @abstractmethod
    def __init__(
        self, file: BinaryIO, id_type: Literal["int", "str"], metadata: Mapping[str, Any]
    ) -> None: ...

    @abstractmethod
    def write(self, scores: Scores) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class _Csv(_Table):
    """RFC 4180 with a header line; floats with all their digits, absent values empty."""

    def __init__(
        self, file: BinaryIO, id_type: Literal["int", "str"], metadata: Mapping[str, Any]
    ) -> None:
        self._file = file
        self._append([COLUMNS])

    def write(self, scores: Scores) -> None:
        empty = [None] * len(scores.ids)
        columns = [empty if c is None else c.tolist() for c in scores[1:]]
        self._append(zip(scores.ids, *columns, strict=True))

    def close(self) -> None:
        pass

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())


class _Parquet(_Table):
    """One row group per 65,536 rows."""

    def __init__(
        self, file: BinaryIO, id_type: Literal["int", "str"], metadata: Mapping[str, Any]
    ) -> None:
        pa = self._pa = require("pyarrow", "writing Parquet files")
        parquet = require("pyarrow.parquet", "writing Parquet files")
        ids = pa.int64() if id_type == "int" else pa.string()
        types = [ids, pa.int64(), pa.int64(), pa.float64(), pa.float64(), pa.int64()]
        nullable = ("label", "rank")
        self._schema = pa.schema(
            [pa.field(n, t, n in nullable) for n, t in zip(COLUMNS, types, strict=True)],
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()},
        )
        self._writer = parquet.ParquetWriter(file, self._schema)
        # One buffer for all row groups. Keeping each batch's own arrays instead would scatter small
        # blocks over the heap, between which the memory of large batches cannot be used again.
        dtypes = [np.int64 if id_type == "int" else object, *_DTYPES]
        self._columns: list[NDArray[Any]] = [np.empty(_ROW_GROUP, t) for t in dtypes]
        self._absent = [False] * len(COLUMNS)
        self._rows = 0

    def write(self, scores: Scores) -> None:
        n, done = len(scores.ids), 0
        while done < n:
            start = self._rows
            stop = min(start + n - done, _ROW_GROUP)
            part = slice(done, done + stop - start)
            for i, values in enumerate(scores):
                self._absent[i] = values is None
                if values is not None:
                    self._columns[i][start:stop] = values[part]
            self._rows, done = stop, part.stop
            if stop == _ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        pa, n = self._pa, self._rows
        columns = [
            pa.nulls(n, field.type) if absent else pa.array(values[:n], field.type)
            for field, values, absent in zip(self._schema, self._columns, self._absent, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows = 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
