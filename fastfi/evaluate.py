"""One sweep over a batch, from rows to Gram to solve: what every public scoring call runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_label_range
from fastfi.classes import SortedClasses, sort_classes
from fastfi.errors import OptionError
from fastfi.inverse import Exact, Inverse, as_inverse, solve
from fastfi.model import forward
from fastfi.objectives import Objective, logit_gradient
from fastfi.rows import InputRows, gram_of
from fastfi.sweep import FORWARD_CHUNK, Request, run_chunks, sweep

__all__ = ["Evaluation", "evaluate"]


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


def _full_rank_part(q: Request, part: slice) -> Evaluation:
    """The closed form at full rank, FI = sum_k g_k^2 / P_k, from one forward pass."""
    with torch.no_grad():
        z = forward(q.model, q.x[part].detach(), q.outputs)  # [b, K]
    batch, classes = z.shape
    check_label_range(q.y, classes)
    inputs, objective = q.x[0].numel(), q.objective
    y = None if q.y is None else q.y[part]
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
    if assume_full_rank and not isinstance(rule, Exact):
        raise OptionError(
            f"assume_full_rank: expected inverse='exact', whose closed form it is, got {rule!r}"
        )
    if assume_full_rank and lump is not None:
        raise OptionError(
            f"lump: expected None with assume_full_rank=True, which merges nothing, got {lump!r}"
        )
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, lump=lump, memory_budget=memory_budget
    )
    if assume_full_rank:
        return run_chunks(q, q.plan(FORWARD_CHUNK), lambda part: _full_rank_part(q, part))

    def work(data: InputRows, at: Tensor) -> Evaluation:
        return _solved_part(data, rule, None if q.y is None else q.y[at])

    return sweep(q, work)
