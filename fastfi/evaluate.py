"""One sweep over a batch, from rows to Gram to solve: what every public scoring call runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import (
    check_input,
    check_label_range,
    check_labels,
    check_lump,
    check_model,
)
from fastfi.classes import SortedClasses, kept_classes, sort_classes
from fastfi.errors import OptionError
from fastfi.inverse import Exact, Inverse, as_inverse, solve
from fastfi.memory import ChunkPlan, check_budget, chunks
from fastfi.model import check_outputs, forward
from fastfi.objectives import Objective, as_objective, logit_gradient
from fastfi.rows import InputRows, gram_of, input_rows, measure

__all__ = ["Evaluation", "evaluate"]

# Samples of a forward pass without gradient, where nothing is kept.
FORWARD_CHUNK = 256


class Evaluation(NamedTuple):
    """Everything that one sweep yields, in float64.

    Attributes:
        fi, rank, label, log_prob: as in :class:`Influence`.
        predicted: [B] int64, the most probable class.
        dtype: of the model's logits.
    """

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    predicted: Tensor
    dtype: torch.dtype


def _part(fi: Tensor, rank: Tensor | None, classes: SortedClasses, y: Tensor | None,
          dtype: torch.dtype) -> Evaluation:  # fmt: skip
    label = classes.predicted if y is None else y
    log_prob = classes.full_log_prob.gather(1, label[:, None]).squeeze(1)
    return Evaluation(fi, rank, label, log_prob, classes.predicted, dtype)


def _full_rank_part(
    z: Tensor, inputs: int, y: Tensor | None, objective: str | Objective
) -> Evaluation:
    """The closed form at full rank, FI = sum_k g_k^2 / P_k, from logits z [B, K]."""
    batch, classes = z.shape
    if inputs < classes - 1:
        raise OptionError(
            f"assume_full_rank: expected at least K - 1 = {classes - 1} input values, got "
            f"{inputs}, with which the rank cannot be K - 1"
        )
    with torch.autocast(z.device.type, enabled=False), torch.no_grad():
        c = sort_classes(z, y, None)
        if objective == "cross_entropy":
            # (1 - P_y) / P_y from differences of logarithms.
            others = c.log_prob.scatter(1, c.position[:, None], -torch.inf).logsumexp(1)
            own = c.log_prob.gather(1, c.position[:, None]).squeeze(1)
            fi = (others - own).exp()
        else:
            label = c.predicted if y is None else y
            g = logit_gradient(objective, c.logits, c.full_log_prob, label)
            assert g is not None
            if bool((g.sum(1).abs() > 1e-12 * g.abs().sum(1)).any()):
                raise OptionError(
                    "assume_full_rank: expected an objective that does not change when a constant "
                    f"is added to all logits, got {objective!r}, which needs the rows"
                )
            scaled = g * (-0.5 * c.full_log_prob).clamp(max=600.0).exp()
            fi = scaled.square().sum(1)
        rank = c.order.new_full((batch,), classes - 1)
        return _part(fi, rank, c, y, z.dtype)


def _solved_part(data: InputRows, inverse: Inverse, y: Tensor | None) -> Evaluation:
    gram = gram_of(data)  # [B, n, n]
    fi, rank = solve(inverse, gram, data.classes.log_prob, data.label, data.grad, data.rtol)
    return _part(fi, rank, data.classes, y, data.dtype)


def _by_lumped_count(model: Any, x: Tensor, y: Tensor | None, outputs: str, lump: float) -> Tensor:
    """An order of the samples in which neighbours keep similar numbers of classes: a chunk costs as
    many backward passes as its most demanding sample."""

    def run(part: slice) -> Tensor:
        z = forward(model, x[part].detach(), outputs)
        check_label_range(y, z.shape[1])
        log_prob = z.double().log_softmax(1)
        return kept_classes(log_prob.sort(1, descending=True).values, lump)

    with torch.no_grad():
        kept = list(chunks(len(x), ChunkPlan(None, x, FORWARD_CHUNK), run))
    return torch.cat(kept).argsort(stable=True)


def evaluate(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    wrt: str = "input",
    objective: str | Objective = "cross_entropy",
    inverse: Inverse | str = "exact",
    outputs: str = "logits",
    lump: float | None = None,
    assume_full_rank: bool = False,
    memory_budget: int | None = None,
) -> Evaluation:
    """FI and what belongs to it for a batch; arguments and errors are those of
    :func:`fastfi.influence`."""
    if wrt != "input":
        raise OptionError(f"wrt: expected 'input', the only one in this version, got {wrt!r}")
    rule = as_inverse(inverse)
    objective = as_objective(objective)
    check_outputs(outputs)
    check_lump(lump)
    check_budget(memory_budget)
    if assume_full_rank and not isinstance(rule, Exact):
        raise OptionError(
            f"assume_full_rank: expected inverse='exact', whose closed form it is, got {rule!r}"
        )
    if assume_full_rank and lump is not None:
        raise OptionError(
            f"lump: expected None with assume_full_rank=True, which merges nothing, got {lump!r}"
        )
    check_model(model)
    check_input(x)
    if y is not None:
        y = check_labels(y, x.shape[0], x.device)

    fixed = FORWARD_CHUNK if assume_full_rank else None
    plan = ChunkPlan(memory_budget, x, fixed, model, (outputs, lump))
    order = None
    xs, ys = x, y  # in the order of computation
    if lump is not None and len(x) > plan.size:
        order = _by_lumped_count(model, x, y, outputs, lump)
        xs, ys = x[order], None if y is None else y[order]

    def run(part: slice) -> Evaluation:
        labels = None if ys is None else ys[part]
        if assume_full_rank:
            with torch.no_grad():
                z = forward(model, xs[part].detach(), outputs)
            check_label_range(y, z.shape[1])
            return _full_rank_part(z, xs[0].numel(), labels, objective)
        data = input_rows(model, xs, part, ys, outputs=outputs, objective=objective, lump=lump)
        return _solved_part(data, rule, labels)

    measure(model, xs, plan, outputs, lump)
    parts = list(chunks(len(x), plan, run, order))
    back = None if order is None else order.argsort()

    def join(tensors: list[Tensor]) -> Tensor:
        joined = torch.cat(tensors)
        return joined if back is None else joined[back]

    ranks = [p.rank for p in parts if p.rank is not None]
    return Evaluation(
        join([p.fi for p in parts]),
        join(ranks) if ranks else None,
        join([p.label for p in parts]),
        join([p.log_prob for p in parts]),
        join([p.predicted for p in parts]),
        parts[0].dtype,
    )
