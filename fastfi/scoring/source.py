"""What every kind of data set looks like to a run: samples in a fixed order, by ranges of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfi.scoring.scorer import NO_LABEL, Samples

__all__ = ["PROBES", "Ranges", "Source", "joined_samples", "part_of"]

Ranges = Iterable[tuple[int, int]]
"""Rows [start, stop) that are wanted: ascending, disjoint; endless where no length is known."""

PROBES = 16
"""Samples by which a data set is recognised."""


class Source(ABC):
    """Samples in a fixed order.

    Attributes:
        kind: what the data set is, for messages and metadata.
        length: number of samples, None if it is not known before reading.
        limit: rows at most, of data without a length.
        class_names: names of the classes, None if not known.
        streamed: whether samples that are not wanted are read all the same, and yielded.
    """

    kind: str
    length: int | None = None
    limit: int | None = None
    class_names: tuple[str, ...] | None = None
    streamed = False

    @abstractmethod
    def probes(self) -> Samples:
        """A few samples, by which the data set is recognised; the first of all among them."""

    @abstractmethod
    def read(self, ranges: Ranges, size: int, workers: int) -> Iterator[tuple[int, Samples]]:
        """Yields (row of the first sample, samples) in order: at most ``size`` samples,
        consecutive, and within one of the ranges. Streamed sources also yield all rows between the
        ranges."""


def part_of(samples: Samples, start: int, stop: int) -> Samples:
    """Some of the samples."""
    if start == 0 and stop >= len(samples.ids):
        return samples
    y = None if samples.y is None else samples.y[start:stop]
    errors = {i - start: text for i, text in samples.errors.items() if start <= i < stop}
    return Samples(samples.ids[start:stop], samples.x[start:stop], y, errors)


def joined_samples(parts: Sequence[Samples]) -> Samples:
    """Consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]
    ids = [name for part in parts for name in part.ids]
    errors, first = {}, 0
    for part in parts:
        errors.update({first + i: text for i, text in part.errors.items()})
        first += len(part.ids)
    xs = [part.x for part in parts if isinstance(part.x, Tensor)]
    if len(xs) == len(parts) and len({(x.shape[1:], x.dtype, x.device) for x in xs}) == 1:
        x: Any = torch.cat(xs)
    else:
        x = [one for part in parts for one in part.x]
    if all(part.y is None for part in parts):
        return Samples(ids, x, None, errors)
    none = [torch.full((len(part.ids),), NO_LABEL) for part in parts]
    ys = [n if part.y is None else part.y.cpu() for n, part in zip(none, parts, strict=True)]
    return Samples(ids, x, torch.cat(ys), errors)
