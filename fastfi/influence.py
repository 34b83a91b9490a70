"""``influence``: FI of every sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi.errors import OptionError
from fastfi.evaluate import evaluate
from fastfi.inverse import Inverse
from fastfi.objectives import Objective

__all__ = ["Influence", "check_dtype", "finish", "influence"]


class Influence(NamedTuple):
    """What :func:`influence` returns with ``full_output=True``.

    Attributes:
        fi: [B], or [B, L] for L layers or names.
        rank: int64, as many as ``fi``: the rank of the contrasts (Exact; of the lumped classes with
            ``lump``, and K - 1 with ``assume_full_rank``) or the number of singular values kept
            (Truncated); None for Damped, which drops none.
        label: [B] int64, the class whose objective was measured: y, or the predicted class.
        log_prob: [B] float64, log P of that class.
        names: the perturbed blocks, one for each column of ``fi``: ``("input",)``, ``("params",)``,
            ``("all",)``, the layers' names, or those given.
        closed_form: names of the blocks whose FI is the closed form at full rank, asked for with
            ``assume_full_rank``, or proved: the model returns the very output of an affine map
            whose bias belongs to the block and is used nowhere else (Exact).
        unreached: names of perturbed parameters that the logits do not depend on, in this model and
            for any sample; a block of such parameters alone has FI 0 and rank 0.
    """

    fi: Tensor
    rank: Tensor | None
    label: Tensor
    log_prob: Tensor
    names: tuple[str, ...]
    closed_form: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()


def check_dtype(dtype: torch.dtype | None) -> None:
    """OptionError unless ``dtype`` is one that a result may have."""
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise OptionError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype!r}")


def finish(fi: Tensor, dtype: torch.dtype | None, of_model: torch.dtype) -> Tensor:
    """Casts to the result's dtype: float64 if the model's is, else float32, unless one is asked
    for. Values beyond float32 saturate: FI stays finite unless P_y underflows float64."""
    dtype = dtype or (torch.float64 if of_model == torch.float64 else torch.float32)
    if dtype == torch.float64:
        return fi
    limit = torch.finfo(dtype).max
    return torch.where(fi.isinf(), fi, fi.clamp(max=limit)).to(dtype)


def influence(
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
    full_output: bool = False,
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | Influence:
    """First-order local influence, for each sample, of a perturbation of the sample itself, of the
    model's parameters, or of single layers' parameters.

    ``FI = h^T G^+ h``, with ``G = sum_k P_k dl_k dl_k^T`` the Fisher metric of what is perturbed,
    dl_k the gradient of log P_k with respect to it, and h the gradient of the objective: Shu and
    Zhu, "Sensitivity Analysis of Deep Neural Networks", AAAI 2019 (arXiv 1901.07152), equations 2
    to 6, Cases 1 to 3. G is never formed, and one sweep of K - 1 backward passes, for K classes,
    does for all layers together.

    Args:
        model: nn.Module in evaluation mode, or any callable, that maps x to class scores [B, K], or
            to an object with ``.logits``; each sample's scores must depend on that sample alone. A
            single logit, [B, 1] or [B], is a two-class model with logits (0, z). Parameters can be
            perturbed in an nn.Module, or through a bound method of one.
        x: floating-point samples [B, ...], B >= 1, finite; or integers, such as tokens, where only
            parameters are perturbed.
        y: integer labels [B] from 0 to K - 1 (the paper's Setups 1 and 2), or None for the
            predicted class (Setups 3 and 4).
        wrt: what is perturbed:

            - ``"input"``: the sample (Case 1, Setups 1 and 3), one block;
            - ``"params"``: all trainable parameters together (Case 2, Setup 2.1), one block;
            - ``"all"``: the input and all trainable parameters together, one block;
            - ``"layers"``: each layer's parameters (Case 3, Setup 2.2). A layer is a module that
              owns trainable parameters itself, "(model)" for the model's own; there are L, in the
              modules' order;
            - a list of names of modules or parameters, ``["layer4", "fc.weight"]``: one block each,
              in that order. A module stands for all trainable parameters below it; blocks may
              overlap.

            Trainable means ``requires_grad``; frozen parameters are not perturbed. A weight that
            several layers share belongs to each of them, with all its uses, and counts once in
            ``"params"`` and ``"all"``.
        objective: ``"cross_entropy"`` (-log P_y), ``"logit"`` (z_y), ``"margin"`` (z_y minus the
            largest other logit), ``"entropy"``, ``"nll_of_others"`` (-log(1 - P_y)), or a callable
            ``f(logits [B, K] float64, y [B]) -> [B]`` that torch can differentiate.
        inverse: ``"exact"`` (the definition), ``"truncated"`` (the authors' published rule),
            ``"damped"``, or an instance of :class:`Exact`, :class:`Truncated`, :class:`Damped`.
            Damped takes tau from the metric of all trainable parameters where blocks are layers or
            names, so that their values compare; otherwise from the block's own.
        outputs: what the model returns: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        lump: merge each sample's least probable classes while they hold less than this mass in all
            (0 < lump < 1; the label is kept). FI of cross-entropy can only grow by it, and does not
            change at full rank; other objectives lose what they do within the merged classes. The
            cost falls from K - 1 backward passes to one for each class that is kept.
        assume_full_rank: use the closed form at rank K - 1, (1 - P_y) / P_y for cross-entropy,
            which needs one forward pass and no rows; Exact only, for ``"input"``, ``"params"`` and
            ``"all"``. Exact takes it anyway where the rank is proved: for blocks with the bias of
            an affine head whose output the model returns as its logits
            (:attr:`Influence.closed_form`).
        full_output: return :class:`Influence` instead of FI alone.
        memory_budget: bytes for activations and rows; None means half of what is free. Chunk sizes
            follow from a measurement on a few samples; running out of memory halves them.
        dtype: of the result; None means float64 for a model that returns float64, else float32,
            where values beyond its range saturate at its largest number.

    Returns:
        FI on x's device, not negative; inf only where P_y underflows float64. [B] for ``"input"``,
        ``"params"`` and ``"all"``, [B, L] for ``"layers"`` and names. Or :class:`Influence`.

    Raises:
        InputError, LabelError, OptionError, OutputError, ModelModeError, NonFiniteError: see
            :mod:`fastfi.errors`; all derive from :class:`FastfiError`. OptionError names parameters
            whose per-sample gradients neither a rule nor the fallback can give.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(784, 32), torch.nn.Linear(32, 10))
        >>> x, y = torch.rand(4, 784), torch.tensor([3, 1, 4, 1])
        >>> fastfi.influence(model, x, y).shape
        torch.Size([4])
        >>> r = fastfi.influence(model, x, y, wrt="layers", inverse="damped", full_output=True)
        >>> r.names, r.fi.shape
        (('0', '1'), torch.Size([4, 2]))
    """
    check_dtype(dtype)
    result = evaluate(
        model,
        x,
        y,
        wrt=wrt,
        objective=objective,
        inverse=inverse,
        outputs=outputs,
        lump=lump,
        assume_full_rank=assume_full_rank,
        memory_budget=memory_budget,
    )
    fi = finish(result.fi, dtype, result.dtype)
    if not full_output:
        return fi
    facts = result.names, result.closed_form, result.unreached
    return Influence(fi, result.rank, result.label, result.log_prob, *facts)
