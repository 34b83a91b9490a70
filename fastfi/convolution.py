"""The geometry of a convolution, and its patches: as a matrix, and as places in the input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Geometry", "geometry", "patches", "unfold"]


class Geometry(NamedTuple):
    """A convolution's shape, one number for each spatial dimension, and its groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether each patch is one pixel, in order: a linear map at every pixel."""
        return max(self.kernel) == max(self.stride) == 1 and max(self.padding) == 0

    def positions(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The output's spatial shape."""
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, k, t, p, d in zip(
                spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values


def geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Geometry]:
    """The geometry, and x padded by hand where ``padding="same"`` asks for more on one side."""
    dims = len(kernel)
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if any(t % 2 for t in total):
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            x, padding = torch.nn.functional.pad(x, sides), 0
        else:
            padding = [t // 2 for t in total]
    return x, Geometry(tuple(kernel), strides, _each(padding, dims), dilations, int(groups))


@lru_cache(maxsize=256)
def patches(g: Geometry, spatial: tuple[int, ...]) -> Tensor:
    """The pixel under each tap of each patch, or -1: int32 [T, taps]."""
    at = torch.zeros(1, 1, dtype=torch.int64)
    inside = torch.ones(1, 1, dtype=torch.bool)
    sizes = zip(
        spatial, g.positions(spatial), g.kernel, g.stride, g.padding, g.dilation, strict=True
    )
    for size, positions, k, stride, padding, dilation in sizes:
        one = stride * torch.arange(positions)[:, None] - padding + dilation * torch.arange(k)
        at = (at[:, None, :, None] * size + one[None, :, None, :]).flatten(2).flatten(0, 1)
        ok = (one >= 0) & (one < size)
        inside = (inside[:, None, :, None] & ok[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(inside, at, -1).to(torch.int32).contiguous()


def unfold(x: Tensor, g: Geometry) -> Tensor:
    """The patches [N, C * kernel, T] of x [N, C, *spatial], channels slowest, as a weight's row
    lies in memory; T runs over the output's positions."""
    if g.pointwise:
        return x.flatten(2)
    if len(g.kernel) == 2:
        return torch.nn.functional.unfold(x, g.kernel, g.dilation, g.padding, g.stride)
    sides = [p for p in reversed(g.padding) for _ in (0, 1)]
    x = torch.nn.functional.pad(x, sides)
    dims = len(g.kernel)
    for i, (k, stride, dilation) in enumerate(zip(g.kernel, g.stride, g.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (k - 1) + 1, stride)[..., ::dilation]
    # [N, C, *positions, *kernel]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return x.permute(order).flatten(1 + dims + 1).flatten(1, 1 + dims)
