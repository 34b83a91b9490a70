"""Map files: npz, written while the maps are computed, or one row per image in Parquet."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NamedTuple, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastfi.cli._atomic import AtomicFile, Table
from fastfi.cli._parquet import Column, ParquetTable
from fastfi.errors import DataError

__all__ = ["MapFile", "MapForm", "Maps"]

_GROUP = 1 << 24  # bytes of maps that Parquet collects for a row group


class Maps(NamedTuple):
    """Maps of b consecutive images."""

    ids: Sequence[int] | Sequence[str]
    label: NDArray[np.int64] | None  # [b] the data's own label
    predicted: NDArray[np.int64]  # [b]
    log_prob: NDArray[np.float64]  # [b] of the class that FI was computed for
    fi: NDArray[np.float32]  # [b, S, C, H, W] or [b, S, H, W]
    rank: NDArray[np.integer[Any]] | None  # [b, S, C, H, W] or [b, S, H, W]


@dataclass(frozen=True)
class MapForm:
    """What all maps of a file have in common.

    Attributes:
        count: number of images, None if it is not known before they are read.
        id_type: "int" or "str".
        labelled: whether the data has labels.
        scales: sizes of the windows in pixels, S of them.
        shape: of one image's maps, [S, C, H, W] or [S, H, W].
        rank_shape: of one image's ranks, None where the inverse has no rank.
        rank_dtype: of the ranks.
        metadata: what the maps were computed from.
    """

    count: int | None
    id_type: Literal["int", "str"]
    labelled: bool
    scales: tuple[int, ...]
    shape: tuple[int, ...]
    rank_shape: tuple[int, ...] | None
    rank_dtype: DTypeLike
    metadata: Mapping[str, Any]


@final
class MapFile(AtomicFile[Maps]):
    """A file of maps, complete or not there at all: see :class:`~fastfi.cli._atomic.AtomicFile`.

    Args:
        path: ending in .npz or .parquet.
        form: see :class:`MapForm`.
        overwrite: whether an existing file may be replaced.

    Raises:
        DataError: another number of images than ``form`` announced.
    """

    suffixes = (".npz", ".parquet")

    def __init__(self, path: Path, form: MapForm, overwrite: bool = False) -> None:
        super().__init__(path, overwrite)
        self._form = form

    def _table(self, file: BinaryIO) -> Table[Maps]:
        if self._path.suffix.lower() == ".npz":
            return _Npz(file, self._form, self._path.parent)
        return _Parquet(file, self._form)


class _Npz(Table[Maps]):
    """A zip archive of npy files, one after the other: that of the maps, which is written while
    they are computed, then the others. Ids, labels and probabilities (some 50 bytes per image) wait
    in memory, ranks in a nameless file beside the archive, as do the maps if their number, which
    the npy header states, is not known in advance.

    Maps are stored as they are. Most of their digits are noise to a compressor: deflate at level 1
    took 17 % off damped maps of MNIST at 20 MB/s, a third more time than a small network's maps
    need. Ranks are small integers, many of them equal, and are deflated at that level.
    """

    def __init__(self, file: BinaryIO, form: MapForm, folder: Path) -> None:
        self._form = form
        self._ids: list[int | str] = []
        self._label, self._predicted, self._log_prob = array("q"), array("q"), array("d")
        self._rank: IO[bytes] | None = None
        if form.rank_shape is not None:
            self._rank = _spool(folder)
        waiting = _spool(folder) if form.count is None else None
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        if waiting is not None:
            self._maps = waiting
        else:
            assert form.count is not None
            self._maps = self._begin("maps", np.float32, (form.count, *form.shape))

    def _begin(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> IO[bytes]:
        """Opens a member for writing, with its header written."""
        member: str | zipfile.ZipInfo = f"{name}.npy"
        if name == "maps":
            member = zipfile.ZipInfo(f"{name}.npy")  # stored, unlike the archive's default
        # Zip64 is decided before the size is known, as in numpy.savez
        file = self._zip.open(member, "w", force_zip64=True)
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def write(self, rows: Maps) -> None:
        self._ids += rows.ids
        if rows.label is not None:
            self._label.extend(rows.label.tolist())
        self._predicted.extend(rows.predicted.tolist())
        self._log_prob.extend(rows.log_prob.tolist())
        _check_count(self._form, len(self._ids), done=False)
        self._maps.write(_bytes(rows.fi, np.float32))
        if self._rank is not None:
            assert rows.rank is not None
            self._rank.write(_bytes(rows.rank, self._form.rank_dtype))

    def close(self) -> None:
        form, n = self._form, len(self._ids)
        _check_count(form, n, done=True)
        if form.count is None:
            self._copy("maps", self._maps, np.float32, (n, *form.shape))
        self._maps.close()
        if self._rank is not None:
            assert form.rank_shape is not None
            self._copy("rank", self._rank, form.rank_dtype, (n, *form.rank_shape))
        small = {
            "scales": np.array(form.scales, np.int64),
            "id": np.array(self._ids, np.int64 if form.id_type == "int" else np.str_),
            "predicted": np.array(self._predicted, np.int64),
            "log_prob": np.array(self._log_prob, np.float64),
            "config": np.array(json.dumps(dict(form.metadata))),
        }
        if form.labelled:
            small["label"] = np.array(self._label, np.int64)
        for name, values in small.items():
            with self._zip.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
        self._zip.close()

    def _copy(self, name: str, source: IO[bytes], dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        """Moves a temporary file into the archive."""
        source.seek(0)
        with self._begin(name, dtype, shape) as file:
            shutil.copyfileobj(source, file, 1 << 20)
        source.close()

    def abandon(self) -> None:
        # The archive refuses to be closed before its member; left open, it would be closed, and
        # fail again, when the garbage is collected.
        for file in (self._maps, self._rank, self._zip):
            with suppress(OSError, ValueError):
                if file is not None:
                    file.close()


class _Parquet(Table[Maps]):
    """Maps and ranks flattened in C order to lists of a fixed size; shapes are in the metadata."""

    def __init__(self, file: BinaryIO, form: MapForm) -> None:
        self._form, self._count = form, 0
        width = math.prod(form.shape)
        columns = [
            Column("id", np.int64 if form.id_type == "int" else object),
            *([Column("label", np.int64)] if form.labelled else []),
            Column("predicted", np.int64),
            Column("log_prob", np.float64),
            Column("map", np.float32, width=width),
        ]
        metadata = {
            **form.metadata,
            "fastfi.scales": form.scales,
            "fastfi.shape": form.shape,
        }
        if form.rank_shape is not None:
            columns.append(Column("rank", form.rank_dtype, width=math.prod(form.rank_shape)))
            metadata["fastfi.rank_shape"] = form.rank_shape
        group = max(1, _GROUP // (4 * width))
        if form.count is not None:
            group = min(group, form.count)
        self._table = ParquetTable(file, columns, metadata, group)

    def write(self, rows: Maps) -> None:
        n = len(rows.ids)
        self._count += n
        columns: list[Any] = [rows.ids, rows.predicted, rows.log_prob, rows.fi.reshape(n, -1)]
        if self._form.labelled:
            columns.insert(1, rows.label)
        if rows.rank is not None:
            columns.append(rows.rank.reshape(n, -1))
        self._table.write(columns)

    def close(self) -> None:
        _check_count(self._form, self._count, done=True)
        self._table.close()

    def abandon(self) -> None:
        self._table.abandon()


def _check_count(form: MapForm, n: int, done: bool) -> None:
    """The number of images that were read is the one that the data set announced."""
    if form.count is not None and (n > form.count or (done and n < form.count)):
        more = "more" if n > form.count else str(n)
        raise DataError(f"expected {form.count} images, as the data set announced, got {more}")


def _spool(folder: Path) -> IO[bytes]:
    """A nameless file, gone when it is closed, however the process ends."""
    return tempfile.TemporaryFile(dir=folder)


def _bytes(values: NDArray[Any], dtype: DTypeLike) -> memoryview:
    return np.ascontiguousarray(values, dtype).data.cast("B")
