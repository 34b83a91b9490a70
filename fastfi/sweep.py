"""A pass over a batch in chunks that fit the memory: rows in, what the caller makes of them out.

Every public call that needs rows runs through :func:`sweep`: it checks the arguments once, plans
the chunks, computes each chunk's rows and hands them to the caller's function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fastfi._checks import (
    check_input,
    check_label_range,
    check_labels,
    check_lump,
    check_model,
)
from fastfi.classes import kept_classes
from fastfi.memory import ChunkPlan, check_budget, chunks
from fastfi.model import check_outputs, forward
from fastfi.objectives import Objective, as_objective
from fastfi.rows import InputRows, input_rows, measure

__all__ = ["FORWARD_CHUNK", "Request", "join", "run_chunks", "sweep", "sweep_chunks"]

# Samples of a forward pass without gradient, where nothing is kept.
FORWARD_CHUNK = 256


class Request(NamedTuple):
    """The arguments that every call shares, checked.

    Attributes:
        model, x, y, objective, outputs, lump, memory_budget: as in :func:`fastfi.influence`.
    """

    model: Any
    x: Tensor
    y: Tensor | None
    objective: str | Objective
    outputs: str
    lump: float | None
    memory_budget: int | None

    @staticmethod
    def checked(
        model: Any,
        x: Tensor,
        y: Tensor | None,
        *,
        objective: str | Objective = "cross_entropy",
        outputs: str = "logits",
        lump: float | None = None,
        memory_budget: int | None = None,
        integers: bool = False,
    ) -> Request:
        """Raises the exceptions of :func:`fastfi.influence` for arguments that cannot be used;
        ``integers`` allows x to hold them (tokens)."""
        objective = as_objective(objective)
        check_outputs(outputs)
        check_lump(lump)
        check_budget(memory_budget)
        check_model(model)
        check_input(x, integers)
        if y is not None:
            y = check_labels(y, x.shape[0], x.device)
        return Request(model, x, y, objective, outputs, lump, memory_budget)

    def plan(self, fixed: int | None = None, variant: tuple[Any, ...] = ()) -> ChunkPlan:
        """Chunks of ``fixed`` samples, or by memory, for work of one kind."""
        key = (self.outputs, self.lump, *variant)
        return ChunkPlan(self.memory_budget, self.x, fixed, self.model, key)


T = TypeVar("T")


def join(parts: list[T], back: Tensor | None) -> T:
    """One named tuple from the chunks': tensors joined, in the caller's order; the rest as in the
    first chunk. Lists of named tuples are joined one by one."""
    first: Any = parts[0]
    if isinstance(first, list):
        columns: Any = zip(*cast("list[Any]", parts), strict=True)
        return cast("T", [join(list(column), back) for column in columns])

    def field(values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        joined = torch.cat(values) if len(values) > 1 else values[0]
        return joined if back is None else joined[back]

    return type(parts[0])(*map(field, map(list, zip(*parts, strict=True))))


def _by_lumped_count(q: Request) -> Tensor:
    """An order of the samples in which neighbours keep similar numbers of classes: a chunk costs as
    many backward passes as its most demanding sample."""
    assert q.lump is not None
    lump = q.lump

    def run(part: slice) -> Tensor:
        z = forward(q.model, q.x[part].detach(), q.outputs)
        check_label_range(q.y, z.shape[1])  # here, where positions are the caller's
        log_prob = z.double().log_softmax(1)
        return kept_classes(log_prob.sort(1, descending=True).values, lump)

    with torch.no_grad():
        kept = list(chunks(len(q.x), ChunkPlan(None, q.x, FORWARD_CHUNK), run))
    return torch.cat(kept).argsort(stable=True)


def run_chunks(
    q: Request, plan: ChunkPlan, run: Callable[[slice], T], order: Tensor | None = None
) -> T:
    """Calls run(slice) over the batch and joins what it returns."""
    parts = list(chunks(len(q.x), plan, run, order))
    return join(parts, None if order is None else order.argsort())


def sweep(
    q: Request,
    work: Callable[[InputRows, Tensor], T],
    extra_bytes: int = 0,
    row_copies: int = 0,
) -> T:
    """Computes the rows of every sample, chunk by chunk, and what ``work`` makes of them.

    Args:
        work: called with a chunk's rows and its samples' positions in the batch, int64 [b]; returns
            a named tuple whose tensors have the chunk's samples along their first dimension, or a
            list of such.
        extra_bytes: what ``work`` needs for each sample beside the rows.
        row_copies: and how much more, in units of the rows' own size.

    Returns:
        The named tuple of the whole batch, or their list.
    """
    plan = q.plan(variant=(extra_bytes, row_copies))

    def rows(x: Tensor, part: slice, y: Tensor | None) -> InputRows:
        return input_rows(
            q.model, x, part, y, outputs=q.outputs, objective=q.objective, lump=q.lump
        )

    def measured(x: Tensor) -> None:
        measure(q.model, x, plan, q.outputs, q.lump, extra_bytes, row_copies)

    return sweep_chunks(q, plan, rows, work, measured)


D = TypeVar("D")


def sweep_chunks(
    q: Request,
    plan: ChunkPlan,
    rows: Callable[[Tensor, slice, Tensor | None], D],
    work: Callable[[D, Tensor], T],
    measured: Callable[[Tensor], None] = lambda x: None,
) -> T:
    """The same for rows of any kind.

    Args:
        rows: called with all samples x and labels y, in the order of computation, and a slice.
        measured: called once with the samples, before the first chunk.
    """
    order = _by_lumped_count(q) if q.lump is not None and len(q.x) > plan.size else None
    # In the order of computation from here on.
    x, y = (q.x, q.y) if order is None else (q.x[order], None if q.y is None else q.y[order])
    positions = torch.arange(len(x), device=x.device) if order is None else order

    def run(part: slice) -> T:
        data = rows(x, part, y)
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return work(data, positions[part])

    measured(x)
    return run_chunks(q, plan, run, order)
