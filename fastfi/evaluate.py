"""Sweeps over a batch, from rows to Gram to solve: what every public scoring call runs.

The rows of the contrasts and their Gram matrix, which cost the backward passes, know neither the
label nor the objective, unless that changes with all logits together. So one sweep serves several
targets, with a solve for each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_label_range, check_labels, check_wrt
from fastfi.classes import SortedClasses, sort_classes
from fastfi.errors import InputError, OptionError
from fastfi.inverse import Damped, Exact, Inverse, as_inverse, damping, solve
from fastfi.layers.grams import BlockGrams
from fastfi.layers.parameters import Blocks, Parameters, blocks, exclusive
from fastfi.layers.sweeper import Sweeper
from fastfi.model import forward
from fastfi.objectives import Objective, as_objective, logit_gradient
from fastfi.rows import BALANCED, Aim, InputRows, aim, gram_of, relabelled
from fastfi.sweep import FORWARD_CHUNK, Request, run_chunks, sweep, sweep_chunks
from fastfi.targets import Target, request_for, run_shared, sweep_key

__all__ = ["Evaluation", "Target", "evaluate", "evaluate_targets"]


class Evaluation(NamedTuple):
    """Everything that a sweep yields of one target, in float64.

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
    if objective not in BALANCED and bool((g.sum(1).abs() > 1e-12 * g.abs().sum(1)).any()):
        return None
    scaled = g * (-0.5 * c.full_log_prob).clamp(max=600.0).exp()
    return scaled.square().sum(1)


def _full_rank_part(
    q: Request, targets: Sequence[Target], part: slice, coordinates: int
) -> list[Evaluation]:
    """The closed form at full rank from one forward pass, for a perturbation of so many numbers."""
    with torch.no_grad():
        z = forward(q.model, q.x[part].detach(), q.outputs)  # [b, K]
    classes = z.shape[1]
    for target in targets:
        check_label_range(target.y, classes)
    if coordinates < classes - 1:
        raise OptionError(
            f"assume_full_rank: expected at least K - 1 = {classes - 1} values to perturb, got "
            f"{coordinates}, with which the rank cannot be K - 1"
        )
    found = []
    with torch.autocast(z.device.type, enabled=False), torch.no_grad():
        predicted = sort_classes(z, None, None)
        for objective, labels in targets:
            y = None if labels is None else labels[part]
            c = relabelled(predicted, y)
            fi = _closed_form(c, objective, y)
            if fi is None:
                raise OptionError(
                    "assume_full_rank: expected an objective that does not change when a constant "
                    f"is added to all logits, got {objective!r}, which needs the rows"
                )
            rank = c.order.new_full((len(z),), classes - 1)
            found.append(_part(fi, rank, c, y, z.dtype))
    return found


def _aims(
    data: InputRows | BlockGrams, targets: Sequence[Target], at: Tensor
) -> list[tuple[Aim, str | Objective, Tensor | None]]:
    """Each target of a chunk's rows, with its objective and labels [b].

    Args:
        at: the samples' positions in the batch, int64 [b].
    """
    own = [(t.objective, None if t.y is None else t.y[at]) for t in targets]
    if len(targets) == 1:  # the one for which the rows were made, and maybe one of them
        return [(Aim(data.classes, data.label, data.grad), *own[0])]
    for target in targets:
        check_label_range(target.y, data.classes.logits.shape[1])
    return [(aim(data.classes, objective, y), objective, y) for objective, y in own]


def evaluate(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    objective: str | Objective = "cross_entropy",
    **options: Any,
) -> Evaluation:
    """FI and what belongs to it for a batch; arguments and errors are those of
    :func:`fastfi.influence`."""
    return evaluate_targets(model, x, [Target(objective, y)], **options)[0]


def evaluate_targets(
    model: Any,
    x: Tensor,
    targets: Sequence[Target],
    *,
    wrt: str | Sequence[str] = "input",
    inverse: Inverse | str = "exact",
    outputs: str = "logits",
    lump: float | None = None,
    assume_full_rank: bool = False,
    memory_budget: int | None = None,
) -> list[Evaluation]:
    """:func:`evaluate` for several targets of the same samples.

    All targets whose objective is one of :data:`fastfi.rows.BALANCED` cost one sweep together, one
    forward pass and K - 1 backward passes; with ``lump``, those of the same ``y`` (the same
    tensor). Every other target costs a sweep of its own. ``assume_full_rank`` takes one forward
    pass for all.

    Returns:
        One evaluation for each target, in their order.

    Raises:
        The exceptions of :func:`fastfi.influence`. OptionError: no target.
    """
    if len(targets) == 0:
        raise OptionError("targets: expected at least one, got none")
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
    objectives = [as_objective(t.objective) for t in targets]
    q = Request.checked(
        model, x, None, outputs=outputs, lump=lump, memory_budget=memory_budget,
        integers=wrt not in ("input", "all"),
    )  # fmt: skip
    # By identity: the same tensor stays the same.
    labels = {
        id(t.y): None if t.y is None else check_labels(t.y, len(x), x.device) for t in targets
    }
    checked = [Target(f, labels[id(t.y)]) for f, t in zip(objectives, targets, strict=True)]
    if wrt != "input":
        with exclusive(model):
            return _of_parameters(q, checked, rule, wrt, assume_full_rank)
    if assume_full_rank:
        return _full_rank(q, checked, q.x[0].numel(), ("input",))
    return run_shared(
        checked, lambda t: sweep_key(t, lump), lambda ts: _of_input(request_for(q, ts), ts, rule)
    )


