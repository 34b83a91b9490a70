"""Data sets that are read from their beginning: iterables, and image files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastfi.data import ImageSource
from fastfi.errors import InputError
from fastfi.scoring.fingerprint import StreamDigest
from fastfi.scoring.items import Item, Reader, is_batch
from fastfi.scoring.scorer import Samples
from fastfi.scoring.source import (
    PROBES,
    Ranges,
    Source,
    joined_samples,
    part_of,
)

__all__ = ["ImagesSource", "StreamSource"]

_END = object()
_PLACES = 4  # where image files are looked at


class StreamSource(Source):
    """Samples, or batches of them, in the order of an iterable.

    Args:
        data: read once.
        reader: what its items mean.
        batched: whether an item without labels is a batch.
        limit: rows at most.
    """

    streamed = True

    def __init__(
        self, data: Iterable[Any], reader: Reader, batched: bool = False, limit: int | None = None
    ) -> None:
        dataset = data.dataset if isinstance(data, DataLoader) else data
        self.kind, self.class_names = type(dataset).__name__, reader.class_names(dataset)
        self._reader, self._batched, self.limit = reader, batched, limit
        self._items = iter(data)
        several = isinstance(data, DataLoader) and data.num_workers > 1
        self._ahead: list[Any] = list(itertools.islice(self._items, 2 if several else 1))
        if len(self._ahead) == 2:
            self._check_workers()

    def _check_workers(self) -> None:
        """The first two batches are of two workers: InputError if they are the same."""
        digests = []
        for given in self._ahead:
            digest = StreamDigest()
            digest.add(self._reader.batch(0, self._reader.item(given)))
            digests.append(digest.text())
        if digests[0] == digests[1]:
            raise InputError(
                "data: expected the workers of the DataLoader to yield different samples, got the "
                "same ones from two; torch.utils.data.get_worker_info() tells a worker its share"
            )

    def _single(self, item: Item) -> bool:
        return not (is_batch(item) or (self._batched and item.y is None))

    def probes(self) -> Samples:
        if not self._ahead:
            return Samples([], torch.empty(0), None)
        item = self._reader.item(self._ahead[0])
        if self._single(item):
            return self._reader.samples([0], [item])
        samples = self._reader.batch(0, item)
        return part_of(samples, 0, 1)  # however many come in a batch

    def read(self, ranges: Ranges, size: int, workers: int) -> Iterator[tuple[int, Samples]]:
        # Cut where the wanted ranges begin and end, so that no batch is in two of them.
        wanted = iter(ranges)
        begin, end = next(wanted, (None, None))
        for row, samples in self._groups(size):
            done = 0
            while done < len(samples.ids):
                at = row + done
                while end is not None and at >= end:
                    begin, end = next(wanted, (None, None))
                if begin is None or end is None:
                    return
                cut = begin if at < begin else end
                stop = min(len(samples.ids), cut - row)
                yield at, part_of(samples, done, stop)
                done = stop

    def _groups(self, size: int) -> Iterator[tuple[int, Samples]]:
        """Batches as they come, cut to ``size``, or single samples in groups of it; up to the
        limit."""
        row = 0
        singles: list[Item | str] = []
        batches = False
        items = itertools.chain(self._ahead, self._items)
        while self.limit is None or row + len(singles) < self.limit:
            given = next(items, _END)
            if given is _END:
                break
            try:
                item: Item | str = self._reader.item(given)
            except InputError as error:
                if row + len(singles) == 0 or batches:  # nothing here is as it should be
                    raise
                item = str(error)
            if isinstance(item, str) or self._single(item):
                if batches:
                    raise InputError("data: expected single samples or batches, got both")
                singles.append(item)
                if len(singles) == size:
                    yield row, self._reader.samples(range(row, row + size), singles)
                    row, singles = row + size, []
                continue
            if singles:
                raise InputError("data: expected single samples or batches, got both")
            batches = True
            samples = self._reader.batch(row, item)
            left = len(samples.ids) if self.limit is None else self.limit - row
            for first in range(0, min(len(samples.ids), left), size):
                stop = min(first + size, len(samples.ids), left)
                yield row + first, part_of(samples, first, stop)
            row += min(len(samples.ids), left)
        if singles:
            yield row, self._reader.samples(range(row, row + len(singles)), singles)


class ImagesSource(Source):
    """Images that are read from their beginning: :class:`fastfi.data.ImageSource`."""

    def __init__(self, data: ImageSource, reader: Reader, limit: int | None = None) -> None:
        self._data, self._reader, self._limit = data, reader, limit
        self.kind = f"{data.format} images"
        self.class_names = data.classes
        if data.length is None:
            raise InputError(f"data: expected images whose number is known, got {data.path}")
        self._length = self.length = data.length if limit is None else min(limit, data.length)

    def _samples(self, start: int, stop: int, size: int) -> Iterator[Samples]:
        batches: Any = self._data.batches(size, limit=stop, start=start, keep_errors=True)
        with closing(batches):
            for batch in batches:
                samples = Samples(batch.ids, batch.x, batch.y, batch.errors)
                at_once = getattr(self._reader.transform, "on_batch", None)  # [b, C, H, W]
                if at_once is not None:
                    samples = samples._replace(x=at_once(batch.x))
                elif self._reader.transform is not None:
                    samples = self._transformed(samples)
                yield samples

    def _transformed(self, samples: Samples) -> Samples:
        """With the user's function applied to each image that could be read."""
        xs: list[Tensor | None] = [None] * len(samples.ids)
        errors = dict(samples.errors)
        for i, image in enumerate(samples.x):
            if i not in errors:
                try:
                    xs[i] = self._reader.x(image)
                except Exception as error:
                    errors[i] = f"{type(error).__name__}: {error}"
        kinds = {(x.shape, x.dtype) for x in xs if x is not None}
        one = len(kinds) == 1 and not errors
        x: Any = torch.stack(xs) if one else xs  # type: ignore[arg-type]
        return samples._replace(x=x, errors=errors)

    def probes(self) -> Samples:
        # In a few places: a compressed file is read from its beginning for each.
        size, last = PROBES // _PLACES, self._length
        starts = {round(i * max(last - size, 0) / (_PLACES - 1)) for i in range(_PLACES)}
        found = [next(self._samples(at, min(at + size, last), size)) for at in sorted(starts)]
        return joined_samples(found)

    def read(self, ranges: Ranges, size: int, workers: int) -> Iterator[tuple[int, Samples]]:
        for start, stop in _joined(ranges, size):
            row = start
            for samples in self._samples(start, stop, size):
                yield row, samples
                row += len(samples.ids)


def _joined(ranges: Ranges, size: int) -> Iterator[tuple[int, int]]:
    """The same rows in fewer ranges, where batches of ``size`` stay the same."""
    held: tuple[int, int] | None = None
    for start, stop in ranges:
        if held is not None and held[1] == start and (start - held[0]) % size == 0:
            held = held[0], stop
            continue
        if held is not None:
            yield held
        held = start, stop
    if held is not None:
        yield held
