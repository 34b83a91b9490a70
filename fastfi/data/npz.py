"""NumPy archives: arrays of images and labels, streamed out of the zip file."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastfi.data._pixels import unit
from fastfi.data._source import Batch, SeekableSource
from fastfi.errors import DataError, OptionError

__all__ = ["NpzSource"]

_COLORS = (1, 3, 4)  # the number of colours that tells the colour axis from the others
_SKIPPED = 1 << 20  # bytes read at once on the way to an image
_IMAGE_NAMES = ("x", "images")
_LABEL_NAMES = ("y", "labels")


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # bytes before the numbers


class NpzSource(SeekableSource):
    """Images [N, H, W], [N, C, H, W] or [N, H, W, C], and labels [N] or [N, 1], in one npz file.

    Pixels are uint8, uint16 or bool (scaled to 0..1) or floating point (taken as they are). The
    array of images is never held whole, whether the archive is compressed or not. Pickled arrays
    are refused.

    Args:
        path: the file.
        split: takes ``x_train`` or ``train_images``, say, instead of ``x`` or ``images``.
        image_key: the array of the images, instead.
        label_key: the array of the labels, instead.
        layout: "chw" or "hwc" for 4-dimensional arrays.

    Raises:
        DataError: not an npz file, truncated, or without usable arrays.
        OptionError: an unknown layout.
    """

    format = "npz"

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        layout: str | None = None,
    ) -> None:
        if layout not in (None, "chw", "hwc"):
            raise OptionError(f"layout: expected 'chw' or 'hwc', got {layout!r}")
        self.path = path
        with _archive(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
            image = _choose(path, names, image_key, split, _IMAGE_NAMES)
            label = _choose(path, names, label_key, split, _LABEL_NAMES)
            if image is None:
                wanted = image_key or " or ".join(_candidates(split, _IMAGE_NAMES))
                raise DataError(
                    f"{path}: no array of images ({wanted}); it holds {', '.join(names) or 'none'}"
                    " (--split, --image-key choose another)"
                )
            if label is None and label_key is not None:
                raise DataError(f"{path}: no array {label_key!r}; it holds {', '.join(names)}")
            self._name = image
            self._header = _header(path, archive, image)
            self._pixel_axes(layout)
            self.length = self._header.shape[0]
            self.labelled = label is not None
            self._labels = None if label is None else self._read_labels(archive, label)

    def _pixel_axes(self, layout: str | None) -> None:
        """Checks the images' dtype and shape; sets ``shape`` and the axis order."""
        where = f"{self.path}: array {self._name!r}"
        shape, dtype, _ = self._header
        if dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.bool_) and dtype.kind != "f":
            raise DataError(
                f"{where}: expected pixels of dtype uint8, uint16, bool or floating, got {dtype}"
            )
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise DataError(
                f"{where}: expected images [N, H, W], [N, C, H, W] or [N, H, W, C], got the shape "
                f"{list(shape)}"
            )
        if len(shape) == 3:
            self.shape = (1, *shape[1:])
            self._hwc = False
            return
        chw, hwc = shape[1] in _COLORS, shape[3] in _COLORS
        if layout is None and chw == hwc:
            raise DataError(
                f"{where}: cannot tell which axis of {list(shape)} holds the colours; give the "
                "layout, chw or hwc (--layout)"
            )
        self._hwc = layout == "hwc" if layout is not None else hwc
        a, b, c = shape[1:]
        self.shape = (c, a, b) if self._hwc else (a, b, c)

    def _read_labels(self, archive: zipfile.ZipFile, name: str) -> Tensor:
        where = f"{self.path}: array {name!r}"
        shape, dtype, offset = _header(self.path, archive, name)
        n = self.length
        if dtype.kind not in "iu":
            raise DataError(f"{where}: expected integer labels, got dtype {dtype}")
        if shape not in ((n,), (n, 1)):
            raise DataError(
                f"{where}: expected the shape [{n}], one label per image, got {list(shape)}"
            )
        with _member(self.path, archive, name, offset) as file:
            labels = np.frombuffer(bytearray(file.read()), dtype)
        return torch.from_numpy(labels.astype(np.int64)).reshape(-1)  # [N]

    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]:
        (_, *image), dtype, offset = self._header
        size = math.prod(image) * dtype.itemsize  # bytes of one image
        starts = self._starts(batch_size, start, stop)
        if not starts:
            return
        offset += start * size
        with (
            _archive(self.path) as archive,
            _member(self.path, archive, self._name, offset) as file,
        ):
            for first in starts:
                count = min(first + batch_size, starts.stop) - first
                raw = bytearray(file.read(count * size))
                if len(raw) < count * size:  # changed since it was opened
                    raise DataError(f"{self.path}: array {self._name!r} is truncated")
                x = unit(np.frombuffer(raw, dtype).reshape(count, *image))
                if self._hwc:
                    x = x.permute(0, 3, 1, 2).contiguous()
                x = x.reshape(count, *self.shape)
                y = None if self._labels is None else self._labels[first : first + count].clone()
                yield Batch(range(first, first + count), x, y)


def _candidates(split: str | None, names: Sequence[str]) -> list[str]:
    if split is None:
        return list(names)
    return [f"{name}_{split}" for name in names] + [f"{split}_{name}" for name in names]


def _choose(
    path: Path, names: Sequence[str], key: str | None, split: str | None, usual: Sequence[str]
) -> str | None:
    found = [n for n in ([key] if key else _candidates(split, usual)) if n in names]
    if len(found) > 1:
        raise DataError(f"{path}: both {' and '.join(found)} are there; choose one by its name")
    return found[0] if found else None


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens the zip file; errors of reading it name the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: not an npz file, truncated or damaged ({error})") from error


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> _Header:
    """Reads the npy header of a member and checks that the member has the size it announces."""
    where = f"{path}: array {name!r}"
    with archive.open(f"{name}.npy") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f"npy version {version}")
        except ValueError as error:
            raise DataError(f"{where} cannot be read ({error})") from error
        offset = file.tell()
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects (pickle), which are never loaded")
    if fortran and len(shape) > 1:
        raise DataError(
            f"{where} is in Fortran order, which cannot be streamed: save numpy.ascontiguousarray"
        )
    expected = offset + math.prod(shape) * dtype.itemsize
    size = archive.getinfo(f"{name}.npy").file_size
    if size != expected:
        raise DataError(f"{where}: expected {expected} bytes for {list(shape)}, got {size}")
    return _Header(shape, dtype, offset)


@contextmanager
def _member(path: Path, archive: zipfile.ZipFile, name: str, offset: int) -> Iterator[IO[bytes]]:
    with archive.open(f"{name}.npy") as file:
        # Not seek(), which skips the checksum of what is stored uncompressed.
        while offset > 0 and (skipped := len(file.read(min(offset, _SKIPPED)))):
            offset -= skipped
        yield file
