"""Several processes, as torchrun starts them: which one this is, and waiting for the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from fastfi.errors import FastfiError

__all__ = ["Ranks", "joined"]

T = TypeVar("T")


class Ranks:
    """This process among others.

    Attributes:
        rank: from 0.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank, self.world, self._group = rank, world, group

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """Everybody's value, in every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise FastfiError(
                f"another of the {self.world} processes stopped; its own message says why"
            ) from error
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Does the same in every process; where it fails in one, it fails in all.

        Raises:
            FastfiError: this process's own error, or else the first of the others'.
        """
        result, error = None, None
        try:
            result = work()
        except FastfiError as own:
            error = own
        errors = self.gathered(None if error is None else str(error))
        if error is not None:
            raise error
        other = next((e for e in errors if e is not None), None)
        if other is not None:
            raise FastfiError(f"process {errors.index(other)} of {self.world}: {other}")
        return result  # type: ignore[return-value]


@contextmanager
def joined(distributed: bool | None) -> Iterator[Ranks]:
    """The processes that score together.

    Args:
        distributed: None: all that torchrun started, or that torch.distributed joined already;
            False: this one alone.
    """
    if distributed is False or not dist.is_available():
        yield Ranks()
        return
    started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if dist.is_initialized():
        # Messages are Python objects on the CPU, which NCCL's group cannot pass on.
        group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    elif started:
        dist.init_process_group("gloo")
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()
