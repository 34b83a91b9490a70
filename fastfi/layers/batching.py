"""Where the samples are in a tensor inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batching", "batched_dimension"]


@dataclass(frozen=True)
class Batching:
    """The dimension along which the samples lie; its size is B * m.

    Attributes:
        dim: the dimension.
        minor: whether the sample's index runs fastest ([m, B]), as after
            ``x.transpose(0, 1).reshape(T * B, C)``, and not slowest ([B, m]).
    """

    dim: int
    minor: bool = False

    def split(self, t: Tensor, batch: int) -> Tensor:
        """[..., B * m, ...] -> [B, ..., m, ...]: every dimension moves one place to the right."""
        each = t.shape[self.dim] // batch
        sizes = (each, batch) if self.minor else (batch, each)
        return t.unflatten(self.dim, sizes).movedim(self.dim + self.minor, 0)

    def holds(self, t: Tensor, batch: int) -> bool:
        """Whether the tensor has that dimension with a multiple of ``batch`` entries."""
        return t.dim() > self.dim and t.shape[self.dim] % batch == 0 and t.shape[self.dim] > 0


def batched_dimension(
    small: Sequence[int], large: Sequence[int], batches: tuple[int, int]
) -> int | None:
    """The only dimension whose size grows in proportion with the batch; None where there is none,
    or more than one."""
    if len(small) != len(large):
        return None
    few, many = batches
    grown = [
        i
        for i, (s, t) in enumerate(zip(small, large, strict=True))
        if s != t and s * many == t * few and s % few == 0
    ]
    changed = sum(s != t for s, t in zip(small, large, strict=True))
    return grown[0] if len(grown) == changed == 1 else None
