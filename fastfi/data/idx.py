"""MNIST-style folders: images and labels in IDX files, plain or gzip.

The format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type byte (8: unsigned byte), the
number of dimensions, each dimension as a big-endian int32, then the numbers in C order.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from fastfi.data._pixels import unit
from fastfi.data._source import Batch, SeekableSource
from fastfi.errors import DataError

__all__ = ["IdxSource", "recognises"]

_NAME = re.compile(r"^(?:.*[-_.])?(train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?$")
_UNSIGNED_BYTE = 8
_CHUNK = 1 << 16  # bytes


def recognises(folder: Path) -> bool:
    """Whether the folder holds IDX images."""
    return any(_NAME.match(p.name) for p in folder.iterdir())


class IdxSource(SeekableSource):
    """One split of an IDX folder.

    Both files are read through once when they are opened (0.3 s for MNIST), so that a truncated or
    damaged one is reported before any image is scored. The labels are then held in memory, the
    images are read again, batch by batch.

    Args:
        folder: the folder.
        split: "train" or "test" (also "t10k"). None if the folder holds only one of them.

    Raises:
        DataError: missing, ambiguous, damaged or truncated files, or numbers of images and labels
            that differ.
    """

    format = "idx"

    def __init__(self, folder: Path, split: str | None = None) -> None:
        self.path = folder
        self._images = _find(folder, split)
        labels = self._images.with_name(
            self._images.name.replace("-images", "-labels").replace("idx3", "idx1")
        )
        n, h, w = _check(self._images, 3)
        if min(n, h, w) < 1:
            raise DataError(f"{self._images}: expected images, got dimensions {n} x {h} x {w}")
        self.length = n
        self.shape = (1, h, w)
        self._labels: torch.Tensor | None = None  # [N] int64
        labels = next((p for p in (labels, _other_form(labels)) if p.exists()), labels)
        self.labelled = labels.exists()
        if self.labelled:
            (n_labels,) = _check(labels, 1)
            if n_labels != n:
                raise DataError(
                    f"{labels}: expected {n} labels, as many as images in {self._images.name}, "
                    f"got {n_labels}"
                )
            with _open(labels) as file:
                file.read(8)
                raw = bytearray(file.read(n))
            self._labels = torch.from_numpy(np.frombuffer(raw, np.uint8)).to(torch.int64)

    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]:
        _, h, w = self.shape
        starts = self._starts(batch_size, start, stop)
        if not starts:
            return
        with _open(self._images) as file:
            for first in starts:
                last = min(first + batch_size, starts.stop)
                raw = bytearray((last - first) * h * w)
                try:
                    if first == start:
                        file.seek(16 + start * h * w)  # gzip decompresses its way there
                    _fill(file, raw)
                except (OSError, EOFError, zlib.error) as error:  # changed since it was opened
                    raise _damaged(self._images, error) from error
                pixels = np.frombuffer(raw, np.uint8).reshape(-1, 1, h, w)
                y = None if self._labels is None else self._labels[first:last].clone()
                yield Batch(range(first, last), unit(pixels), y)


def _find(folder: Path, split: str | None) -> Path:
    found: dict[str, list[Path]] = {"train": [], "test": []}
    for path in sorted(folder.iterdir()):
        match = _NAME.match(path.name)
        if match:
            found["train" if match[1] == "train" else "test"].append(path)
    if split is None:
        present = [name for name, paths in found.items() if paths]
        if len(present) > 1:
            raise DataError(f"{folder}: holds the splits train and test; choose one (--split)")
        split = present[0]
    name = "test" if split == "t10k" else split
    if name not in found:
        raise DataError(f"{folder}: expected the split train or test, got {split!r}")
    if not found[name]:
        raise DataError(f"{folder}: no images of the split {split!r}")
    # The same file plain and compressed, as an unpacked download leaves them, is one file.
    if len({_stem(p) for p in found[name]}) > 1:
        names = ", ".join(p.name for p in found[name])
        raise DataError(f"{folder}: several files hold the split {split!r}: {names}")
    return found[name][0]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz")


def _other_form(path: Path) -> Path:
    return path.with_name(_stem(path) + ("" if path.suffix == ".gz" else ".gz"))


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from error


def _fill(file: BinaryIO, buffer: bytearray) -> None:
    """Reads until ``buffer`` is full."""
    view = memoryview(buffer)
    while view:
        n = file.readinto(view)  # type: ignore[attr-defined]
        if not n:
            raise EOFError(f"{len(view)} bytes missing")
        view = view[n:]


def _check(path: Path, ndim: int) -> tuple[int, ...]:
    """Reads a file through; returns its dimensions if header, size and checksum are right."""
    with _open(path) as file:
        try:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim:
                raise EOFError(f"{len(header)} bytes, not even the header's {4 + 4 * ndim}")
            magic, dims = header[:4], struct.unpack(f">{ndim}i", header[4:])
            if magic != bytes((0, 0, _UNSIGNED_BYTE, ndim)):
                raise DataError(
                    f"{path}: expected the magic number 0x{_UNSIGNED_BYTE:06x}{ndim:02x} (IDX, "
                    f"unsigned bytes, {ndim} dimensions), got 0x{magic.hex()}"
                )
            size = 0
            while chunk := file.read(_CHUNK):
                size += len(chunk)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error) from error
    expected = math.prod(dims)
    if min(dims) < 0 or size != expected:
        what = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path}: {what}: expected {' x '.join(map(str, dims))} = {expected} bytes after the "
            f"header, got {size}"
        )
    return tuple(dims)


def _damaged(path: Path, error: Exception) -> DataError:
    kind = "truncated" if isinstance(error, EOFError) else "damaged"
    return DataError(f"{path}: the file is {kind} ({error})")
