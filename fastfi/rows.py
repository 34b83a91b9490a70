"""Contrast rows of the input's Jacobian: one batched backward pass for each row.

Row r of a sample is the vector-Jacobian product with ``e_{class r} - e_{top}``, classes sorted by
probability, so one backward pass serves the whole chunk. A plain loop over rows is used, see
:func:`way_of`. Parameters that require gradients cost nothing, because autograd computes only what
the input needs.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_finite, check_label_range
from fastfi.classes import SortedClasses, sort_classes
from fastfi.cudnn import differentiable_rnns, row_eps
from fastfi.errors import OutputError
from fastfi.inverse import default_rtol
from fastfi.memory import ActivationMeter, ChunkPlan, is_out_of_memory
from fastfi.model import eagerly, forward
from fastfi.objectives import Objective, logit_gradient

__all__ = ["BALANCED", "Aim", "Contrasts", "InputRows", "Recorded", "aim", "contrasts", "gram_of"]
__all__ += ["input_rows", "measure", "pull_back_rows", "record", "relabelled", "way_of"]

Way = Literal["loop", "vmap"]
# Objectives whose gradient in the logits has the sum 0, whatever the sample: the contrasts' rows
# serve them all. (Rounding may say otherwise where the gradient itself vanishes.)
BALANCED = ("cross_entropy", "margin", "entropy", "nll_of_others")
_ROWS_AT_ONCE = 16  # of a batched backward pass: bounds what it holds beside the activations


def way_of(device: torch.device) -> Way:
    """How rows are computed: "loop", a backward pass for each, or "vmap", several in one pass.

    On the CPU, vmap was slower from eight samples on (up to 3 times at 64). On a GPU neither has
    been measured.
    """
    return "loop"


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
        eps: of the precision in which the rows were computed.
    """

    rows: Tensor
    classes: SortedClasses
    label: Tensor | None
    grad: Tensor | None
    dtype: torch.dtype
    eps: float

    @property
    def rtol(self) -> float:
        """Relative length under which a row counts as dependent on others: :func:`default_rtol`."""
        eps = max(self.eps, torch.finfo(self.dtype).eps)
        return default_rtol(eps, self.classes.logits.shape[1])


def gram_of(data: InputRows) -> Tensor:
    """Gram matrices [B, n, n] float64 of the rows; NonFiniteError where a row is not finite."""
    gram = torch.ops.fastfi.gram(data.rows)
    squares = gram.diagonal(dim1=1, dim2=2)
    check_finite(squares, "model", "gradients of the logits with respect to x")
    return gram


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


def _loop(recorded: Recorded, c: Contrasts, rows: Tensor) -> None:
    """Fills rows [B, n, ...], one by one."""
    for r in range(c.count):
        keep_graph = r + 1 < c.count
        rows[:, r] = _pull_back(recorded.z, recorded.leaf, c.cotangent(r), keep_graph)


def _vmap(recorded: Recorded, c: Contrasts, rows: Tensor) -> None:
    """Fills rows [B, n, ...], several at once; by the loop where vmap cannot run the model's
    backward pass (a function of the user's that looks at values, for instance). Whatever else may
    be wrong, the loop meets it too."""
    z, leaf = recorded.z, recorded.leaf
    try:
        for first in range(0, c.count, _ROWS_AT_ONCE):
            part = range(first, min(first + _ROWS_AT_ONCE, c.count))
            cotangents = torch.stack([c.cotangent(r).to(z.dtype) for r in part])  # [r, B, K]
            (block,) = torch.autograd.grad(
                z, leaf, cotangents, retain_graph=True, is_grads_batched=True
            )  # [r, B, ...]
            rows[:, part.start : part.stop] = block.transpose(0, 1)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _loop(recorded, c, rows)


