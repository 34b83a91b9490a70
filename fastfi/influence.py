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
        fi: [B].
        rank: [B] int64, the rank of the contrasts (Exact; of the lumped classes with ``lump``, and
            K - 1 with ``assume_full_rank``) or the number of singular values kept (Truncated); None
            for Damped, which drops none.
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
            (0 < lump < 1; the label is kept). FI of cross-entropy can only grow by it, and does not
            change at full rank; other objectives lose what they do within the merged classes. The
            cost falls from K - 1 backward passes to one for each class that is kept.
        assume_full_rank: use the closed form at rank K - 1, which needs one forward pass and no
            rows; Exact only.
        full_output: return :class:`Influence` instead of FI alone.
        memory_budget: bytes for activations and rows; None means half of what is free. Chunk sizes
            follow from a measurement on two samples; running out of memory halves them.
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
