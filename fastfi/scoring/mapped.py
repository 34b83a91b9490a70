"""Data sets with a length and items by number, read by a DataLoader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch.utils.data import DataLoader

from fastfi.data import ImageSource
from fastfi.errors import InputError
from fastfi.scoring.items import Item, Reader
from fastfi.scoring.scorer import Samples
from fastfi.scoring.source import PROBES, Ranges, Source

__all__ = ["WORKER_OPTIONS", "MapSource"]


class MapSource(Source):
    """A data set with a length and items by number.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        reader: what its items mean.
        order: the items' numbers in reading order; None: 0, 1, ...
        collate: makes a batch of a list of items; None: by ``reader``.
        loader: keyword arguments for the DataLoader.
        limit: rows; None for all.
    """

    def __init__(
        self,
        dataset: Any,
        reader: Reader,
        order: Sequence[int] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        loader: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> None:
        self.kind = type(dataset).__name__
        total = len(dataset) if order is None else len(order)
        self.length = total if limit is None else min(total, limit)
        self._guarded = _Guarded(dataset, order)
        names = dataset.ids() if isinstance(dataset, ImageSource) else None
        self._collate = _Collate(reader, collate, names)
        self._loader = dict(loader or {})
        self.class_names = reader.class_names(dataset)

    def probes(self) -> Samples:
        assert self.length is not None
        count = min(PROBES, self.length)
        rows = sorted({round(i * (self.length - 1) / max(count - 1, 1)) for i in range(count)})
        found = [self._guarded.one(row) for row in rows]
        self._collate.find_ids([item for _, item in found])
        return self._collate(found)

    def read(self, ranges: Ranges, size: int, workers: int) -> Iterator[tuple[int, Samples]]:
        starts: deque[int] = deque()

        def batches() -> Iterator[list[int]]:
            for start, stop in ranges:
                for first in range(start, stop, size):
                    starts.append(first)  # the loader keeps the order
                    yield list(range(first, min(first + size, stop)))

        options: dict[str, Any] = {**self._loader, "num_workers": workers}
        if workers == 0:
            options = {k: v for k, v in options.items() if k not in WORKER_OPTIONS}
        loader: Any = DataLoader(
            cast(Any, self._guarded),
            batch_sampler=_Iterated(batches),
            collate_fn=self._collate,
            **options,
        )
        for samples in loader:
            yield starts.popleft(), samples


WORKER_OPTIONS = ("multiprocessing_context", "prefetch_factor", "timeout")


class _Iterated:
    """A batch sampler that asks for its batches one by one."""

    def __init__(self, batches: Callable[[], Iterator[list[int]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches()


class _Guarded:
    """A data set whose items come with their numbers, and with a text where reading one failed."""

    def __init__(self, dataset: Any, order: Sequence[int] | None) -> None:
        self._dataset, self._order = dataset, order
        self._many = getattr(dataset, "__getitems__", None) is not None

    def number(self, row: int) -> int:
        return row if self._order is None else self._order[row]

    def one(self, row: int) -> tuple[int, Any]:
        number = self.number(row)
        try:
            return number, (self._dataset[number],)
        except MemoryError:
            raise
        except Exception as error:  # the data set is the user's
            return number, f"{type(error).__name__}: {error}"

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return self.one(row)

    def __getitems__(self, rows: list[int]) -> list[tuple[int, Any]]:
        if self._many:
            numbers = [self.number(row) for row in rows]
            try:
                found = self._dataset.__getitems__(numbers)
                return [(n, (item,)) for n, item in zip(numbers, found, strict=True)]
            except MemoryError:
                raise
            except Exception:  # one of them: told apart below
                pass
        return [self.one(row) for row in rows]


class _Collate:
    """Makes Samples of what :class:`_Guarded` returns.

    Args:
        reader, collate: see :class:`MapSource`.
        names: ids of all items, where they are known without reading; else ids are the numbers, and
            where items have their own, those that cannot be read have none.
    """

    def __init__(
        self,
        reader: Reader,
        collate: Callable[[list[Any]], Any] | None,
        names: Sequence[Any] | None,
    ) -> None:
        self._reader, self._own, self._names = reader, collate, names
        self._plain = replace(reader, transform=None)
        self._own_ids = False

    def find_ids(self, found: Sequence[Any]) -> None:
        """Whether items have ids of their own, as some of them tell."""
        items = [self._item(one) for one in found]
        self._own_ids = any(not isinstance(item, str) and item.id is not None for item in items)

    def _name(self, number: int, item: Any) -> Any:
        if self._names is not None:
            return self._names[number]
        return None if self._own_ids and isinstance(item, str) else number

    def __call__(self, found: list[tuple[int, Any]]) -> Samples:
        if self._own is not None and not any(isinstance(item, str) for _, item in found):
            try:
                return self._batched(found)
            except Exception:  # one of them: told apart below
                pass
        items = [self._item(item) for _, item in found]
        names = [self._name(n, item) for (n, _), item in zip(found, items, strict=True)]
        for i, ((number, _), item) in enumerate(zip(found, items, strict=True)):
            if names[i] is None:
                items[i] = f"item {number}: {item}"
        return self._reader.samples(names, items)

    def _batched(self, found: list[tuple[int, Any]]) -> Samples:
        """The whole batch by the user's function."""
        assert self._own is not None
        samples = self._reader.batch(0, self._reader.item(self._own([i[0] for _, i in found])))
        if len(samples.ids) != len(found):
            raise InputError(f"collate_fn: expected {len(found)} samples, got {len(samples.ids)}")
        own_ids = not isinstance(samples.ids, range)
        return samples if own_ids else samples._replace(ids=[n for n, _ in found])

    def _item(self, item: Any) -> Item | str:
        if isinstance(item, str):
            return item
        try:
            if self._own is None:
                return self._reader.item(item[0])
            # Without the transform, which is applied to each item later.
            alone = self._plain.batch(0, self._plain.item(self._own([item[0]])))
            name = None if isinstance(alone.ids, range) else alone.ids[0]
            return Item(name, alone.x[0], None if alone.y is None else alone.y[0])
        except Exception as error:  # the user's data and functions
            return f"{type(error).__name__}: {error}"