def _objective_gradient(
    objective: str | Objective, classes: SortedClasses, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """df/dz by position [B, K'] where its sum is zero, or else h's own cotangent [B, K]; two Nones
    for cross-entropy."""
    if objective == "cross_entropy":
        return None, None
    g = logit_gradient(objective, classes.logits, classes.full_log_prob, y)
    assert g is not None
    by_position, cotangent = classes.pool(g)
    if objective not in BALANCED and bool((g.sum(1).abs() > 1e-12 * g.abs().sum(1)).any()):
        return None, cotangent
    return by_position, None


@dataclass(frozen=True)
class Recorded:
    """A forward pass with its graph: logits z [B, K] as a function of leaf [B, ...], and the
    machine epsilon of gradients with respect to leaf."""

    leaf: Tensor
    z: Tensor
    eps: float


def record(
    model: Any,
    x: Tensor,
    outputs: str,
    meter: ActivationMeter | None = None,
    *,
    to_input: bool = True,
) -> Recorded:
    """The forward pass of one chunk x [B, ...], whatever the caller's grad mode.

    Args:
        meter: records the bytes that the pass keeps for the backward passes.
        to_input: whether the graph goes back to x; else only to the model's parameters.

    Raises:
        OutputError, NonFiniteError: see :func:`fastfi.model.forward`; OutputError too where the
            logits do not depend on the input through autograd.
    """
    with torch.inference_mode(False):
        leaf = _leaf(x).requires_grad_(to_input)
        rnns = differentiable_rnns(model, leaf.device)
        with torch.enable_grad(), eagerly(), rnns, meter or nullcontext():
            z = forward(model, leaf, outputs)
    if not z.requires_grad:
        what = "x" if to_input else "the parameters"
        raise OutputError(
            f"model: expected logits that autograd can differentiate with respect to {what}, got a "
            "tensor without a gradient (a detach() or torch.no_grad() inside the model?)"
        )
    dtype = leaf.dtype if leaf.is_floating_point() else z.dtype
    return Recorded(leaf, z, row_eps(model, dtype, leaf.device))


@dataclass(frozen=True)
class Contrasts:
    """The rows' cotangents, and what the solves need beside the rows.

    Attributes:
        classes: the sorted classes.
        label: [B], the label's position, for cross-entropy; else None.
        grad: [B, K'] float64, df/dz by position, for objectives with sum g = 0; else None.
        own: [B, K] float64, the cotangent of h itself where it is one more row; else None.
    """

    classes: SortedClasses
    label: Tensor | None
    grad: Tensor | None
    own: Tensor | None

    @property
    def count(self) -> int:
        """Rows: K' - 1 contrasts, and h where it is one of them."""
        return self.classes.log_prob.shape[1] - 1 + (self.own is not None)

    def cotangent(self, row: int) -> Tensor:
        """df/dz of one row, [B, K] float64."""
        if row < self.classes.log_prob.shape[1] - 1:
            return self.classes.cotangent(row + 1)
        assert self.own is not None
        return self.own


class Aim(NamedTuple):
    """One objective of one label, as the solves see it: ``classes``, ``label`` and ``grad`` of
    :class:`Contrasts`."""

    classes: SortedClasses
    label: Tensor | None
    grad: Tensor | None


def relabelled(classes: SortedClasses, y: Tensor | None) -> SortedClasses:
    """The same classes for other labels y [B] int64 below K, or None for the predicted class. Where
    some are lumped, the labels must be those for which they were sorted."""
    if y is None:
        return replace(classes, position=torch.zeros_like(classes.position))
    return replace(classes, position=(classes.order == y[:, None]).int().argmax(1))


def aim(classes: SortedClasses, objective: str | Objective, y: Tensor | None) -> Aim:
    """Another target of the same rows, for an objective of :data:`BALANCED`.

    Args:
        classes, y: as in :func:`relabelled`.
    """
    classes = relabelled(classes, y)
    grad, own = _objective_gradient(objective, classes, classes.predicted if y is None else y)
    assert own is None
    return Aim(classes, classes.position if grad is None else None, grad)


def contrasts(
    z: Tensor, y: Tensor | None, objective: str | Objective, lump: float | None
) -> Contrasts:
    """The rows for logits z [B, K]; y [B] int64 below K, or None for the predicted class."""
    classes = sort_classes(z, y, lump)
    grad, own = _objective_gradient(objective, classes, classes.predicted if y is None else y)
    position = classes.position if objective == "cross_entropy" else None
    return Contrasts(classes, position, grad, own)


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
        c = contrasts(z, y, objective, lump)
        rows = leaf.new_empty((leaf.shape[0], c.count, *leaf.shape[1:]))  # in x's order of numbers
        fill = _vmap if way_of(leaf.device) == "vmap" else _loop
        fill(recorded, c, rows)
    return InputRows(rows.flatten(2), c.classes, c.label, c.grad, z.dtype, recorded.eps)


def measure(
    model: Any,
    x: Tensor,
    plan: ChunkPlan,
    outputs: str,
    lump: float | None = None,
    extra_bytes: int = 0,
    row_copies: int = 0,
) -> None:
    """Tells ``plan`` what memory the model takes, from a forward pass of two samples that is thrown
    away. (Counting during a pass that is used would switch off autograd's check for tensors that
    the model overwrote.) Nothing is measured where one small chunk serves, or where the pass fails:
    the chunks begin small then, and whatever is wrong is raised from them.

    Args:
        extra_bytes: what each sample needs beside activations and rows.
        row_copies: and how much more, in units of the rows' own size.
    """
    if plan.measured or len(x) <= plan.size:
        return
    meter = ActivationMeter()
    try:
        z = record(model, x[:2], outputs, meter).z
    except Exception:
        return
    rows = z.shape[1] - 1 if lump is None else min(z.shape[1] - 1, 32)
    plan.measure(meter, 2, 2 * (rows * x[0].nbytes * (1 + row_copies) + extra_bytes))


def input_rows(
    model: Any,
    x: Tensor,
    part: slice,
    y: Tensor | None,
    *,
    outputs: str,
    objective: str | Objective,
    lump: float | None = None,
) -> InputRows:
    """Rows of the samples ``part`` of x [B, ...]: one forward pass, then :func:`pull_back_rows`.

    The labels y [B] are all checked at once, as soon as the number of classes is known.

    Raises:
        LabelError, OutputError, NonFiniteError.
    """

    recorded = record(model, x[part], outputs)
    check_label_range(y, recorded.z.shape[1])
    labels = None if y is None else y[part]
    return pull_back_rows(recorded, labels, objective=objective, lump=lump)
