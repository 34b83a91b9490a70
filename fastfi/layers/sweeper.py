"""Chunks of a batch: from samples to the Gram matrices of blocks of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fastfi._checks import check_label_range
from fastfi.cudnn import row_eps
from fastfi.errors import OptionError, SampleError
from fastfi.layers.grams import BlockGrams, Products
from fastfi.layers.parameters import Blocks, Parameters
from fastfi.layers.plan import plan_for
from fastfi.layers.trace import Stale, Trace, account, assign, head_of, trace
from fastfi.memory import ChunkPlan, Footprint
from fastfi.rows import Contrasts, contrasts
from fastfi.sweep import Request

__all__ = ["Sweeper"]


@contextmanager
def _quietly(z: Tensor) -> Iterator[None]:
    """Whatever the caller's modes: no autocast, no graph, and tensors that autograd may use."""
    with (
        torch.inference_mode(False),
        torch.autocast(z.device.type, enabled=False),
        torch.no_grad(),
    ):
        yield


def _row(c: Contrasts, sample: int, row: int) -> Tensor:
    return c.cotangent(row)[sample : sample + 1]


class Sweeper:
    """Computes :class:`BlockGrams` for chunks of a request.

    Args:
        q: the request.
        parameters, blocks: whose influence is wanted.
        total: whether the Gram matrix of all parameters is wanted too.
        with_input: whether the input is perturbed together with the parameters.
        closing: whether blocks whose rank is proved to be K - 1 may be left out.

    Attributes:
        plan: of the model.
    """

    def __init__(
        self,
        q: Request,
        parameters: Parameters,
        blocks: Blocks,
        *,
        total: bool,
        with_input: bool,
        closing: bool = False,
    ) -> None:
        self.q, self.parameters, self.blocks = q, parameters, blocks
        self.with_input, self.closing = with_input, closing
        self.products = Products(blocks, len(parameters.tensors), total, with_input)
        self.plan = plan_for(parameters, q.x, q.outputs)
        self._reached: frozenset[int] = frozenset()
        self._closed: tuple[bool, ...] | None = None

    @property
    def unreached(self) -> tuple[str, ...]:
        """Names of the perturbed parameters that no chunk's logits depended on."""
        names = enumerate(self.parameters.names)
        lost = [n for r, n in names if self.products.columns[r] and r not in self._reached]
        return tuple(lost)

    @property
    def closed_form(self) -> tuple[str, ...]:
        """Names of the blocks that were closed in every chunk."""
        closed = self._closed or (False,) * len(self.blocks.names)
        return tuple(n for n, c in zip(self.blocks.names, closed, strict=True) if c)

    def chunks(self) -> ChunkPlan:
        """Chunk sizes by what the plan has measured."""
        plan = self.q.plan(variant=("parameters", self.with_input, self.products.total))
        n = self.plan.classes if self.q.lump is None else min(self.plan.classes, 32)
        grams = 8 * n * n * (len(self.blocks.names) + 2)
        rows = n * (self.plan.held + self._input_bytes()) + grams
        plan.use(Footprint(self.plan.saved, self.plan.largest, rows))
        self._budget = plan.budget
        return plan

    def _input_bytes(self) -> int:
        return self.q.x[0].nbytes if self.with_input else 0

    def _rows_at_once(self, batch: int, n: int) -> int:
        """How many rows' cotangents fit the budget beside the activations."""
        each = batch * (self.plan.held + self._input_bytes())
        left = self._budget - 2 * self.plan.saved * batch
        return n if n * each <= left else max(2, left // max(1, each))

    def __call__(self, x: Tensor, part: slice, y: Tensor | None) -> BlockGrams:
        """The chunk ``part`` of x [B, ...] and labels y [B].

        Raises:
            LabelError, OutputError, NonFiniteError: as :func:`fastfi.influence`.
            OptionError: the model does something else whenever it is called.
        """
        samples, labels = x[part], None if y is None else y[part]
        for fresh in (False, True):
            if fresh:  # other operations than in the samples planned on
                self._plan_on(samples)
            try:
                return self._chunk(samples, y, labels, strict=True)
            except Stale:
                pass
        try:
            # Shapes may depend on the samples: texts cut to the longest of the batch.
            return self._chunk(samples, y, labels, strict=False)
        except Stale:
            return self._one_by_one(samples, y, labels)

    def _plan_on(self, x: Tensor) -> None:
        self.plan = plan_for(self.parameters, x, self.q.outputs, fresh=True)

    def _trace(self, x: Tensor, strict: bool) -> Trace:
        """A pass in which every use is where the plan says, and no parameter is used otherwise."""
        t = trace(self.parameters, x, self.q.outputs, self.plan, to_input=self.with_input)
        assign(t, self.plan, strict)
        missed, there = account(t, self.parameters, self.plan)
        if missed:
            raise Stale
        self._reached |= there
        return t

    def _chunk(
        self, x: Tensor, y: Tensor | None, labels: Tensor | None, strict: bool
    ) -> BlockGrams:
        t = self._trace(x, strict)
        suspicious = len(x) > 1 and (not strict or self.plan.unclear or t.tape.indexed)
        z = t.recorded.z
        check_label_range(y, z.shape[1])
        with _quietly(z):
            c = contrasts(z, labels, self.q.objective, self.q.lump)
            closed = self._proved(t)
            if all(closed):
                return self._grams(c, z.dtype, None, None, closed)
            at_once = self._rows_at_once(len(x), c.count)
            gram, total = self.products(t, c.count, c.cotangent, at_once, suspicious)
        return self._grams(c, z.dtype, gram, total, closed)

    def _one_by_one(self, x: Tensor, y: Tensor | None, labels: Tensor | None) -> BlockGrams:
        """Each sample alone, where the samples' places in a batch cannot be told."""
        with torch.no_grad():
            z = trace(self.parameters, x, self.q.outputs, self.plan).recorded.z.detach()
        check_label_range(y, z.shape[1])
        with _quietly(z):
            c = contrasts(z, labels, self.q.objective, self.q.lump)
        grams, totals = [], []
        for i in range(len(x)):
            one = slice(i, i + 1)
            try:
                t = self._one(x[one])
                with _quietly(z):
                    at_once = self._rows_at_once(1, c.count)
                    gram, total = self.products(t, c.count, partial(_row, c, i), at_once, False)
            except SampleError as error:
                raise error.at([i]) from error
            grams.append(gram)
            totals.append(total)
        joined = None if totals[0] is None else torch.cat([t for t in totals if t is not None])
        closed = (False,) * len(self.blocks.names)
        return self._grams(c, z.dtype, torch.cat(grams), joined, closed)

    def _one(self, x: Tensor) -> Trace:
        try:
            return self._trace(x, strict=False)
        except Stale:
            self._plan_on(x)
        try:
            return self._trace(x, strict=False)
        except Stale as stale:
            raise OptionError(
                "model: expected the same operations on the parameters whenever the same sample is "
                "given, got others in two passes"
            ) from stale

    def _proved(self, t: Trace) -> tuple[bool, ...]:
        """For each block, whether it holds the bias of the logits' own affine map."""
        head = head_of(t, self.q.outputs) if self.closing else None
        return tuple(head in members for members in self.blocks.members)

    def _grams(
        self,
        c: Contrasts,
        dtype: torch.dtype,
        gram: Tensor | None,
        total: Tensor | None,
        closed: tuple[bool, ...],
    ) -> BlockGrams:
        before = closed if self._closed is None else self._closed
        self._closed = tuple(a and b for a, b in zip(before, closed, strict=True))
        eps = row_eps(self.q.model, self.parameters.dtype, c.classes.logits.device)
        return BlockGrams(gram, total, c.classes, c.label, c.grad, dtype, eps, closed)
