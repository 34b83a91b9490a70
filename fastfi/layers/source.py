"""Which entries of which parameter an operation reads: the parameter itself, or a view of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Source", "disjoint"]


@dataclass(frozen=True)
class Source:
    """A strided view of a parameter.

    Attributes:
        root: the parameter's number.
        numel: of the parameter.
        offset, shape, stride: of the view, in the parameter's own storage, which the parameter
            fills without gaps.
    """

    root: int
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(root: int, parameter: Tensor, view: Tensor) -> Source:
        """The view must share the parameter's storage."""
        offset = int(view.storage_offset() - parameter.storage_offset())
        return Source(root, parameter.numel(), offset, tuple(view.shape), view.stride())

    def transposed(self) -> Source:
        """Of a matrix view."""
        return Source(self.root, self.numel, self.offset, self.shape[::-1], self.stride[::-1])

    @property
    def size(self) -> int:
        """Entries of the view."""
        return torch.Size(self.shape).numel()

    @property
    def in_order(self) -> bool:
        """Whether the view is the whole parameter, entry by entry as it lies in memory."""
        expected, ok = 1, self.offset == 0 and self.size == self.numel
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            ok = ok and (size == 1 or stride == expected)
            expected *= size
        return ok

    @property
    def injective(self) -> bool:
        """Whether no two entries of the view are the same entry of the parameter."""
        return _injective(self)

    def positions(self) -> Tensor:
        """Where each entry of the view lies in the parameter: int64 [size]."""
        at = torch.tensor(self.offset)
        for size, stride in zip(self.shape, self.stride, strict=True):
            at = at[..., None] + stride * torch.arange(size)
        return at.flatten()


@lru_cache(maxsize=1024)
def _injective(source: Source) -> bool:
    if source.in_order:
        return True
    at = source.positions()
    return len(at.unique()) == len(at)


@lru_cache(maxsize=1024)
def disjoint(sources: tuple[Source, ...]) -> bool:
    """Whether no two views of one parameter share an entry."""
    at = torch.cat([s.positions() for s in sources])
    return len(at.unique()) == len(at)
