"""Contrast rows of the input's Jacobian: one batched backward pass for each row.

Row r of a sample is the vector-Jacobian product with ``e_{class r} - e_{top}``, classes sorted by
probability, so one backward pass serves the whole chunk. A plain loop over rows is used: on CPU,
vmap over cotangents was slower from eight samples on (up to 3 times at 64), and parameters that
require gradients cost nothing, because autograd computes only what the input needs.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from fastfi._checks import check_label_range
from fastfi.classes import SortedClasses, sort_classes
from fastfi.errors import OutputError
from fastfi.memory import ActivationMeter, ChunkPlan
from fastfi.model import forward
from fastfi.objectives import Objective, logit_gradient

__all__ = ["InputRows", "Recorded", "input_rows", "pull_back_rows", "record"]


@dataclass(frozen=True)
class InputRows:
    """Rows of one chunk, and what the solves need beside them.

    Attributes:
        rows: [B, n, p] in the model's precision; n = K' - 1 contrasts, and one more row, h itself,
            where the objective's gradient g has a sum other than zero.
        classes: the sorted classes.
        label: [B], the label's position, for cross-entropy; else None.
        grad: [B, K'] float64, df/dz by position, for objectives with sum g = 0; else None.
        dtype: of the model's logits.
    """

    rows: Tensor
    classes: SortedClasses
    label: Tensor | None
    grad: Tensor | None
    dtype: torch.dtype

    @property
    def eps(self) -> float:
        """Machine epsilon of the precision in which the rows were computed."""
        return max(torch.finfo(self.rows.dtype).eps, torch.finfo(self.dtype).eps)


def _leaf(x: Tensor) -> Tensor:
    """A tensor like x that is not part of any graph, in x's memory format."""
    x = x.detach()
    return x.clone() if x.is_inference() else x


def _pull_back(z: Tensor, leaf: Tensor, cotangent: Tensor, keep_graph: bool) -> Tensor:
    """The vector-Jacobian product of every sample: like leaf."""
    (row,) = torch.autograd.grad(
        z, leaf, cotangent.to(z.dtype), retain_graph=keep_graph, allow_unused=True
    )
    if row is None:
        raise OutputError(
            "model: expected logits that depend on x, got logits that autograd cannot trace back "
            "to it"
        )
    return row


def _objective_gradient(
    objective: str | Objective, classes: SortedClasses, y: Tensor, lump: float | None
) -> tuple[Tensor | None, bool]:
    """df/dz [B, K] in the model's order (None for cross-entropy), and whether h needs a row."""
    if objective == "cross_entropy":
        return None, False
    g = logit_gradient(objective, classes.logits, classes.full_log_prob, y)
    assert g is not None
    if lump is not None:
        return g, True  # g is not constant within the lumped class
    scale = g.abs().sum(1)
    return g, bool((g.sum(1).abs() > 1e-12 * scale).any())


@dataclass(frozen=True)
class Recorded:
    """A forward pass with its graph: logits z [B, K] as a function of leaf [B, ...]."""

    leaf: Tensor
    z: Tensor


def record(model: Any, x: Tensor, outputs: str, meter: ActivationMeter | None = None) -> Recorded:
    """The forward pass of one chunk x [B, ...], whatever the caller's grad mode.

    Args:
        meter: records the bytes that the pass keeps for the backward passes.

    Raises:
        OutputError, NonFiniteError: see :func:`fastfi.model.forward`; OutputError too where the
            logits do not depend on the input through autograd.
    """
    with torch.inference_mode(False):
        leaf = _leaf(x).requires_grad_()
        # A model compiled during this pass must keep its buffers for K - 1 backward passes.
        keep = torch._functorch.config.patch(donated_buffer=False)
        with torch.enable_grad(), keep, meter or nullcontext():
            # A copy, so that a model may work in place on its input.
            z = forward(model, leaf.clone(), outputs)
    if not z.requires_grad:
        raise OutputError(
            "model: expected logits that autograd can differentiate with respect to x, got a "
            "tensor without a gradient (a detach() or torch.no_grad() inside the model?)"
        )
    return Recorded(leaf, z)


def pull_back_rows(
    recorded: Recorded, y: Tensor | None, *, objective: str | Objective, lump: float | None
) -> InputRows:
    """K' - 1 backward passes to the input, one more where the objective needs a row of its own.

    Args:
        y: [B] int64 below K, or None for the predicted class.
    """
    z, leaf = recorded.z, recorded.leaf
    with (
        torch.inference_mode(False),
        torch.autocast(leaf.device.type, enabled=False),
        torch.no_grad(),
    ):
        classes = sort_classes(z, y, lump)
        label = classes.predicted if y is None else y
        g, as_row = _objective_gradient(objective, classes, label, lump)
        contrasts = classes.log_prob.shape[1] - 1
        count = contrasts + as_row
        rows = leaf.new_empty((leaf.shape[0], count, *leaf.shape[1:]))
        for r in range(count):
            cotangent = classes.cotangent(r + 1) if r < contrasts else g
            assert cotangent is not None
            rows[:, r] = _pull_back(z, leaf, cotangent, keep_graph=r + 1 < count)
        grad = None
        if g is not None and not as_row:
            grad = g.gather(1, classes.order)
    position = classes.position if objective == "cross_entropy" else None
    return InputRows(rows.flatten(2), classes, position, grad, z.dtype)


def input_rows(
    model: Any,
    x: Tensor,
    part: slice,
    y: Tensor | None,
    plan: ChunkPlan,
    *,
    outputs: str,
    objective: str | Objective,
    lump: float | None = None,
) -> InputRows:
    """Rows of the samples ``part`` of x [B, ...]: one forward pass, then :func:`pull_back_rows`.

    The first chunk tells ``plan`` what memory the model takes, and whether the labels y [B], which
    are all checked at once, are below its number of classes.

    Raises:
        LabelError, OutputError, NonFiniteError.
    """

    def run() -> InputRows:
        meter = None if plan.measured else ActivationMeter()
        recorded = record(model, x[part], outputs, meter)
        check_label_range(y, recorded.z.shape[1])
        labels = None if y is None else y[part]
        data = pull_back_rows(recorded, labels, objective=objective, lump=lump)
        if meter is not None:
            plan.measure(meter, data.rows.shape[0], data.rows.nbytes)
        return data

    try:
        return run()
    except RuntimeError as error:
        # A model that torch.compile compiled before for one backward pass only: its graph gives
        # its buffers away. Compiled here, it keeps them; see record().
        if "donated buffer" not in str(error):
            raise
    with torch.compiler.set_stance("force_eager"):
        return run()
