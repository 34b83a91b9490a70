"""Cotangents of the taps for some rows of every sample.

What is small (gradients of biases and norms) is formed as soon as a backward pass has ended. The
cotangents of weights' operations are kept for all rows, as they came from autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi.layers.calls import Call
from fastfi.layers.uses import Convolution, Lookup, Outer, Scaled, Tapped, Use

__all__ = ["Cotangents"]


class Cotangents:
    """Of the uses of a tape, for n rows of every sample.

    Args:
        uses: with their batchings.
        batch: samples.
        rows: n.
    """

    def __init__(self, uses: Sequence[Tapped], batch: int, rows: int) -> None:
        self.uses, self.batch, self.rows = uses, batch, rows
        # By number of the use: the rows as they came from autograd, each [B, ...].
        self.held: dict[int, list[Tensor]] = {}
        self.leaves: dict[tuple[int, int], Tensor] = {}  # of calls, by output
        self._small: dict[int, Tensor] = {}  # gradients of Scaled uses, [B, n, size] each
        self.joint: Tensor | None = None  # those of parameters with one such use, side by side
        self.columns: dict[int, slice] = {}
        self.placed: set[int] = set()
        self._place()

    def _place(self) -> None:
        """Places for the gradients that need not be summed or rearranged."""
        used: dict[int, int] = {}
        for use in self.uses:
            for root in use.roots:
                used[root] = used.get(root, 0) + 1
        end = 0
        for i, use in enumerate(self.uses):
            if type(use) is Scaled and use.source.in_order and used[use.source.root] == 1:
                self.columns[i] = slice(end, end + use.source.numel)
                end += use.source.numel

    def take(self, r: int, grads: Sequence[Tensor | None]) -> None:
        """Row r, from the cotangents of the tape's edges."""
        plain: dict[int, Tensor] = {}  # by edge: sums over positions that came with weighted ones
        for i, use in enumerate(self.uses):
            if isinstance(use, Call):
                for leaf, edge in enumerate(use.edges):
                    d = grads[edge]
                    if d is not None:
                        d = use.cotangent(leaf, d, self.batch)
                        old = self.leaves.get((i, leaf))
                        self.leaves[i, leaf] = _with_row(old, r, d, self.rows)
                continue
            assert isinstance(use, Use)
            d = grads[use.edge]
            if d is None:
                continue
            if isinstance(use, Scaled):
                if use.factor is not None and use.channels(d, self.batch):
                    g, plain[use.edge] = use.both(d)
                elif use.factor is None and use.edge in plain and use.channels(d, self.batch):
                    g = plain[use.edge]
                else:
                    g = use.gradient(d, self.batch)
                self._put_small(i, r, g)
            else:
                assert isinstance(use, (Outer, Convolution, Lookup))
                self._hold(i, r, use.cotangent(d, self.batch))

    def _put_small(self, i: int, r: int, g: Tensor) -> None:
        columns = self.columns.get(i)
        if columns is None:
            self._small[i] = _with_row(self._small.get(i), r, g, self.rows)
            return
        if self.joint is None:
            width = max(c.stop for c in self.columns.values())
            self.joint = g.new_zeros(self.batch, self.rows, width)
        if torch.promote_types(g.dtype, self.joint.dtype) != self.joint.dtype:
            self.joint = self.joint.to(g.dtype)
        self.joint[:, r, columns] = g
        self.placed.add(i)

    def _hold(self, i: int, r: int, value: Tensor) -> None:
        if i not in self.held:
            self.held[i] = [value] * self.rows
        self.held[i][r] = value

    def stacked(self, i: int, part: slice, rows: slice = slice(None)) -> Tensor:
        """The rows of some samples as one tensor, [b, n, ...]."""
        return torch.stack([d[part] for d in self.held[i][rows]], 1)

    def small(self, i: int) -> Tensor:
        """Gradients [B, n, size] of a Scaled use."""
        if i in self.placed:
            assert self.joint is not None
            return self.joint[:, :, self.columns[i]]
        return self._small[i]

    def reached(self, i: int) -> bool:
        """Whether any cotangent came to the use."""
        alone = i in self.held or i in self._small or i in self.placed
        return alone or any(number == i for number, _ in self.leaves)

    @property
    def device(self) -> torch.device:
        """Of the cotangents."""
        first = next(iter(self.held.values()), None)
        rows = [*(first or ()), *self.leaves.values(), *self._small.values()]
        rows += [] if self.joint is None else [self.joint]
        return rows[0].device


def _with_row(rows: Tensor | None, r: int, value: Tensor, count: int) -> Tensor:
    """Rows [B, count, ...] with row r set; made where there are none yet."""
    if rows is None:
        rows = value.new_empty(len(value), count, *value.shape[1:])
    rows[:, r] = value
    return rows
