"""What every reader returns: a description of the data and an iterator over its batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from fastfi.errors import OptionError

__all__ = ["Batch", "ImageSource"]


class Batch(NamedTuple):
    """Consecutive images of a data set.

    Attributes:
        ids: length b. Row numbers in the order of the data set, or relative paths: see
            :attr:`ImageSource.id_type`.
        x: [b, C, H, W] float32, in 0..1 where the stored pixels are integers.
        y: [b] int64, or None where the data set has no labels. Not checked against a number of
            classes, which the data set does not know.
    """

    ids: Sequence[int] | Sequence[str]
    x: Tensor
    y: Tensor | None


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

    def batches(self, batch_size: int = 256, limit: int | None = None) -> Iterator[Batch]:
        """Reads the data set from its beginning.

        Nothing here keeps a reference to an earlier batch: a caller who drops each batch before
        asking for the next holds one at a time.

        Args:
            batch_size: the largest number of images in a batch, at least 1.
            limit: stop after so many images, at least 1. None reads all.

        Yields:
            Batches in the data set's order, the same for every reading.

        Raises:
            DataError: a file is truncated, damaged or holds an image that cannot be decoded.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, got {batch_size}")
        if limit is not None and limit < 1:
            raise OptionError(f"limit must be at least 1, got {limit}")
        if limit is not None:
            batch_size = min(batch_size, limit)
        return self._limited(batch_size, limit)

    def _limited(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        left = limit
        with closing(self._read(batch_size)) as blocks:
            for ids, x, y in blocks:
                if left is not None and len(ids) >= left:
                    yield Batch(ids[:left], x[:left], None if y is None else y[:left])
                    return
                if left is not None:
                    left -= len(ids)
                yield Batch(ids, x, y)
                del ids, x, y  # before the next batch is read