def _full_rank(
    q: Request, targets: Sequence[Target], coordinates: int, names: tuple[str, ...]
) -> list[Evaluation]:
    found = run_chunks(
        q, q.plan(FORWARD_CHUNK), lambda part: _full_rank_part(q, targets, part, coordinates)
    )
    return [e._replace(names=names, closed_form=names) for e in found]


def _of_input(q: Request, targets: Sequence[Target], rule: Inverse) -> list[Evaluation]:
    """Case 1: the sample, one sweep."""

    def work(data: InputRows, at: Tensor) -> list[Evaluation]:
        gram = gram_of(data)  # [b, n, n]
        log_prob = data.classes.log_prob
        tau = damping(rule, gram, log_prob) if isinstance(rule, Damped) else None
        found = []
        for (c, label, grad), _, y in _aims(data, targets, at):
            fi, rank = solve(rule, gram, log_prob, label, grad, data.rtol, tau)
            found.append(_part(fi, rank, c, y, data.dtype))
        return found

    return sweep(q, work)


def _of_parameters(
    q: Request,
    targets: Sequence[Target],
    rule: Inverse,
    wrt: str | Sequence[str],
    assume_full_rank: bool,
) -> list[Evaluation]:
    """Cases 2 and 3: parameters, layer by layer or together, with the input or without."""
    parameters = Parameters(q.model)
    groups = blocks(parameters, wrt)
    with_input, single = wrt == "all", wrt in ("params", "all")
    if assume_full_rank and not single:
        raise OptionError(
            f"assume_full_rank: expected wrt to be 'input', 'params' or 'all', got {wrt!r}, blocks "
            "which may have any rank"
        )
    if assume_full_rank:
        size = sum(p.numel() for p in parameters.tensors) + with_input * q.x[0].numel()
        return _full_rank(q, targets, size, groups.names)

    def key(target: Target) -> Hashable:
        return sweep_key(target, q.lump, _may_close(target, q.lump, rule))

    def run(members: Sequence[Target]) -> list[Evaluation]:
        return _of_blocks(
            request_for(q, members), members, parameters, groups, rule, with_input, single
        )

    return run_shared(targets, key, run)


def _of_blocks(
    q: Request,
    targets: Sequence[Target],
    parameters: Parameters,
    groups: Blocks,
    rule: Inverse,
    with_input: bool,
    single: bool,
) -> list[Evaluation]:
    """One sweep; targets that may close are not mixed with others."""
    grams = Sweeper(
        q,
        parameters,
        groups,
        total=isinstance(rule, Damped) and not single,
        with_input=with_input,
        closing=_may_close(targets[0], q.lump, rule),
    )

    def work(data: BlockGrams, at: Tensor) -> list[Evaluation]:
        tau, log_prob = None, data.classes.log_prob
        if data.gram is not None and isinstance(rule, Damped):
            whole = data.gram[:, 0] if data.total is None else data.total
            tau = damping(rule, whole, log_prob)
        found = []
        for (c, label, grad), objective, y in _aims(data, targets, at):
            fi = rank = None
            if data.gram is not None:
                fi, rank = solve(rule, data.gram, log_prob, label, grad, data.rtol, tau)
            if any(data.closed):
                fi, rank = _with_closed(c, data.closed, fi, rank, objective, y)
            assert fi is not None
            if single:
                fi, rank = fi[:, 0], None if rank is None else rank[:, 0]
            found.append(_part(fi, rank, c, y, data.dtype))
        return found

    result = sweep_chunks(q, grams.chunks(), grams, work)
    names, closed, unreached = groups.names, grams.closed_form, grams.unreached
    return [e._replace(names=names, closed_form=closed, unreached=unreached) for e in result]


def _with_closed(
    c: SortedClasses,
    closed: tuple[bool, ...],
    fi: Tensor | None,
    rank: Tensor | None,
    objective: str | Objective,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """fi and rank [B, L], with the closed form in the blocks where it is proved."""
    full = sort_classes(c.logits, y, None) if c.lumped else c
    closed_form = _closed_form(full, objective, y)
    assert closed_form is not None
    contrasts = c.log_prob.isfinite().sum(1, keepdim=True) - 1  # fewer where lumped
    mask = torch.tensor(closed, device=c.logits.device)[None]  # [1, L]
    fi = torch.where(mask, closed_form[:, None], 0.0 if fi is None else fi)
    return fi, torch.where(mask, contrasts, 0 if rank is None else rank)


def _may_close(target: Target, lump: float | None, rule: Inverse) -> bool:
    """Whether the closed form is what the rule would find at rank K - 1."""
    f = target.objective
    return isinstance(rule, Exact) and (f == "cross_entropy" or (f in BALANCED and lump is None))
