"""Gram matrices of one chunk, block by block, from K - 1 backward passes through a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_finite
from fastfi.classes import SortedClasses
from fastfi.inverse import default_rtol
from fastfi.layers.cotangents import Cotangents
from fastfi.layers.parameters import Blocks
from fastfi.layers.products import root_grams
from fastfi.layers.trace import Stale, Trace
from fastfi.layers.uses import Tapped

__all__ = ["BlockGrams", "Products"]


@dataclass(frozen=True)
class BlockGrams:
    """Gram matrices of one chunk's rows, and what the solves need beside them.

    Attributes:
        gram: [B, L, n, n] float64, one for each block; None where all are closed.
        total: [B, n, n], of all parameters (and the input, where that is perturbed too); None where
            it was not asked for.
        classes, label, grad: as in :class:`fastfi.rows.Contrasts`.
        dtype: of the model's logits.
        eps: of the rows' precision.
        closed: for each block, whether its rank is proved to be K - 1.
    """

    gram: Tensor | None
    total: Tensor | None
    classes: SortedClasses
    label: Tensor | None
    grad: Tensor | None
    dtype: torch.dtype
    eps: float
    closed: tuple[bool, ...]

    @property
    def rtol(self) -> float:
        """As :attr:`fastfi.rows.InputRows.rtol`."""
        eps = max(self.eps, torch.finfo(self.dtype).eps)
        return default_rtol(eps, self.classes.logits.shape[1])


class _RowPair(NamedTuple):
    """Rows whose cotangents are held together, and which of their products are new (0 or 1)."""

    rows: list[int]
    new: Tensor | None


def _row_pairs(n: int, size: int, device: torch.device) -> list[_RowPair]:
    """Every pair of n rows, with at most ``size`` rows at once (at least two)."""
    if size >= n:
        return [_RowPair(list(range(n)), None)]
    half = max(1, size // 2)
    parts = [list(range(i, min(i + half, n))) for i in range(0, n, half)]
    pairs = []
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[i + 1 :], i + 1):
            new = torch.ones(len(a) + len(b), len(a) + len(b), dtype=torch.float64, device=device)
            if j > i + 1:
                new[: len(a), : len(a)] = 0  # a's own products came with its first partner
            if i + 2 < len(parts) or j + 1 < len(parts):
                new[len(a) :, len(a) :] = 0  # b's come later, the last one's with the last pair
            pairs.append(_RowPair(a + b, new))
    return pairs


class Products:
    """Sums the Gram matrices of parameters into those of blocks.

    Args:
        blocks: of parameters; and of the input, where ``with_input``, every one.
        parameters: how many there are.
        total: whether the sum over all parameters is wanted too.
        with_input: whether the input is perturbed together with the parameters.
    """

    def __init__(self, blocks: Blocks, parameters: int, total: bool, with_input: bool) -> None:
        self.count = len(blocks.names)
        self.total, self.with_input = total, with_input
        self.columns: list[list[int]] = [[] for _ in range(parameters)]
        for column, members in enumerate(blocks.members):
            for root in members:
                self.columns[root].append(column)

    def __call__(
        self, t: Trace, n: int, cotangent: Callable[[int], Tensor], at_once: int, suspicious: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gram matrices [B, L, n, n] of the blocks, and [B, n, n] of all parameters.

        Args:
            n: rows.
            cotangent: of the logits, [B, K], by row.
            at_once: how many rows' cotangents fit the memory.
            suspicious: make sure that every sample's part of each cotangent is its own.

        Raises:
            Stale: it is not.
            NonFiniteError: a gradient is not finite.
        """
        z = t.recorded.z
        # One more block for the total.
        gram = z.new_zeros(len(z), self.count + self.total, n, n, dtype=torch.float64)
        pairs = _row_pairs(n, at_once, z.device)
        for number, (rows, new) in enumerate(pairs):
            part = gram if new is None else gram.new_zeros(*gram.shape[:2], len(rows), len(rows))
            last, check = number + 1 == len(pairs), suspicious and number == 0
            for columns, found in self._grams(t, cotangent, rows, last, check):
                for column in columns:
                    part[:, column] += found
            if new is not None:
                at = torch.tensor(rows, device=z.device)
                gram[:, :, at[:, None], at] += part * new
        squares = gram.diagonal(dim1=2, dim2=3)
        check_finite(squares, "model", "gradients of the logits with respect to the parameters")
        return gram[:, : self.count], gram[:, self.count] if self.total else None

    def _grams(
        self,
        t: Trace,
        cotangent: Callable[[int], Tensor],
        rows: Sequence[int],
        last: bool,
        suspicious: bool,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(blocks, N [B, rows, rows]) for every parameter, and for the input."""
        z, leaf = t.recorded.z, t.recorded.leaf
        wanted = [self.total or bool(columns) for columns in self.columns]
        uses = [u for u in t.tape.uses if any(wanted[root] for root in u.roots)]
        used = sorted({e for u in uses for e in u.edges})
        gathered = Cotangents(uses, len(z), len(rows))
        to_input = leaf.new_empty(len(rows) if self.with_input else 0, *leaf.shape)
        inputs: list[Any] = [t.tape.edges[e] for e in used] + [leaf] * self.with_input
        grads: list[Tensor | None] = [None] * len(t.tape.edges)
        if not inputs:
            return
        for i, row in enumerate(rows):
            keep = suspicious or not (last and i + 1 == len(rows))
            d = cotangent(row).to(z.dtype)
            found = torch.autograd.grad(z, inputs, d, retain_graph=keep, allow_unused=True)
            for edge, g in zip(used, found, strict=False):
                grads[edge] = g
            if suspicious:
                _check_places(t, uses, used, inputs, grads, d)
                suspicious = False
            gathered.take(i, grads)
            if self.with_input:
                to_input[i] = 0 if found[-1] is None else found[-1]
        del grads, found
        everywhere = [self.count] * self.total
        for root, n in root_grams(gathered):
            yield self.columns[root] + everywhere, n
        if self.with_input:
            n = torch.ops.fastfi.gram(to_input.transpose(0, 1).flatten(2))
            yield [*range(self.count), *everywhere], n


def _check_places(
    t: Trace,
    uses: Sequence[Tapped],
    used: Sequence[int],
    inputs: Sequence[Any],
    grads: Sequence[Tensor | None],
    d: Tensor,
) -> None:
    """Stale unless scaling each sample's logits scales what is taken for its part of every
    cotangent, and nothing else: one backward pass more, for models in which values decide where
    entries go."""
    batch = len(d)
    scale = 1.0 + (0.6180339887 * torch.arange(1, batch + 1, device=d.device)) % 1.0
    scale = scale.to(d.dtype)
    scaled = torch.autograd.grad(
        t.recorded.z, inputs, d * scale[:, None], retain_graph=True, allow_unused=True
    )
    other = dict(zip(used, scaled, strict=False))
    for use in uses:
        for edge, batching in zip(use.edges, use.places(), strict=True):
            one, two = grads[edge], other[edge]
            if one is None or two is None:
                continue
            if batching is None:
                raise Stale
            a, b = (batching.split(v, batch).flatten(1) for v in (one, two))
            size, error = b.abs().amax(1), (b - a * scale.to(a)[:, None]).abs().amax(1)
            # Two backward passes of one graph differ by roundings, the scales of neighbours by a
            # fifth or more. Two samples of hundreds may be alike within the tolerance, but wrong
            # places exchange many pairs.
            tolerance = max(1e-3, 30 * torch.finfo(a.dtype).eps)
            largest = torch.where(size.isfinite(), size, 0.0).amax()
            if not bool((error <= tolerance * size + 1e-6 * largest).all()):  # NaN is not either
                raise Stale
