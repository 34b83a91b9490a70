"""Cook's local influence in a direction, and its maximum over all directions."""

from __future__ import annotations

import numbers
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_finite
from fastfi.baselines._lanczos import extreme_eigenpairs
from fastfi.baselines._slope import Curvature, measure
from fastfi.errors import InputError, OptionError, list_some
from fastfi.influence import check_dtype, finish
from fastfi.objectives import Objective
from fastfi.sweep import Request, run_chunks

__all__ = ["CookInfluence", "cook_influence", "max_cook_influence"]


class CookInfluence(NamedTuple):
    """What :func:`max_cook_influence` returns with ``full_output=True``.

    Attributes:
        influence: [B], the largest normal curvature.
        direction: like x, with Euclidean norm 1 for each sample: the direction that attains it, of
            either sign; any direction where the influence is 0.
        iterations: [B] int64, products with the Hessian.
        residual: [B] float64, ``|A u - theta u| / |theta|``: bounds the relative error of the
            eigenvalue that was found. 0 where A = 0.
        converged: [B] bool; where it is False, ``influence`` is a lower bound.
    """

    influence: Tensor
    direction: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor


class _Value(NamedTuple):
    influence: Tensor
    dtype: torch.dtype


class _Found(NamedTuple):
    influence: Tensor
    direction: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    dtype: torch.dtype


def _check_direction(direction: Any, x: Tensor) -> Tensor:
    """Unit vectors [B or 1, p] float64 on x's device."""
    shape, one = list(x.shape), list(x.shape[1:])
    expected = (
        f"direction: expected one direction for each sample, {shape}, or one for all, {one}, of "
        "real numbers"
    )
    if not isinstance(direction, Tensor):
        raise InputError(f"{expected}, got {type(direction).__name__}")
    if direction.layout != torch.strided or direction.is_complex() or direction.is_meta:
        came = f"{direction.dtype}, layout {direction.layout} on {direction.device}"
        raise InputError(f"{expected}, got {came}")
    if list(direction.shape) not in (shape, one):
        raise InputError(f"{expected}, got shape {list(direction.shape)}")
    h = direction.detach().to(x.device, torch.float64)
    h = h.reshape(len(x) if direction.dim() == x.dim() else 1, -1)
    check_finite(h, "direction", "numbers")
    peak = h.abs().amax(1, keepdim=True)
    zero = (peak == 0).flatten().nonzero().flatten().tolist()
    if zero:
        raise InputError(f"{expected}, got zeros alone in directions {list_some(zero)}")
    h = h / peak  # the squares of its length neither underflow nor overflow then
    return h / torch.linalg.vector_norm(h, dim=1, keepdim=True)


