"""One sweep over a batch, from rows to Gram to solve: what every public scoring call runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_label_range, check_wrt
from fastfi.classes import SortedClasses, sort_classes
from fastfi.errors import InputError, OptionError
from fastfi.inverse import Damped, Exact, Inverse, as_inverse, damping, solve
from fastfi.layers.grams import BlockGrams
from fastfi.layers.parameters import Parameters, blocks, exclusive
from fastfi.layers.sweeper import Sweeper
from fastfi.model import forward
from fastfi.objectives import Objective, logit_gradient
from fastfi.rows import InputRows, gram_of
from fastfi.sweep import FORWARD_CHUNK, Request, run_chunks, sweep, sweep_chunks

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """Everything that one sweep yields, in float64.

    Attributes:
        fi, rank, label, log_prob, names, closed_form, unreached: as in :class:`Influence`.
        predicted: [B] int64, the most probable class.
        dtype: of the model's logits.
    """

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    predicted: Tensor
    dtype: torch.dtype
    names: tuple[str, ...] = ("input",)
    closed_form: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()


def _part(fi: Tensor, rank: Tensor | None, classes: SortedClasses, y: Tensor | None,
          dtype: torch.dtype) -> Evaluation:  # fmt: skip
    label = classes.predicted if y is None else y
    log_prob = classes.full_log_prob.gather(1, label[:, None]).squeeze(1)
    return Evaluation(fi, rank, label, log_prob, classes.predicted, dtype)


def _closed_form(c: SortedClasses, objective: str | Objective, y: Tensor | None) -> Tensor | None:
    """FI at rank K - 1, sum_k g_k^2 / P_k: [B] float64; None where g has another sum than 0."""
    if objective == "cross_entropy":
        # (1 - P_y) / P_y from differences of logarithms.
        others = c.log_prob.scatter(1, c.position[:, None], -torch.inf).logsumexp(1)
        own = c.log_prob.gather(1, c.position[:, None]).squeeze(1)
        return (others - own).exp()
    g = logit_gradient(objective, c.logits, c.full_log_prob, c.predicted if y is None else y)
    assert g is not None
    if bool((g.sum(1).abs() > 1e-12 * g.abs().sum(1)).any()):
        return None
    scaled = g * (-0.5 * c.full_log_prob).clamp(max=600.0).exp()
    return scaled.square().sum(1)


def _full_rank_part(q: Request, part: slice, coordinates: int) -> Evaluation:
    """The closed form at full rank from one forward pass, for a perturbation of so many numbers."""
    with torch.no_grad():
        z = forward(q.model, q.x[part].detach(), q.outputs)  # [b, K]
    classes = z.shape[1]
    check_label_range(q.y, classes)
    y = None if q.y is None else q.y[part]
    if coordinates < classes - 1:
        raise OptionError(
            f"assume_full_rank: expected at least K - 1 = {classes - 1} values to perturb, got "
            f"{coordinates}, with which the rank cannot be K - 1"
        )
    with torch.autocast(z.device.type, enabled=False), torch.no_grad():
        c = sort_classes(z, y, None)
        fi = _closed_form(c, q.objective, y)
        if fi is None:
            raise OptionError(
                "assume_full_rank: expected an objective that does not change when a constant is "
                f"added to all logits, got {q.objective!r}, which needs the rows"
            )
        rank = c.order.new_full((len(z),), classes - 1)
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
    wrt: str | Sequence[str] = "input",
    objective: str | Objective = "cross_entropy",
    inverse: Inverse | str = "exact",
    outputs: str = "logits",
    lump: float | None = None,
    assume_full_rank: bool = False,
    memory_budget: int | None = None,
) -> Evaluation:
    """FI and what belongs to it for a batch; arguments and errors are those of
    :func:`fastfi.influence`."""
    rule = as_inverse(inverse)
    if assume_full_rank and not isinstance(rule, Exact):
        raise OptionError(
            f"assume_full_rank: expected inverse='exact', whose closed form it is, got {rule!r}"
        )
    if assume_full_rank and lump is not None:
        raise OptionError(
            f"lump: expected None with assume_full_rank=True, which merges nothing, got {lump!r}"
        )
    check_wrt(wrt)
    if wrt == "all" and isinstance(x, Tensor) and not x.is_floating_point():
        raise InputError(
            "x: expected a floating-point tensor for wrt='all', which perturbs x too, got "
            f"{x.dtype}; wrt='params' takes integers"
        )
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, lump=lump, memory_budget=memory_budget,
        integers=wrt not in ("input", "all"),
    )  # fmt: skip
    if wrt != "input":
        with exclusive(model):
            return _of_parameters(q, rule, wrt, assume_full_rank)
    if assume_full_rank:
        size = q.x[0].numel()
        result = run_chunks(q, q.plan(FORWARD_CHUNK), lambda part: _full_rank_part(q, part, size))
        return result._replace(closed_form=("input",))

    def work(data: InputRows, at: Tensor) -> Evaluation:
        return _solved_part(data, rule, None if q.y is None else q.y[at])

    return sweep(q, work)


# Objectives whose gradient in the logits has the sum 0, whatever the sample.
_BALANCED = ("cross_entropy", "margin", "entropy", "nll_of_others")


def _of_parameters(
    q: Request, rule: Inverse, wrt: str | Sequence[str], assume_full_rank: bool
) -> Evaluation:
    """Cases 2 and 3: parameters, layer by layer or together, with the input or without."""
    parameters = Parameters(q.model)
    groups = blocks(parameters, wrt)
    with_input, single = wrt == "all", wrt in ("params", "all")
    if assume_full_rank and not single:
        raise OptionError(
            f"assume_full_rank: expected wrt to be 'input', 'params' or 'all', got {wrt!r}, blocks "
            "which may have any rank"
        )
    size = sum(p.numel() for p in parameters.tensors) + with_input * q.x[0].numel()
    if assume_full_rank:
        result = run_chunks(q, q.plan(FORWARD_CHUNK), lambda p: _full_rank_part(q, p, size))
        return result._replace(names=groups.names, closed_form=groups.names)
    grams = Sweeper(
        q,
        parameters,
        groups,
        total=isinstance(rule, Damped) and not single,
        with_input=with_input,
        closing=_may_close(q, rule),
    )

    def work(data: BlockGrams, at: Tensor) -> Evaluation:
        c, y = data.classes, None if q.y is None else q.y[at]
        fi = rank = tau = None
        if data.gram is not None:
            if isinstance(rule, Damped):
                whole = data.gram[:, 0] if data.total is None else data.total
                tau = damping(rule, whole, c.log_prob)
            fi, rank = solve(rule, data.gram, c.log_prob, data.label, data.grad, data.rtol, tau)
        if any(data.closed):
            fi, rank = _with_closed(data, fi, rank, q.objective, y)
        assert fi is not None
        if single:
            fi, rank = fi[:, 0], None if rank is None else rank[:, 0]
        return _part(fi, rank, c, y, data.dtype)

    result = sweep_chunks(q, grams.chunks(), grams, work)
    return result._replace(
        names=groups.names, closed_form=grams.closed_form, unreached=grams.unreached
    )


def _with_closed(
    data: BlockGrams,
    fi: Tensor | None,
    rank: Tensor | None,
    objective: str | Objective,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """fi and rank [B, L], with the closed form in the blocks where it is proved."""
    c = data.classes
    full = sort_classes(c.logits, y, None) if c.lumped else c
    closed_form = _closed_form(full, objective, y)
    assert closed_form is not None
    contrasts = c.log_prob.isfinite().sum(1, keepdim=True) - 1  # fewer where lumped
    mask = torch.tensor(data.closed, device=c.logits.device)[None]  # [1, L]
    fi = torch.where(mask, closed_form[:, None], 0.0 if fi is None else fi)
    return fi, torch.where(mask, contrasts, 0 if rank is None else rank)


def _may_close(q: Request, rule: Inverse) -> bool:
    """Whether the closed form is what the rule would find at rank K - 1."""
    certain = q.objective == "cross_entropy" or (q.objective in _BALANCED and q.lump is None)
    return certain and isinstance(rule, Exact)
