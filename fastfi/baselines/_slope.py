"""The objective's gradient with respect to the samples of a chunk, and products with its Hessian.

One backward pass gives the gradient of every sample, since samples do not depend on one another.
Its graph is kept for the Hessian, whose product with a vector is one more backward pass through
both. Forward mode instead (jvp of the gradient) repeats the network's passes for each product, took
about three times as long for convolutional networks on a CPU, and has no rule for some
operations that reverse mode differentiates twice (autograd functions, packed sequences).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfi._checks import check_finite, check_label_range
from fastfi._process import ProcessSetting
from fastfi.errors import OutputError, SampleError
from fastfi.memory import ActivationMeter, ChunkPlan
from fastfi.objectives import Objective, logit_gradient
from fastfi.rows import Recorded, record
from fastfi.sweep import Request

__all__ = ["Curvature", "Slope", "measure"]

# Attention in here is made of plain operations: torch's fused kernels can be differentiated once.
_twice_differentiable_attention = ProcessSetting(lambda: sdpa_kernel(SDPBackend.MATH))


def _cotangent(objective: str | Objective, z: Tensor, y: Tensor) -> Tensor:
    """df/dz [b, K] float64, differentiable in the logits z [b, K] where they are."""
    logits = z.double()
    log_prob = logits.log_softmax(1)
    if objective == "cross_entropy":
        # P - e_y, whose entry of y, 1 - P_y, is a sum: P_y may round to 1.
        others = log_prob.exp().scatter(1, y[:, None], 0.0)
        return others.scatter(1, y[:, None], -others.sum(1, keepdim=True))
    g = logit_gradient(objective, logits, log_prob, y)
    assert g is not None
    if isinstance(objective, str) or not logits.requires_grad:
        return g
    # A callable's gradient, which logit_gradient has checked, once more with its graph.
    (g,) = torch.autograd.grad(objective(logits, y).sum(), logits, create_graph=True)
    return g


def _cannot(error: object) -> OutputError:
    return OutputError(
        "model: expected logits (and an objective) that autograd can differentiate twice, got an "
        f"operation that it can differentiate once: {error}"
    )


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Says what autograd means by the lack of a formula."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "derivative for" in text and "is not implemented" in text:
            raise _cannot(error) from error
        raise


def _check_graph(gradient: Tensor) -> None:
    """OutputError where a function marked once_differentiable is in the graph of the gradient,
    which ends there: its second derivatives would seem to be 0."""
    seen, left = set(), [gradient.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise _cannot("a function marked with once_differentiable")
        left += [before for before, _ in node.next_functions]


class Slope:
    """The gradient of the objective of each sample of a chunk.

    Args:
        q: the arguments.
        part: the samples, a slice or positions [b].
        second: keep what second derivatives need.
        meter: counts the bytes that are kept.

    Attributes:
        gradient: [b, ...] in the model's precision; the gradient itself over ``scale``.
        scale: [b] float64, positive: the largest entry of df/dz, which may be far below what
            the model's precision can hold.
        dtype, eps: of the logits; machine epsilon of the gradient.
    """

    def __init__(
        self,
        q: Request,
        part: slice | Tensor,
        *,
        second: bool = False,
        meter: ActivationMeter | None = None,
    ) -> None:
        attention = _twice_differentiable_attention() if second else nullcontext()
        with torch.inference_mode(False), attention:
            recorded = record(q.model, q.x[part], q.outputs, meter)
            check_label_range(q.y, recorded.z.shape[1])
            y = recorded.z.detach().argmax(1) if q.y is None else q.y[part]
            self.gradient, self.scale = _slope(recorded, q.objective, y, second, meter)
        self.leaf, self.dtype, self.eps = recorded.leaf, recorded.z.dtype, recorded.eps

    def flat(self) -> Tensor:
        """The gradient over ``scale``, [b, p] float64."""
        g = self.gradient.detach().flatten(1)
        check_finite(g, "model", "gradients of the objective with respect to x")
        return g.double()


def _slope(
    recorded: Recorded,
    objective: str | Objective,
    y: Tensor,
    second: bool,
    meter: ActivationMeter | None,
) -> tuple[Tensor, Tensor]:
    """``gradient`` and ``scale`` of :class:`Slope`."""
    leaf, z = recorded.leaf, recorded.z
    counted = nullcontext() if meter is None else meter
    autocast = torch.autocast(leaf.device.type, enabled=False)
    with torch.set_grad_enabled(second), autocast, counted:
        g = _cotangent(objective, z if second else z.detach(), y)
        peak = g.detach().abs().amax(1)  # [b]
        scale = torch.where(peak > 0, peak, 1.0)
        with _second_derivatives():
            (gradient,) = torch.autograd.grad(
                z, leaf, (g / scale[:, None]).to(z.dtype), create_graph=second, allow_unused=True
            )
    if gradient is None:
        raise OutputError(
            "model: expected logits that depend on x, got logits that autograd cannot trace back "
            "to it"
        )
    return gradient, scale


class Curvature:
    """Gradient and Hessian H of the objective, sample by sample, in units of :attr:`Slope.scale`.

    Args:
        q: the arguments.
        part: the samples of a chunk.
    """

    def __init__(self, q: Request, part: slice) -> None:
        self._q, self._part = q, part
        self._at = torch.arange(len(q.x), device=q.x.device)[part]  # [b], in the batch
        self.slope = Slope(q, part, second=True)
        _check_graph(self.slope.gradient)

    def keep(self, samples: Tensor) -> None:
        """Goes on with some of the chunk's samples, positions [b'] among the present ones."""
        self._at = self._at[samples]
        del self.slope  # its memory, before the next graph is made
        self.slope = Slope(self._q, self._at, second=True)

    def product(self, v: Tensor) -> Tensor:
        """H v of every sample, for v [b, p]: [b, p] float64."""
        gradient, leaf = self.slope.gradient, self.slope.leaf
        if not gradient.requires_grad:  # it does not depend on x
            return torch.zeros_like(v, dtype=torch.float64)
        autocast = torch.autocast(leaf.device.type, enabled=False)
        with torch.inference_mode(False), autocast, _second_derivatives():
            direction = v.to(gradient.dtype).reshape(gradient.shape)
            direction = direction.clone() if direction.is_inference() else direction
            (found,) = torch.autograd.grad(
                gradient, leaf, direction, retain_graph=True, allow_unused=True
            )
        if found is None:
            return torch.zeros_like(v, dtype=torch.float64)
        found = found.flatten(1).double()
        try:
            check_finite(found, "model", "second derivatives of the objective with respect to x")
        except SampleError as error:
            # run_chunks counts from the chunk's first sample
            raise error.at((self._at - (self._part.start or 0)).tolist()) from error
        return found


def measure(q: Request, plan: ChunkPlan, second: bool, sample_bytes: int) -> None:
    """Tells ``plan`` what memory gradients take, as :func:`fastfi.rows.measure` does for rows.

    Args:
        second: with what second derivatives need.
        sample_bytes: what each sample needs besides.
    """
    if plan.measured or len(q.x) <= plan.size:
        return
    meter = ActivationMeter()
    few = q._replace(x=q.x[:2], y=None if q.y is None else q.y[:2])
    try:
        Slope(few, slice(0, 2), second=second, meter=meter)
    except Exception:
        return  # the chunks begin small, and whatever is wrong is raised from them
    plan.measure(meter, 2, 2 * sample_bytes)
