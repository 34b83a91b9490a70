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
        # By number of the use: the rows as they came from autograd.
        self.held: dict[int, list[Tensor]] = {}
        self.leaves: dict[tuple[int, int], Tensor] = {}  # of calls, by output
        self._small: dict[int, Tensor] = {}  # gradients of Scaled uses, [B, n, size] each
        # Gradients of norms' weights and biases, side by side [B, n, columns], by use.
        self.joint: Tensor | None = None
        self.columns: dict[int, slice] = {}
        self._norms: list[tuple[int, int | None]] = []  # uses of weight and bias
        self._factors: list[Tensor] = []

    def _place(self, grads: Sequence[Tensor | None]) -> None:
        """Finds the norms whose sums are made together: of weights that are used once, and the
        biases beside them."""
        used: dict[int, int] = {}
        for use in self.uses:
            for root in use.roots:
                used[root] = used.get(root, 0) + 1
        alone = {
            i: use
            for i, use in enumerate(self.uses)
            if type(use) is Scaled and use.source.in_order and used[use.source.root] == 1
            and use.by_channel(self.batch) and grads[use.edge] is not None
        }  # fmt: skip
        biases = {use.edge: i for i, use in alone.items() if use.factor is None}
        end = 0
        for i, use in alone.items():
            d, factor = grads[use.edge], use.scale()
            if d is None or factor is None or d.dtype not in (torch.float32, torch.float64):
                continue
            self._norms.append((i, biases.get(use.edge)))
            self._factors.append(factor.to(d.dtype).reshape(*d.shape[:2], -1))
            for at in self._norms[-1]:
                if at is not None:
                    self.columns[at] = slice(end, end + use.source.numel)
                end += use.source.numel
        if len({f.dtype for f in self._factors}) > 1:
            self._norms, self._factors, self.columns = [], [], {}

    def take(self, r: int, grads: Sequence[Tensor | None]) -> None:
        """Row r, from the cotangents of the tape's edges."""
        if r == 0:
            self._place(grads)
        if self._norms:
            self._take_norms(r, grads)
        for i, use in enumerate(self.uses):
            if i in self.columns:
                continue
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
                g = use.gradient(d, self.batch)
                self._small[i] = _with_row(self._small.get(i), r, g, self.rows)
            else:
                self.held.setdefault(i, [d] * self.rows)[r] = d

    def _take_norms(self, r: int, grads: Sequence[Tensor | None]) -> None:
        """All norms at once: both sums from one reading of each cotangent."""
        given = []
        for (i, _), factor in zip(self._norms, self._factors, strict=True):
            use = self.uses[i]
            assert isinstance(use, Use)
            d = grads[use.edge]
            assert d is not None
            given.append(d.reshape(factor.shape))
        sums = torch.ops.fastfi.channel_sums(given, self._factors)
        if self.joint is None:
            self.joint = sums.new_empty(self.batch, self.rows, sums.shape[1])
        self.joint[:, r] = sums

    def cotangents(self, i: int) -> list[Tensor]:
        """The rows of a weight's use in the form of its kind, each [B, ...]."""
        use = self.uses[i]
        assert isinstance(use, (Outer, Convolution, Lookup))
        return [use.cotangent(d, self.batch) for d in self.held[i]]

    def stacked(self, i: int, part: slice, rows: slice = slice(None)) -> Tensor:
        """The rows of some samples as one tensor, [b, n, ...]."""
        return torch.stack([d[part] for d in self.cotangents(i)[rows]], 1)

    def small(self, i: int) -> Tensor:
        """Gradients [B, n, size] of a Scaled use."""
        if i in self.columns:
            assert self.joint is not None
            return self.joint[:, :, self.columns[i]]
        return self._small[i]

    def reached(self, i: int) -> bool:
        """Whether any cotangent came to the use."""
        alone = i in self.held or i in self._small or i in self.columns
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
