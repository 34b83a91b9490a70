"""``influence``: FI of every sample of a batch, from rows to Gram to solve."""

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
from fastfi.rows import InputRows, input_rows

__all__ = ["Influence", "influence"]

# Samples of a forward pass without gradient, where nothing is kept.
FORWARD_CHUNK = 256


class Influence(NamedTuple):
    """What :func:`influence` returns with ``full_output=True``.

    Attributes:
        fi: [B].
        rank: [B] int64, the rank of the contrasts (Exact; of the lumped classes with ``lump``, and
            K - 1 with ``assume_full_rank``) or the number of singular values kept (Truncated); None
            for Damped, which drops none.
        label: [B] int64, the class whose objective was measured: y, or the predicted class.
        log_prob: [B] float64, log P of that class.
        names: the perturbed blocks, ``("input",)``.
    """

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    names: tuple[str, ...]


class _Part(NamedTuple):
    """One chunk's result, in float64."""

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    dtype: torch.dtype  # of the model's logits


def _part(fi: Tensor, rank: Tensor | None, classes: SortedClasses, y: Tensor | None,
          dtype: torch.dtype) -> _Part:  # fmt: skip
    label = classes.predicted if y is None else y
    log_prob = classes.full_log_prob.gather(1, label[:, None]).squeeze(1)
    return _Part(fi, rank, label, log_prob, dtype)


def _full_rank_part(z: Tensor, inputs: int, y: Tensor | None, objective: str | Objective) -> _Part:
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


def _solved_part(data: InputRows, inverse: Inverse, y: Tensor | None) -> _Part:
    gram = torch.ops.fastfi.gram(data.rows)  # [B, n, n]
    rtol = data.eps * data.classes.logits.shape[1]
    fi, rank = solve(inverse, gram, data.classes.log_prob, data.label, data.grad, rtol)
    return _part(fi, rank, data.classes, y, data.dtype)


def _finish(fi: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts to the result's dtype. Values beyond float32 saturate: FI stays finite unless P_y
    underflows float64."""
    if dtype == torch.float64:
        return fi
    limit = torch.finfo(dtype).max
    return torch.where(fi.isinf(), fi, fi.clamp(max=limit)).to(dtype)


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


def influence(
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
    full_output: bool = False,
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | Influence:
    """First-order local influence of a perturbation of each sample's input (Case 1 of the paper).

    ``FI = h^T G^+ h``, with ``G = sum_k P_k dl_k dl_k^T`` the Fisher metric of the input, dl_k the
    gradient of log P_k, and h the gradient of the objective: Shu and Zhu, "Sensitivity Analysis of
    Deep Neural Networks", AAAI 2019 (arXiv 1901.07152), equations 2 to 6.

    Args:
        model: nn.Module in evaluation mode, or any callable, that maps x to class scores [B, K], or
            to an object with ``.logits``; each sample's scores must depend on that sample alone. A
            single logit, [B, 1] or [B], is a two-class model with logits (0, z).
        x: floating-point samples [B, ...], B >= 1, finite.
        y: integer labels [B] from 0 to K - 1 (the paper's Setups 1 and 2), or None for the
            predicted class (Setups 3 and 4).
        wrt: what is perturbed; only ``"input"`` in this version.
        objective: ``"cross_entropy"`` (-log P_y), ``"logit"`` (z_y), ``"margin"`` (z_y minus the
            largest other logit), ``"entropy"``, ``"nll_of_others"`` (-log(1 - P_y)), or a callable
            ``f(logits [B, K] float64, y [B]) -> [B]`` that torch can differentiate.
        inverse: ``"exact"`` (the definition), ``"truncated"`` (the authors' published rule),
            ``"damped"``, or an instance of :class:`Exact`, :class:`Truncated`, :class:`Damped`.
        outputs: what the model returns: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        lump: merge each sample's least probable classes while they hold less than this mass in all
            (0 < lump < 1; the label is kept). FI can only grow by it, and at full rank
            cross-entropy does not change. The cost falls from K - 1 backward passes to one for each
            class that is kept.
        assume_full_rank: use the closed form at rank K - 1, which needs one forward pass and no
            rows; Exact only.
        full_output: return :class:`Influence` instead of FI alone.
        memory_budget: bytes for activations and rows; None means half of what is free. Chunk sizes
            follow from a measurement on the first samples; running out of memory halves them.
        dtype: of the result; None means float64 for a model that returns float64, else float32,
            where values beyond its range saturate at its largest number.

    Returns:
        FI [B] on x's device, not negative; inf only where P_y underflows float64. Or
        :class:`Influence`.

    Raises:
        InputError, LabelError, OptionError, OutputError, ModelModeError, NonFiniteError: see
            :mod:`fastfi.errors`; all derive from :class:`FastfiError`.

    Example:
        >>> model = torch.nn.Linear(784, 10)
        >>> x, y = torch.rand(4, 784), torch.tensor([3, 1, 4, 1])
        >>> fastfi.influence(model, x, y).shape
        torch.Size([4])
    """
    if wrt != "input":
        raise OptionError(f"wrt: expected 'input', the only one in this version, got {wrt!r}")
    rule = as_inverse(inverse)
    objective = as_objective(objective)
    check_outputs(outputs)
    check_lump(lump)
    check_budget(memory_budget)
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise OptionError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype!r}")
    if assume_full_rank and not isinstance(rule, Exact):
        raise OptionError(
            f"assume_full_rank: expected inverse='exact', whose closed form it is, got {rule!r}"
        )
    if assume_full_rank and lump is not None:
        raise OptionError("lump: expected None with assume_full_rank=True, which needs no classes "
                          f"merged, got {lump!r}")  # fmt: skip
    check_model(model)
    check_input(x)
    if y is not None:
        y = check_labels(y, x.shape[0], x.device)

    plan = ChunkPlan(memory_budget, x, FORWARD_CHUNK if assume_full_rank else None)
    order = None
    xs, ys = x, y  # in the order of computation
    if lump is not None and len(x) > plan.size:
        order = _by_lumped_count(model, x, y, outputs, lump)
        xs, ys = x[order], None if y is None else y[order]

    def run(part: slice) -> _Part:
        labels = None if ys is None else ys[part]
        if assume_full_rank:
            with torch.no_grad():
                z = forward(model, xs[part].detach(), outputs)
            check_label_range(y, z.shape[1])
            return _full_rank_part(z, xs[0].numel(), labels, objective)
        data = input_rows(
            model, xs, part, ys, plan, outputs=outputs, objective=objective, lump=lump
        )
        return _solved_part(data, rule, labels)

    parts = list(chunks(len(x), plan, run, order))
    fi = torch.cat([p.fi for p in parts])
    ranks = [p.rank for p in parts if p.rank is not None]
    rank = torch.cat(ranks) if ranks else None
    label = torch.cat([p.label for p in parts])
    log_prob = torch.cat([p.log_prob for p in parts])
    if order is not None:
        back = order.argsort()
        fi, label, log_prob = fi[back], label[back], log_prob[back]
        rank = None if rank is None else rank[back]
    natural = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    fi = _finish(fi, dtype or natural)
    return Influence(fi, rank, label, log_prob, ("input",)) if full_output else fi
