"""What every reader returns: a description of the data and an iterator over its batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from fastfi.errors import OptionError

__all__ = ["Batch", "ImageSource", "SeekableSource"]


class Batch(NamedTuple):
    """Consecutive images of a data set.

    Attributes:
        ids: length b. Row numbers in the order of the data set, or relative paths: see
            :attr:`ImageSource.id_type`.
        x: [b, C, H, W] float32, in 0..1 where the stored pixels are integers.
        y: [b] int64, or None where the data set has no labels. Not checked against a number of
            classes, which the data set does not know.
        errors: position in the batch -> why that image could not be read; the message names the
            file or row. x and y hold zeros there. Empty unless the errors were asked for.
    """

    ids: Sequence[int] | Sequence[str]
    x: Tensor
    y: Tensor | None
    errors: Mapping[int, str] = {}


class ImageSource(ABC):
    """A data set that can be read from its beginning any number of times.

    Attributes:
        path: the file or folder, which every error names.
        format: "idx", "npz", "parquet", "folder" or "files".
        length: number of images, None if it is not known before reading.
        shape: (C, H, W) of every image.
        labelled: whether the batches have labels.
        classes: names of the classes in the order of their numbers, None if not known.
        id_type: "int" for row numbers, "str" for paths (relative to the folder).
    """

    path: Path
    format: str
    length: int | None
    shape: tuple[int, int, int]
    labelled: bool
    classes: tuple[str, ...] | None = None
    id_type: Literal["int", "str"] = "int"

    @abstractmethod
    def _read(self, batch_size: int) -> Generator[Batch, None, None]:
        """Yields the whole data set in batches of at most ``batch_size``, none of them empty."""

    def ids(self) -> Sequence[int] | Sequence[str] | None:
        """The ids of all images in order, None if they are not known before reading."""
        return None if self.length is None or self.id_type == "str" else range(self.length)

    def batches(
        self,
        batch_size: int = 256,
        limit: int | None = None,
        *,
        start: int = 0,
        keep_errors: bool = False,
    ) -> Iterator[Batch]:
        """Reads the data set, from its beginning unless told otherwise.

        Nothing here keeps a reference to an earlier batch: a caller who drops each batch before
        asking for the next holds one at a time.

        Args:
            batch_size: the largest number of images in a batch, at least 1.
            limit: the first so many images are all there are, at least 1. None takes all.
            start: begin with the image of this number, counted from 0. Images before it are not
                decoded. From ``limit`` or the end of the data on, there are no batches.
            keep_errors: an image that cannot be read (damaged, of another size, missing, without a
                label) becomes an entry of :attr:`Batch.errors` instead of an exception. What
                damages everything after it is raised all the same.

        Yields:
            Batches in the data set's order, the same for every reading.

        Raises:
            DataError: a file is truncated, damaged or holds an image that cannot be decoded.
            OptionError: batch_size, limit or start out of range.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, got {batch_size}")
        if limit is not None and limit < 1:
            raise OptionError(f"limit must be at least 1, got {limit}")
        if start < 0:
            raise OptionError(f"start must be at least 0, got {start}")
        if limit is not None:
            batch_size = max(1, min(batch_size, limit - start))
        return self._span(batch_size, start, limit, keep_errors)

    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]:
        """Yields the images ``start`` .. ``stop - 1``, as far as there are any; this one reads what
        it skips, and raises every error."""
        position = 0
        if stop is not None and start >= stop:
            return
        with closing(self._read(batch_size)) as blocks:
            for block in blocks:
                first = max(start - position, 0)
                last = len(block.ids) if stop is None else min(len(block.ids), stop - position)
                position += len(block.ids)
                if first < last:
                    yield _cut(block, first, last)
                if stop is not None and position >= stop:
                    return
                del block  # before the next batch is read


class SeekableSource(ImageSource):
    """A data set that skips what is not asked for."""

    @abstractmethod
    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]: ...

    def _read(self, batch_size: int) -> Generator[Batch, None, None]:
        return self._span(batch_size, 0, None, False)

    def _starts(self, batch_size: int, start: int, stop: int | None) -> range:
        """Where batches begin; the stop of the range is where the last one ends."""
        assert self.length is not None
        return range(start, self.length if stop is None else min(stop, self.length), batch_size)


def _cut(block: Batch, first: int, last: int) -> Batch:
    if (first, last) == (0, len(block.ids)):
        return block
    errors = {i - first: text for i, text in block.errors.items() if first <= i < last}
    y = None if block.y is None else block.y[first:last]
    return Batch(block.ids[first:last], block.x[first:last], y, errors)
