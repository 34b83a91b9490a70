"""Batches of compressed images: what image folders, files and Parquet have in common."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi.data._pixels import Color, ImageDecoder, stack
from fastfi.data._source import Batch
from fastfi.errors import DataError

__all__ = ["Encoded", "decode_batches", "settled_decoder"]

_TRIED = 100  # images, of which one must be whole for the data set to be readable


class Encoded(NamedTuple):
    """One image of a data set, not yet decoded.

    Attributes:
        id: as in :class:`Batch`.
        where: how an error names the image.
        data: the file's content or its path; None where it is missing.
        label: None where it is missing; any number in a data set without labels.
    """

    id: Any
    where: str
    data: bytes | Path | None
    label: int | None


def settled_decoder(
    images: Iterable[Encoded], name: Path, color: Color, keep_errors: bool
) -> ImageDecoder:
    """A decoder whose shape and colour the first image has settled.

    Args:
        images: of the whole data set, from its beginning.
        name: of the data set.
        color: see :class:`ImageDecoder`.
        keep_errors: the first of the first 100 images that can be decoded settles them.

    Raises:
        DataError: it cannot be decoded, or none of the 100 can, or it has no label (which
            ``keep_errors`` overlooks).
    """
    errors: list[DataError] = []
    for image in images:
        decoder = ImageDecoder(color)  # a damaged image may have left its colour in the last one
        try:
            decoder(image.data, image.where)
            if not keep_errors:
                _label(image)
            return decoder
        except DataError as error:
            if not keep_errors:
                raise
            errors.append(error)
        if len(errors) == _TRIED:
            break
    if not errors:
        raise DataError(f"{name}: no images")
    raise DataError(
        f"{name}: none of the first {len(errors)} images can be decoded; the first: {errors[0]}"
    )


def _label(image: Encoded) -> int:
    if image.label is None:
        raise DataError(f"{image.where}: no label (null)")
    return image.label


def decode_batches(
    images: Iterable[Encoded],
    decoder: ImageDecoder,
    batch_size: int,
    labelled: bool,
    keep_errors: bool,
) -> Generator[Batch, None, None]:
    """The images in batches, decoded.

    Args:
        decoder: a settled one.
        keep_errors: errors of single images become :attr:`Batch.errors`.

    Raises:
        DataError: an image cannot be decoded or has no label.
    """
    ids: list[Any] = []
    pixels: list[Any] = []
    labels: list[int] = []
    errors: dict[int, str] = {}

    def batch() -> Batch:
        y: Tensor | None = torch.tensor(labels, dtype=torch.int64) if labelled else None
        return Batch(ids, stack(pixels), y, errors)

    for image in images:
        try:
            decoded = decoder(image.data, image.where)
            label = _label(image) if labelled else 0
        except DataError as error:
            if not keep_errors:
                raise
            errors[len(ids)] = str(error)
            decoded, label = decoder.blank(), 0
        ids.append(image.id)
        pixels.append(decoded)
        labels.append(label)
        if len(ids) == batch_size:
            yield batch()
            ids, pixels, labels, errors = [], [], [], {}
    if ids:
        yield batch()
