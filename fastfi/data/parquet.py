"""Parquet in the image layout of the Hugging Face hub, streamed row group by row group.

The layout: a struct column ``image`` {bytes: binary, path: string} with compressed images, and an
integer column ``label``. A plain binary column of compressed images is read too.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from fastfi._extras import require
from fastfi.data._encoded import Encoded, decode_batches, settled_decoder
from fastfi.data._pixels import Color
from fastfi.data._source import Batch, SeekableSource
from fastfi.errors import DataError

__all__ = ["ParquetSource", "recognises"]

_IMAGE_NAMES = ("image", "img", "images", "image_bytes", "image.bytes", "bytes")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "y")
_SPLITS = ("train", "test", "validation", "valid", "val")
_ROWS = 128  # compressed images held at once, besides the batch
_BUFFER = 1 << 20  # bytes read ahead per column, so that a column chunk is never held whole


def recognises(folder: Path) -> bool:
    """Whether the folder, or its subfolder ``data``, holds Parquet files."""
    return any(True for _ in folder.glob("*.parquet")) or any(
        True for _ in folder.glob("data/*.parquet")
    )


class ParquetSource(SeekableSource):
    """Images in one Parquet file, or in the files of one split of a folder.

    A folder's files are read in the order of their names; ``train-00000-of-00004.parquet`` belongs
    to the split ``train``. Row numbers go on from file to file. At most a batch and 128 compressed
    images are held at once.

    Args:
        path: file, or folder with Parquet files in it or in its subfolder ``data``.
        split: the split, where a folder holds several.
        image_key: the column of the images. None looks for usual names.
        label_key: the column of the labels. None looks for usual names, and does without.
        color: see :class:`~fastfi.data._pixels.ImageDecoder`.
        keep_errors: the first image that can be decoded, among the first 100, decides colour and
            shape; else the first one must be whole.

    Raises:
        DataError: a file is truncated, has no usable columns, or other columns than the first.
    """

    format = "parquet"

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        color: Color = "auto",
        keep_errors: bool = False,
    ) -> None:
        _parquet(), _arrow()  # present?
        self.path = path
        self._files = _files(path, split)
        self._counts: list[int] = []  # rows of each file
        for i, file in enumerate(self._files):
            with self._opened(file) as parquet:
                schema = parquet.schema_arrow
                if i == 0:
                    self._image = self._image_column(file, schema, image_key)
                    self._label = self._label_column(file, schema, label_key)
                    self.classes = _class_names(schema, self._label)
                columns = [c for c in (self._image, self._label) if c is not None]
                missing = [c for c in columns if c not in schema.names]
                if missing:
                    raise DataError(f"{file}: no column {missing[0]!r}, unlike {self._files[0]}")
                self._counts.append(parquet.metadata.num_rows)
        self.length = sum(self._counts)
        if self.length == 0:
            raise DataError(f"{path}: no rows")
        self.labelled = self._label is not None
        with closing(self._rows(1)) as rows:
            self._decoder = settled_decoder(rows, path, color, keep_errors)
        assert self._decoder.shape is not None
        self.shape = self._decoder.shape

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """Opens a file; errors of reading it name the file."""
        try:
            with _parquet().ParquetFile(
                file, buffer_size=_BUFFER, page_checksum_verification=True
            ) as parquet:
                yield parquet
        except (_arrow().ArrowException, OSError) as error:
            raise DataError(
                f"{file}: not a Parquet file, truncated or damaged ({error})"
            ) from error

    def _image_column(self, file: Path, schema: Any, key: str | None) -> str:
        name = next((n for n in ([key] if key else _IMAGE_NAMES) if n in schema.names), None)
        if name is None:
            raise DataError(
                f"{file}: no column of images ({key or ' or '.join(_IMAGE_NAMES)}); it holds "
                f"{', '.join(schema.names)} (--image-key chooses one)"
            )
        types, kind = _arrow().types, schema.field(name).type
        self._struct = types.is_struct(kind)
        if self._struct:
            index = kind.get_field_index("bytes")
            kind = kind.field(index).type if index >= 0 else None
        if kind is None or not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise DataError(
                f"{file}: column {name!r}: expected binary, or a struct with the binary field "
                f"'bytes', got {schema.field(name).type}"
            )
        return str(name)

    def _label_column(self, file: Path, schema: Any, key: str | None) -> str | None:
        name = next((n for n in ([key] if key else _LABEL_NAMES) if n in schema.names), None)
        if name is None and key is not None:
            raise DataError(f"{file}: no column {key!r}; it holds {', '.join(schema.names)}")
        if name is not None and not _arrow().types.is_integer(schema.field(name).type):
            raise DataError(
                f"{file}: column {name!r}: expected integer labels, got {schema.field(name).type}"
            )
        return name

    def _rows(self, n: int, start: int = 0) -> Generator[Encoded, None, None]:
        """The images from row ``start`` on, ``n`` rows read at a time."""
        first = 0  # row of the data set
        for file, count in zip(self._files, self._counts, strict=True):
            if count and start < first + count:
                for row, data, label in self._rows_of(file, n, max(0, start - first)):
                    yield Encoded(first + row, f"{file}: row {row}", data, label)
            first += count

    def _rows_of(
        self, file: Path, n: int, start: int
    ) -> Iterator[tuple[int, bytes | None, int | None]]:
        """(row, compressed image, label) of one file from row ``start`` on."""
        image = f"{self._image}.bytes" if self._struct else self._image
        columns = [image] if self._label is None else [image, self._label]
        with self._opened(file) as parquet:
            row, groups = 0, parquet.num_row_groups
            skipped = 0  # row groups that are not read at all
            while skipped < groups:
                size = parquet.metadata.row_group(skipped).num_rows
                if row + size > start:
                    break
                row, skipped = row + size, skipped + 1
            left = range(skipped, groups)
            for block in parquet.iter_batches(n, row_groups=left, columns=columns):
                dropped = min(max(0, start - row), block.num_rows)
                row += dropped
                images = block.column(self._image)[dropped:].to_pylist()
                labels = [0] * len(images)
                if self._label is not None:
                    labels = block.column(self._label)[dropped:].to_pylist()
                for data, label in zip(images, labels, strict=True):
                    yield row, data["bytes"] if self._struct and data is not None else data, label
                    row += 1

    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]:
        with closing(self._rows(min(batch_size, _ROWS), start)) as rows:
            images = islice(rows, None if stop is None else max(0, stop - start))
            yield from decode_batches(images, self._decoder, batch_size, self.labelled, keep_errors)


def _parquet() -> Any:  # modules are not kept: sources can be pickled
    return require("pyarrow.parquet", "reading Parquet files")


def _arrow() -> Any:
    return require("pyarrow", "reading Parquet files")


def _files(path: Path, split: str | None) -> list[Path]:
    """The files of the split, in the order of their names."""
    if path.is_file():
        if split is not None and _split_of(path) not in (None, split):
            raise DataError(f"{path}: the name says split {_split_of(path)!r}, not {split!r}")
        return [path]
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    splits = {_split_of(f) for f in files}
    if split is not None:
        chosen = [f for f in files if _split_of(f) == split]
        if not chosen:
            raise DataError(
                f"{path}: no Parquet file of the split {split!r}; there are "
                f"{', '.join(f.name for f in files[:8])}"
            )
        return chosen
    if len(splits) > 1:
        names = ", ".join(sorted(str(s) for s in splits))
        raise DataError(f"{path}: holds the splits {names}; choose one (--split)")
    return files


def _split_of(file: Path) -> str | None:
    """ "train" for ``train.parquet`` and ``train-00000-of-00004.parquet``, None for other names."""
    word = file.stem.replace("_", "-").replace(".", "-").split("-")[0]
    return word if word in _SPLITS else None


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The names that the hub's ClassLabel feature stores in the schema's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None or label is None:
        return None
    try:
        names = json.loads(raw)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):  # another version of the metadata: no names then
        return None
    return tuple(str(n) for n in names)
