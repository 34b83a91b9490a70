"""Which entries of which parameter an operation reads: the parameter itself, or a view of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """A strided view of a parameter.

    Attributes:
        root: the parameter's number.
        numel: of the parameter.
        offset, shape, stride: of the view, in the parameter's own storage.
        gaps: shape and stride of a parameter that does not fill its storage (a slice of a larger
            tensor), else None.
    """

    root: int
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    gaps: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @staticmethod
    def of(root: int, parameter: Tensor, view: Tensor) -> Source:
        """The view must share the parameter's storage."""
        offset = int(view.storage_offset() - parameter.storage_offset())
        own = tuple(parameter.shape), parameter.stride()
        return Source(root, parameter.numel(), offset, tuple(view.shape), view.stride(),
                      None if _fills(*own) else own)  # fmt: skip

    def transposed(self) -> Source:
        """Of a matrix view."""
        return replace(self, shape=self.shape[::-1], stride=self.stride[::-1])

    @property
    def size(self) -> int:
        """Entries of the view."""
        return torch.Size(self.shape).numel()

    @property
    def in_order(self) -> bool:
        """Whether the view is the whole parameter, entry by entry as it lies in memory."""
        if self.gaps is not None:
            return self.offset == 0 and (self.shape, self.stride) == self.gaps
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
        at = _positions(self.offset, self.shape, self.stride)
        if self.gaps is None:
            return at
        own = _positions(0, *self.gaps)  # in the storage, of the parameter's entries in turn
        number = torch.full((int(own.max()) + 1,), -1)
        number[own] = torch.arange(len(own))
        return number[at]


def _positions(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    at = torch.tensor(offset)
    for size, step in zip(shape, stride, strict=True):
        at = at[..., None] + step * torch.arange(size)
    return at.flatten()


def _fills(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor fills its part of the storage, in any order of its dimensions."""
    expected = 1
    for step, size in sorted((t, s) for s, t in zip(shape, stride, strict=True) if s != 1):
        if step != expected:
            return False
        expected *= size
    return True


@lru_cache(maxsize=1024)
def _injective(source: Source) -> bool:
    if source.in_order:
        return True
    at = source.positions()
    return len(at.unique()) == len(at)
