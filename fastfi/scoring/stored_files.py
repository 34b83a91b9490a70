"""One file of scores, Parquet or CSV, read in pieces of bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastfi._extras import require
from fastfi.errors import DataError
from fastfi.scoring.stored_columns import Columns, conform, excerpt, is_number

__all__ = ["ScoreTable", "open_table"]

_ROWS = 65_536  # read at once
_INTEGER = "^(0|-?[1-9][0-9]{0,17})$"  # fits int64, and is written the same way again


class ScoreTable(Protocol):
    """A file of scores.

    Attributes:
        path: of the file, as it was given: for messages.
        at: its absolute path, by which it is read.
        rows: their number.
        schema: pyarrow.Schema of all columns.
        metadata: of fastfi, without "fastfi." before the names; {} where there is none.
    """

    path: Path
    at: Path
    rows: int
    schema: Any
    metadata: Mapping[str, Any]

    def read(self, names: Sequence[str], columns: Columns) -> Iterator[Any]:
        """pyarrow tables of consecutive rows, with these columns in the set's types."""


def open_table(path: Path) -> ScoreTable:
    """The file's header is read, and for CSV all ids.

    Raises:
        DataError: the file is gone, truncated, or of another kind.
    """
    return _Csv(path) if path.suffix.lower() == ".csv" else _Parquet(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading into DataError, which names the file."""
    pa = require("pyarrow", "reading scores", "score")
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: was removed while it was read") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or excerpt(error)}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        kind = "CSV" if path.suffix.lower() == ".csv" else "Parquet"
        raise DataError(
            f"{path}: cannot be read as {kind}: truncated, or something else? ({excerpt(error)})"
        ) from error


def _metadata(schema: Any) -> dict[str, Any]:
    """fastfi's entries of a schema's metadata, decoded."""
    found = {}
    for key, value in (schema.metadata or {}).items():
        if key.startswith(b"fastfi."):
            text = value.decode(errors="replace")
            try:
                found[key[7:].decode(errors="replace")] = json.loads(text)
            except ValueError:  # a plain string
                found[key[7:].decode(errors="replace")] = text
    return found


class _Parquet:
    def __init__(self, path: Path) -> None:
        # absolute: the process may change its folder before it reads on
        self.path, self.at = path, path.absolute()
        parquet = require("pyarrow.parquet", "reading scores", "score")
        with _reading(path), parquet.ParquetFile(self.at) as file:
            self.rows: int = file.metadata.num_rows
            schema = file.schema_arrow
        self.metadata: Mapping[str, Any] = _metadata(schema)
        self.schema = schema.remove_metadata()

    def read(self, names: Sequence[str], columns: Columns) -> Iterator[Any]:
        pa = require("pyarrow", "reading scores", "score")
        parquet = require("pyarrow.parquet", "reading scores", "score")
        have = [name for name in names if name in self.schema.names]
        with _reading(self.path), parquet.ParquetFile(self.at) as file:
            # "fi:a" brings "fi:a.b" along, by pyarrow's rule for nested columns: conform selects
            for batch in file.iter_batches(_ROWS, columns=have or ["id"]):
                table = pa.Table.from_batches([batch])
                yield conform(table, names, columns, str(self.path))


class _Csv:
    """RFC 4180 with a header line, UTF-8. Empty fields are nulls, but for ids."""

    metadata: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, path.absolute()
        pa = require("pyarrow", "reading scores", "score")
        csv = require("pyarrow.csv", "reading scores", "score")
        compute = require("pyarrow.compute", "reading scores", "score")
        with _reading(path), self._open({}) as reader:
            names = reader.schema.names
        self._types = {n: pa.float64() if is_number(n) else pa.string() for n in names}
        self.rows, id_type = 0, pa.int64()
        with _reading(path):
            if "id" in names and names.count("id") == 1:
                with self._open({"id": pa.string()}, ["id"]) as reader:
                    for batch in reader:
                        self.rows += len(batch)
                        whole = compute.match_substring_regex(batch.column(0), _INTEGER)
                        if not compute.all(whole, min_count=0).as_py():
                            id_type = pa.string()
        self._types["id"] = id_type
        self.schema = pa.schema([pa.field(name, self._types.get(name)) for name in names])
        self._csv = csv

    def _open(self, types: Mapping[str, Any], names: Sequence[str] | None = None) -> Any:
        csv = require("pyarrow.csv", "reading scores", "score")
        return csv.open_csv(
            self.at,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=names, null_values=[""]
            ),
        )

    def read(self, names: Sequence[str], columns: Columns) -> Iterator[Any]:
        pa = require("pyarrow", "reading scores", "score")
        have = [name for name in names if name in self._types]
        with _reading(self.path), self._open(self._types, have or ["id"]) as reader:
            for batch in reader:
                yield conform(pa.Table.from_batches([batch]), names, columns, str(self.path))
