"""Batches on the model's device, and on a GPU the next one read and copied meanwhile.

For a GPU, a thread reads batch k + 1 into pinned memory and copies it on a stream of its own while
batch k is worked on; it starts when batch k is handed over, so that there is never more than one
ahead: batches k and k + 1 are held, pinned and on the device, and what the reader keeps of the one
it read last. Other devices get each batch when they ask for it, read where they asked.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Arrival", "SideStream", "Transfer", "ahead", "on_device"]


B = TypeVar("B")  # a NamedTuple with images x: fastfi.data.Batch, Samples


class Arrival(Protocol):
    """A copy under way."""

    def wait(self) -> Tensor:
        """The images, for whom this call orders after the copy. Called where they are used."""


class Transfer(Protocol):
    """A way to the device, used by the reading thread."""

    def pin(self, x: Tensor) -> Tensor:
        """The same images in memory that the device can read."""

    def copy(self, x: Tensor) -> Arrival:
        """Starts a copy of pinned images to the device."""


class _OnStream:
    """A copy that a stream is making, and the event after it."""

    def __init__(self, x: Tensor, event: torch.cuda.Event) -> None:
        self._x, self._event = x, event

    def wait(self) -> Tensor:
        # The current stream waits, the host does not. The memory belongs to the side stream: it
        # must not be handed out again before the current stream is done with it.
        current = torch.cuda.current_stream(self._x.device)
        current.wait_event(self._event)
        self._x.record_stream(current)
        return self._x


class SideStream:
    """Copies from pinned memory on a stream of a GPU that nothing else uses."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def pin(self, x: Tensor) -> Tensor:
        return x.pin_memory()

    def copy(self, x: Tensor) -> Arrival:
        with torch.cuda.stream(self._stream):
            copied = x.to(self._device, non_blocking=True)
            return _OnStream(copied, self._stream.record_event())


def on_device(batches: Iterator[B], device: torch.device) -> Generator[tuple[B, Any], None, None]:
    """Batches, each with its images on the device, in order. Nothing here keeps one when another is
    asked for.

    Yields:
        The batch and its images; for a GPU, the batch's own images are the pinned ones. Images
        that are no tensor stay where they are.

    Raises:
        What reading raises, in the place of the batch that could not be read.
    """
    if device.type == "cuda":
        yield from ahead(batches, SideStream(device))
        return
    batch: Any
    for batch in batches:
        yield batch, batch.x.to(device) if isinstance(batch.x, Tensor) else batch.x
        del batch


def ahead(batches: Iterator[B], transfer: Transfer) -> Generator[tuple[B, Any], None, None]:
    """:func:`on_device` with one batch ahead. Where the caller stops early, the read under way is
    waited for and the reader closed."""

    def fetch() -> tuple[Any, Arrival | None] | None:
        batch: Any = next(batches, None)
        if batch is None:
            return None
        if not isinstance(batch.x, Tensor):
            return batch, None
        batch = batch._replace(x=transfer.pin(batch.x))
        return batch, transfer.copy(batch.x)

    try:
        with ThreadPoolExecutor(1, "fastfi-read-ahead") as pool:
            fetched = pool.submit(fetch).result()
            while fetched is not None:
                upcoming = pool.submit(fetch)
                batch, arrival = fetched
                x = batch.x if arrival is None else arrival.wait()
                del fetched, arrival
                yield batch, x
                del batch, x
                fetched = upcoming.result()
                del upcoming
    finally:
        if isinstance(batches, Generator):
            batches.close()