@torch.no_grad()
def cook_influence(
    model: Any,
    x: Tensor,
    y: Tensor | None,
    direction: Tensor,
    *,
    objective: str | Objective = "cross_entropy",
    outputs: str = "logits",
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cook's local influence in a direction: the normal curvature of the graph (x, f(x)).

    Equation 5 of Shu and Zhu, "Sensitivity Analysis of Deep Neural Networks", AAAI 2019
    (arXiv 1901.07152), after Cook (1986). With g and H the gradient and the Hessian of f in x::

        C_h = |h^T H h| / (sqrt(1 + g.g) * h^T (I + g g^T) h)

    It costs one forward and two backward passes for all samples of a chunk; H is not formed.
    Unlike FI, it changes when x is rescaled.

    Args:
        model, x, y, objective, outputs, memory_budget, dtype: as in :func:`fastfi.influence`. The
            model and the objective must be differentiable twice; of autograd functions of your
            own, ``torch.autograd.gradgradcheck`` tells. Attention runs in torch's plain kernels,
            since its fused ones are not.
        direction: h, like x, or like one sample, x.shape[1:], for all samples; not zero. Its length
            does not matter.

    Returns:
        [B] on x's device, not negative.

    Raises:
        InputError: also for the direction. OutputError: also for a model that autograd cannot
            differentiate twice. And the other exceptions of :func:`fastfi.influence`.

    Example:
        >>> h = fastfi.direction(model, x, y)
        >>> fastfi.baselines.cook_influence(model, x, y, h).shape
        torch.Size([4])
    """
    check_dtype(dtype)
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, memory_budget=memory_budget
    )
    h = _check_direction(direction, x)  # [B or 1, p]
    plan = q.plan(variant=("curvature", 0))
    measure(q, plan, True, 4 * x[0].numel() * 8)

    def run(part: slice) -> _Value:
        curvature = Curvature(q, part)
        mine = (h[part] if len(h) > 1 else h).expand(len(q.x[part]), -1)  # [b, p]
        scale, g = curvature.slope.scale, curvature.slope.flat()
        rise = 1 + (scale * (g * mine).sum(1)).square()  # h^T (I + g g^T) h
        stretch = (1 + (scale * torch.linalg.vector_norm(g, dim=1)).square()).sqrt()
        bend = scale * (mine * curvature.product(mine)).sum(1).abs()
        return _Value(bend / stretch / rise, curvature.slope.dtype)

    found = run_chunks(q, plan, run)
    return finish(found.influence, dtype, found.dtype)


class _Metric:
    """M = I + g g^T of each sample, with g = scale * slope.

    M^-1/2 = I + e u u^T with u = g / |g| and e = (1 + g.g)^-1/2 - 1, by expm1 for small g.
    """

    def __init__(self, slope: Tensor, scale: Tensor) -> None:
        length = torch.linalg.vector_norm(slope, dim=1)  # [b]
        self._u = slope / torch.where(length > 0, length, 1.0)[:, None]  # [b, p]
        self._half_log = 0.5 * torch.log1p((scale * length).square())

    def stretch(self) -> Tensor:
        """sqrt(1 + g.g), [b]."""
        return self._half_log.exp()

    def root(self, v: Tensor, samples: Tensor) -> Tensor:
        """M^-1/2 v of some samples, [b', p]."""
        u, e = self._u[samples], torch.expm1(-self._half_log[samples])
        return v + (e * (u * v).sum(1))[:, None] * u


class _Normalised:
    """A = M^-1/2 H M^-1/2, in the curvature's units."""

    def __init__(self, curvature: Curvature, metric: _Metric, samples: Tensor) -> None:
        self._curvature, self._metric, self._samples = curvature, metric, samples

    def __call__(self, v: Tensor) -> Tensor:
        h = self._metric.root(v, self._samples)
        return self._metric.root(self._curvature.product(h), self._samples)

    def keep(self, samples: Tensor) -> None:
        self._curvature.keep(samples)
        self._samples = self._samples[samples]


def _check_limits(tol: Any, max_iterations: Any) -> tuple[float, int]:
    real = isinstance(tol, numbers.Real) and not isinstance(tol, bool)
    if not real or not 0 < float(tol) < 1:
        raise OptionError(f"tol: expected a number between 0 and 1, got {tol!r}")
    whole = isinstance(max_iterations, numbers.Integral) and not isinstance(max_iterations, bool)
    if not whole or max_iterations < 1:
        raise OptionError(
            f"max_iterations: expected a whole number of at least 1, got {max_iterations!r}"
        )
    return float(tol), int(max_iterations)


def _start(x: Tensor) -> Tensor:
    """The same pseudo-random unit vector [p] for samples of one size, whatever the batch."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x[0].numel(), generator=generator, dtype=torch.float64)
    return (start / torch.linalg.vector_norm(start)).to(x.device)


@torch.no_grad()
def max_cook_influence(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    tol: float = 1e-6,
    max_iterations: int = 64,
    full_output: bool = False,
    objective: str | Objective = "cross_entropy",
    outputs: str = "logits",
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | CookInfluence:
    """The largest Cook's local influence over all directions, see :func:`cook_influence`.

    It is ``max |eigenvalue of A| / sqrt(1 + g.g)`` with ``A = M^-1/2 H M^-1/2``,
    ``M = I + g g^T``, g and H the gradient and the Hessian of the objective in x. A is never
    formed: each iteration of Lanczos' method, with full reorthogonalisation, costs one product with
    H, a double backward pass for all samples of the chunk. (LOBPCG finds one end of the spectrum of
    one matrix; Lanczos finds both, for all samples at once.) Every sample starts from the same
    pseudo-random vector, so its score does not depend on the batch.

    For a network that is piecewise linear in x (ReLU, max pooling, BatchNorm in evaluation mode)
    and cross-entropy, H is the Fisher metric G of :func:`fastfi.influence`, of rank K - 1 at most,
    and K iterations suffice for K classes.

    An eigenvalue to which the starting vector is almost orthogonal can be missed: of random
    matrices, one in a thousand with tol=1e-4 and one in several thousand with tol=1e-6. In float32,
    H is known to about 1e-7 of its norm, and M shrinks what lies along g by 1 + g.g: pass a float64
    model where gradients are as steep as 100. Where a sample is misclassified with 1 - P of its top
    class below the machine epsilon, H itself has lost its digits, and convergence does not show it.

    Args:
        model, x, y, objective, outputs, dtype: as in :func:`cook_influence`.
        tol: a sample stops once ``|A u - theta u| <= tol |theta|`` and no other approximate
            eigenvalue can exceed theta by its own residual; 0 < tol < 1, and at least the machine
            epsilon of the model's gradients is used.
        max_iterations: at least 1.
        full_output: return :class:`CookInfluence` instead of the influence alone.
        memory_budget: bytes for the activations of a forward and a backward pass, and for
            ``min(max_iterations, p) + 6`` float64 vectors of each sample's size p; None means half
            of what is free.

    Returns:
        [B] on x's device, not negative; or :class:`CookInfluence`.

    Raises:
        OptionError: tol, max_iterations. OutputError: also for a model that autograd cannot
            differentiate twice. And the other exceptions of :func:`fastfi.influence`.

    Warns:
        RuntimeWarning: some samples did not converge, and ``full_output`` is False.

    Example:
        >>> fastfi.baselines.max_cook_influence(model, x, y).shape
        torch.Size([4])
    """
    check_dtype(dtype)
    tol, max_iterations = _check_limits(tol, max_iterations)
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, memory_budget=memory_budget
    )
    start = _start(x)
    vectors = min(max_iterations, len(start)) + 6
    plan = q.plan(variant=("curvature", vectors))
    measure(q, plan, True, vectors * len(start) * 8)

    def run(part: slice) -> _Found:
        curvature = Curvature(q, part)
        slope = curvature.slope
        metric = _Metric(slope.flat(), slope.scale)
        samples = torch.arange(len(slope.scale), device=x.device)
        operator = _Normalised(curvature, metric, samples)
        limit = max(tol, slope.eps)
        pair = extreme_eigenpairs(operator, start, len(samples), limit, max_iterations)
        h = metric.root(pair.vector, samples)
        h = h / torch.linalg.vector_norm(h, dim=1, keepdim=True)
        return _Found(
            slope.scale * pair.value.abs() / metric.stretch(),
            h.to(x.dtype).reshape(-1, *x.shape[1:]),
            pair.iterations,
            pair.residual,
            pair.converged,
            slope.dtype,
        )

    found = run_chunks(q, plan, run)
    influence = finish(found.influence, dtype, found.dtype)
    if full_output:
        rest = found.iterations, found.residual, found.converged
        return CookInfluence(influence, found.direction, *rest)
    lost = int((~found.converged).sum())
    if lost > 0:
        warnings.warn(
            f"{lost} of {len(x)} samples did not converge to tol={tol} in {max_iterations} "
            "iterations; their values are lower bounds (full_output=True tells which they are)",
            RuntimeWarning,
            stacklevel=2,
        )
    return influence
