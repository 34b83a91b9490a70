"""A chunk's Gram matrices, block by block: a forward pass on a tape, and K - 1 backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_finite, check_label_range
from fastfi.classes import SortedClasses
from fastfi.errors import OptionError
from fastfi.inverse import default_rtol
from fastfi.layers.cotangents import Cotangents
from fastfi.layers.parameters import Blocks, Parameters
from fastfi.layers.plan import plan_for
from fastfi.layers.products import root_grams
from fastfi.layers.trace import Stale, Trace, assign, trace
from fastfi.memory import ChunkPlan, Footprint
from fastfi.rows import Contrasts, contrasts
from fastfi.sweep import Request

__all__ = ["BlockGrams", "Sweeper"]


@dataclass(frozen=True)
class BlockGrams:
    """Gram matrices of one chunk's rows, and what the solves need beside them.

    Attributes:
        gram: [B, L, n, n] float64, one for each block.
        total: [B, n, n], of all parameters (and the input, where that is perturbed too); None where
            it was not asked for.
        classes, label, grad: as in :class:`fastfi.rows.Contrasts`.
        dtype: of the model's logits.
        eps: of the rows' precision.
    """

    gram: Tensor
    total: Tensor | None
    classes: SortedClasses
    label: Tensor | None
    grad: Tensor | None
    dtype: torch.dtype
    eps: float

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


class Sweeper:
    """Computes :class:`BlockGrams` for chunks of a request.

    Args:
        q: the request.
        parameters, blocks: whose influence is wanted.
        total: whether the sum over all parameters is wanted too.
        with_input: whether the input is perturbed together with the parameters.
    """

    def __init__(
        self,
        q: Request,
        parameters: Parameters,
        blocks: Blocks,
        total: bool,
        with_input: bool,
    ) -> None:
        self.q, self.parameters, self.blocks = q, parameters, blocks
        self.total, self.with_input = total, with_input
        self.plan = plan_for(parameters, q.x, q.outputs)
        self.columns: list[list[int]] = [[] for _ in parameters.tensors]
        for column, members in enumerate(blocks.members):
            for root in members:
                self.columns[root].append(column)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Names of the perturbed parameters that do not reach the logits."""
        lost = [r for r in sorted(self.plan.unreached) if self.columns[r]]
        return tuple(self.parameters.names[r] for r in lost)

    def chunks(self) -> ChunkPlan:
        """Chunk sizes by what the plan has measured."""
        plan = self.q.plan(variant=("parameters", self.with_input, self.total))
        n = self._most_rows()
        grams = 8 * n * n * (len(self.blocks.names) + 2)
        rows = n * (self.plan.held + self._input_bytes()) + grams
        plan.use(Footprint(self.plan.saved, self.plan.largest, rows))
        self._budget = plan.budget
        return plan

    def _most_rows(self) -> int:
        n = self.plan.classes
        return n if self.q.lump is None else min(n, 32)

    def _input_bytes(self) -> int:
        return self.q.x[0].nbytes if self.with_input else 0

    def _rows_at_once(self, batch: int, n: int) -> int:
        """How many rows' cotangents fit the budget beside the activations."""
        each = batch * (self.plan.held + self._input_bytes())
        left = self._budget - 2 * self.plan.saved * batch
        return n if n * each <= left else max(2, left // max(1, each))

    def __call__(self, x: Tensor, part: slice, y: Tensor | None) -> BlockGrams:
        """The chunk ``part`` of x [B, ...] and labels y [B]."""
        try:
            return self._chunk(x[part], y, part, strict=True)
        except Stale:
            # Other operations than in the samples planned on: a new plan from these.
            self.plan = plan_for(self.parameters, x[part], self.q.outputs, fresh=True)
        try:
            # The shapes may depend on the samples: texts cut to the longest of the batch.
            return self._chunk(x[part], y, part, strict=False)
        except Stale as stale:
            raise _unsteady() from stale

    def _chunk(self, x: Tensor, y: Tensor | None, part: slice, strict: bool) -> BlockGrams:
        q = self.q
        t = trace(self.parameters, x, q.outputs, self.plan, to_input=self.with_input)
        z = t.recorded.z
        assign(t, self.plan, strict)
        check_label_range(y, z.shape[1])
        with (
            torch.inference_mode(False),
            torch.autocast(z.device.type, enabled=False),
            torch.no_grad(),
        ):
            c = contrasts(z, None if y is None else y[part], q.objective, q.lump)
            gram, total = self._products(t, c)
        eps = torch.finfo(self.parameters.dtype).eps
        return BlockGrams(gram, total, c.classes, c.label, c.grad, z.dtype, eps)

    def _products(self, t: Trace, c: Contrasts) -> tuple[Tensor, Tensor | None]:
        """The blocks' Gram matrices, and the total one."""
        z, n = t.recorded.z, c.count
        batch, count = len(z), len(self.blocks.names)
        # One more block for the total.
        gram = z.new_zeros(batch, count + self.total, n, n, dtype=torch.float64)
        pairs = _row_pairs(n, self._rows_at_once(batch, n), z.device)
        for number, (rows, new) in enumerate(pairs):
            part = gram if new is None else gram.new_zeros(*gram.shape[:2], len(rows), len(rows))
            for columns, found in self._grams(t, c, rows, number + 1 == len(pairs)):
                for column in columns:
                    part[:, column] += found
            if new is not None:
                at = torch.tensor(rows, device=z.device)
                gram[:, :, at[:, None], at] += part * new
        squares = gram.diagonal(dim1=2, dim2=3)
        what = "gradients of the logits with respect to the parameters"
        check_finite(squares, "model", what)
        return gram[:, :count], gram[:, count] if self.total else None

    def _grams(
        self, t: Trace, c: Contrasts, rows: Sequence[int], last: bool
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
        for i, row in enumerate(rows):
            keep = not (last and i + 1 == len(rows))
            d = c.cotangent(row).to(z.dtype)
            found = torch.autograd.grad(z, inputs, d, retain_graph=keep, allow_unused=True)
            for edge, g in zip(used, found, strict=False):
                grads[edge] = g
            gathered.take(i, grads)
            if self.with_input:
                to_input[i] = 0 if found[-1] is None else found[-1]
        del grads, found
        everywhere = len(self.blocks.names)
        for root, n in root_grams(gathered):
            yield self.columns[root] + [everywhere] * self.total, n
        if self.with_input:
            n = torch.ops.fastfi.gram(to_input.transpose(0, 1).flatten(2))
            yield [*range(everywhere)] + [everywhere] * self.total, n


def _unsteady() -> OptionError:
    return OptionError(
        "model: expected the same operations on the parameters for every batch, got others in two "
        "passes over the same samples"
    )
