"""Scores that are stored, opened for reading: a folder, or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastfi._extras import MissingExtraError, require
from fastfi.errors import DataError, OptionError
from fastfi.scoring.percentiles import PERCENTILES, percentiles
from fastfi.scoring.stored_columns import (
    Columns,
    block_names,
    is_fi,
    planned_columns,
    unify,
)
from fastfi.scoring.stored_files import ScoreTable, open_table
from fastfi.scoring.stored_parts import Stored, find_parts, gaps
from fastfi.scoring.stored_values import filled, largest, numbers, row_numbers

__all__ = ["PERCENTILES", "Scores", "Summary", "open_scores"]


class Summary(NamedTuple):
    """What :meth:`Scores.summary` tells.

    Attributes:
        rows: samples, those without a score included.
        scored: samples with a score in the first column of FI.
        errors: samples with an error.
        accuracy: the part of samples, among those with a label and a prediction, where the two
            agree; None where there are none.
        percentiles: of the first column of FI; {} where nothing is scored.
        complete: see :class:`Scores`.
    """

    rows: int
    scored: int
    errors: int
    accuracy: float | None
    percentiles: dict[float, float]
    complete: bool


class Scores:
    """Scores of a data set as they are stored, one row per sample, in the data's order.

    Made by :func:`open_scores` and :func:`fastfi.score`. Columns are read when they are asked for,
    and only those; none is kept. The parts are those that were there at the time of opening: to see
    what a run has written since, open again.

    Columns (absent values are null): ``id`` (int64 or string); ``label``, ``predicted`` (int64);
    ``log_prob`` (float64, of the class that FI is of); FI (float64, 0 to inf): ``fi``, or
    ``fi:NAME`` for each of several blocks, with ``@OBJECTIVE`` behind it for several objectives;
    ``rank`` or ``rank:NAME`` (int64); with y="both" these three again for the predicted class:
    ``predicted_log_prob``, ``predicted_fi...``, ``predicted_rank...``; ``error`` (string): why a
    sample has no score.

    Attributes:
        path: of the folder or file, as it was given.
        config: the measure: "wrt", "inverse", "y", "objective", ...; None if it is not stored.
        model: its class and digest; None if it is not stored.
        data: its kind, length and digest; None if it is not stored.
        class_names: None if they are not stored.
        complete: whether the manifest says that every row is there, and as many are; where no
            manifest is, whether no part in the middle is seen to be missing.
        missing: ranges [start, stop) of rows that are known to be missing.
        id_type: "int" or "str".
        columns: names, in order; () while a run has not written anything. Of a finished run on
            data without samples: those that it would have written.
        fi_columns: the columns of FI among them, without those of the predicted class.
        blocks: names of several blocks; () for one.
    """

    def __init__(self, path: str | PathLike[str], stored: Stored | None = None) -> None:
        """See :func:`open_scores`. ``stored``: what is there; None finds it out."""
        self.path = Path(path)
        manifest, parts = find_parts(self.path) if stored is None else stored
        self._files: list[ScoreTable] = []
        for part in parts:
            file = open_table(part.path)
            if part.rows is not None and file.rows != part.rows[1] - part.rows[0]:
                raise DataError(
                    f"{part.path}: expected {part.rows[1] - part.rows[0]} rows, as its name says, "
                    f"got {file.rows}"
                )
            self._files.append(file)
        self._starts = np.cumsum([0, *(file.rows for file in self._files)])  # [parts + 1]
        about = manifest if manifest is not None else self._files[0].metadata
        self.config = _mapping(about.get("config"))
        self.model = _mapping(about.get("model"))
        self.data = _mapping(about.get("data"))
        names = about.get("class_names")
        self.class_names = tuple(map(str, names)) if isinstance(names, list) else None
        ranges = [part.rows for part in parts if part.rows is not None]
        said = manifest is None or manifest.get("complete") is True
        length = None if manifest is None else manifest.get("rows")
        if length is None and not said:
            length = (self.data or {}).get("length")
        told = len(ranges) == len(parts)  # by the files' names
        self.missing = gaps(ranges, length if isinstance(length, int) else None) if told else ()
        self.complete: bool = said and not self.missing
        if self._files:
            self._columns = unify([(str(file.path), file.schema) for file in self._files])
        else:
            planned = planned_columns(manifest or {})
            empty = said and length == 0  # data without samples; otherwise nothing is there yet
            self._columns = planned if empty else Columns({}, planned.id_type)
        self.id_type: Literal["int", "str"] = self._columns.id_type
        self.columns = tuple(self._columns.types)
        self.fi_columns = tuple(filter(is_fi, self.columns))
        self.blocks = block_names(self.columns)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        lines = [f"Scores of {len(self):,} samples in {self.path}"]
        if not self.complete:
            some = ", ".join(f"{a}..{b - 1}" for a, b in self.missing[:3])
            more = ", ..." if len(self.missing) > 3 else ""
            lines[0] += f" (unfinished; rows {some}{more} are missing)" if some else " (unfinished)"
        if self.config is not None:
            known = ("wrt", "inverse", "y", "labels", "objective")
            given = [f"{k}={self.config[k]!r}" for k in known if self.config.get(k) is not None]
            lines.append("  " + ", ".join(given))
        if self.columns:
            shown = [*self.columns[:12], "..."] if len(self.columns) > 13 else self.columns
            lines.append("  columns: " + ", ".join(shown))
        return "\n".join(lines)

    @cached_property
    def errors(self) -> int:
        """The number of rows whose error is filled."""
        if "error" not in self.columns:
            return 0
        return sum(int(filled(table.column("error")).sum()) for table in self.tables(["error"]))

    @property
    def files(self) -> tuple[Path, ...]:
        """The parts, as absolute paths, in the order of their rows."""
        return tuple(file.at for file in self._files)

    @property
    def schema(self) -> Any:
        """pyarrow.Schema of all columns."""
        pa = require("pyarrow", "reading scores", "score")
        return pa.schema(list(self._columns.types.items()))

    def column(self, column: str | None = None) -> str:
        """The name of a column of numbers; None means the first of ``fi_columns``.

        Raises:
            OptionError: no such column, or one of ids or texts. DataError: there is none yet.
        """
        pa = require("pyarrow", "reading scores", "score")
        if column is None and self.fi_columns:
            return self.fi_columns[0]
        if column is None:
            raise DataError(f"{self.path}: holds no scores yet")
        kind = self._columns.types[self._known([column])[0]]
        if column == "id" or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            types = self._columns.types.items()
            good = [c for c, t in types if t in (pa.int64(), pa.float64()) and c != "id"]
            raise OptionError(
                f"column {column!r} holds no scores; those that do are {', '.join(good)}"
            )
        return column

    def _known(self, columns: Sequence[str] | None) -> list[str]:
        """The names of the columns, which are all there; None means all."""
        if columns is None:
            return list(self.columns)
        if isinstance(columns, str):
            raise OptionError(f"columns: expected a list of names, got {columns!r}")
        names = list(columns)
        for name in names:
            if name not in self._columns.types:
                raise OptionError(
                    f"no column {name!r} in {self.path}; there are "
                    f"{', '.join(self.columns) or 'none yet'}"
                )
            if names.count(name) > 1:
                raise OptionError(f"columns: {name!r} was given more than once")
        return names

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """pyarrow tables of consecutive rows, in the data's order: for scores that do not fit into
        memory.

        Args:
            columns: names, in the order wanted; None means all.

        Raises:
            OptionError: no such column. DataError: a file cannot be read (any more).
        """
        names = self._known(columns)
        return (table for file in self._files for table in file.read(names, self._columns))

    def to_table(self, columns: Sequence[str] | None = None) -> Any:
        """All rows as a pyarrow.Table, in the data's order. Arguments, errors: :meth:`tables`."""
        pa = require("pyarrow", "reading scores", "score")
        names = self._known(columns)
        schema = pa.schema([pa.field(name, self._columns.types[name]) for name in names])
        return pa.concat_tables([schema.empty_table(), *self.tables(names)])

    def to_pandas(self, columns: Sequence[str] | None = None) -> Any:
        """A pandas.DataFrame of all rows, in the data's order; integers with absent values become
        float64 with NaN. Arguments and errors: :meth:`tables`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                f"Scores.to_pandas needs pandas, which cannot be imported ({error}): "
                "pip install pandas"
            ) from error
        return self.to_table(columns).to_pandas()

    def values(self, column: str | None = None, errors: bool = False) -> NDArray[np.float64]:
        """A column of numbers [rows], NaN where a sample has none or an error. inf is kept.

        Args:
            column: None means the first of ``fi_columns``.
            errors: whether samples with an error keep what they have: their label.
        """
        name = self.column(column)
        read = [name] + ["error"] * ("error" in self.columns and not errors)
        parts = []
        for table in self.tables(read):
            values = numbers(table.column(name))
            if "error" in read:
                values[filled(table.column("error"))] = np.nan
            parts.append(values)
        return np.concatenate(parts) if parts else np.empty(0)

    def percentiles(
        self, q: Sequence[float] = PERCENTILES, column: str | None = None
    ) -> dict[float, float]:
        """Percentiles over the samples that have a score, linearly interpolated: Table 2 of Shu and
        Zhu (2019).

        Args:
            q: each 0 to 100.
            column: of numbers; None means the first of ``fi_columns``.

        Returns:
            q -> value; {} where the data has no samples.

        Raises:
            OptionError: no such column, or a q out of range. DataError: there are samples, and
                none has a score; or there are none yet.
        """
        values = self.values(column)
        values = values[~np.isnan(values)]
        if not len(self) and self.complete:
            percentiles(np.zeros(1), q)  # checks q
            return {}
        if not len(values):
            raise DataError(f"{self.path}: no sample has a score in {self.column(column)}")
        return percentiles(values, q)

    def top(self, n: int = 10, column: str | None = None) -> Any:
        """The n samples with the largest values, in descending order, ties in the data's order.

        Samples without a score do not count, so that there may be fewer.

        Returns:
            A pyarrow.Table with all columns.

        Raises:
            OptionError: no such column, or a negative n.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
            raise OptionError(f"n: expected an integer of at least 0, got {n!r}")
        return self.take(largest(self.values(column), int(n)))

    def take(self, rows: Sequence[int] | Sequence[bool] | NDArray[Any]) -> Any:
        """A pyarrow.Table of some rows, with all columns.

        Args:
            rows: their numbers, integers from 0 to len - 1, in the order wanted; or a mask, [len]
                of bool, which is True for them.

        Raises:
            OptionError: a number out of range, a mask of another length, or neither of the two.
        """
        pa = require("pyarrow", "reading scores", "score")
        wanted = row_numbers(rows, len(self))
        ascending = np.unique(wanted)
        found = [self.schema.empty_table()]
        for i in np.unique(np.searchsorted(self._starts, ascending, "right") - 1):
            start = int(self._starts[i])
            for table in self._files[i].read(self.columns, self._columns):
                low, high = np.searchsorted(ascending, (start, start + len(table)))
                if high > low:
                    found.append(table.take(pa.array(ascending[low:high] - start)))
                start += len(table)
        return pa.concat_tables(found).take(pa.array(np.searchsorted(ascending, wanted)))

    def summary(self) -> Summary:
        """Counts, accuracy and percentiles; never an error for want of scores."""
        scored = np.empty(0)
        if self.fi_columns:
            scored = self.values()
            scored = scored[~np.isnan(scored)]
        return Summary(
            rows=len(self),
            scored=len(scored),
            errors=self.errors,
            accuracy=self._accuracy(),
            percentiles=percentiles(scored) if len(scored) else {},
            complete=self.complete,
        )

    def _accuracy(self) -> float | None:
        compute = require("pyarrow.compute", "reading scores", "score")
        if not {"label", "predicted"} <= set(self.columns):
            return None
        both = right = 0
        for table in self.tables(["label", "predicted"]):
            equal = compute.equal(table.column(0), table.column(1))  # null where either is
            both += len(equal) - equal.null_count
            right += compute.sum(equal, min_count=0).as_py()
        return right / both if both else None


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def open_scores(path: str | PathLike[str]) -> Scores:
    """Opens scores for reading.

    Args:
        path: a folder that :func:`fastfi.score` or ``fastfi score`` wrote, finished or not; a
            folder of Parquet files, as Ray writes them, in the order of their names; a .parquet or
            .csv file.

    Raises:
        DataError: there is nothing, or no scores; a file is truncated; two parts hold the same
            rows; files with different columns of FI. The message names the file.
        MissingExtraError: pyarrow is not installed.
    """
    return Scores(path)
