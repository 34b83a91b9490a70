"""Objectives f(logits, y): what FI measures the influence on.

An objective enters FI through its gradient with respect to the logits, ``g = df/dz``. Everything is
computed in float64 from log-probabilities, so that nothing is lost on confident samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastfi.errors import NonFiniteError, OptionError

__all__ = ["OBJECTIVES", "Objective", "as_objective", "logit_gradient"]

Objective = Callable[[Tensor, Tensor], Tensor]
"""A callable ``f(logits [B, K], y [B]) -> [B]``, differentiable in the logits."""


def _entropy(log_prob: Tensor, y: Tensor) -> Tensor:
    """f = -sum_k P_k log P_k."""
    entropy = -(log_prob.exp() * log_prob).sum(1, keepdim=True)
    return -log_prob.exp() * (log_prob + entropy)


def _logit(log_prob: Tensor, y: Tensor) -> Tensor:
    """f = z_y."""
    return torch.zeros_like(log_prob).scatter(1, y[:, None], 1.0)


def _margin(log_prob: Tensor, y: Tensor) -> Tensor:
    """f = z_y - max over k != y of z_k."""
    others = log_prob.scatter(1, y[:, None], -torch.inf)
    return _logit(log_prob, y).scatter(1, others.argmax(1, keepdim=True), -1.0)


def _nll_of_others(log_prob: Tensor, y: Tensor) -> Tensor:
    """f = -log(1 - P_y), the negative log-likelihood that the class is another one."""
    own = log_prob.gather(1, y[:, None]).exp()
    share = log_prob.scatter(1, y[:, None], -torch.inf).softmax(1)  # P_k / (1 - P_y), 0 for y
    return (-own * share).scatter(1, y[:, None], own)


# Gradients with respect to the logits [B, K], from log-probabilities [B, K] float64 and y [B].
# Cross-entropy has none: the solves treat it by the label, without cancellation.
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "cross_entropy": None,
    "logit": _logit,
    "margin": _margin,
    "entropy": _entropy,
    "nll_of_others": _nll_of_others,
}


def as_objective(objective: str | Objective) -> str | Objective:
    """The objective, if it is a known name or a callable; OptionError otherwise."""
    if callable(objective) or (isinstance(objective, str) and objective in OBJECTIVES):
        return objective
    raise OptionError(
        f"objective: expected one of {', '.join(map(repr, OBJECTIVES))} or a callable "
        f"f(logits, y) -> [B], got {objective!r}"
    )


def logit_gradient(
    objective: str | Objective, logits: Tensor, log_prob: Tensor, y: Tensor
) -> Tensor | None:
    """df/dz [B, K] float64, or None for cross-entropy.

    Args:
        logits, log_prob: [B, K] float64, without gradient.
        y: [B] int64.

    Raises:
        OptionError: a callable returned something else than one finite, differentiable value per
            sample.
    """
    if isinstance(objective, str):
        rule = OBJECTIVES[objective]
        return None if rule is None else rule(log_prob, y)
    name = getattr(objective, "__name__", type(objective).__name__)
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        value = objective(z, y)
        if not isinstance(value, Tensor) or value.shape != y.shape:
            came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptionError(
                f"objective {name}: expected one value per sample, [{y.shape[0]}], got {came}"
            )
        if not value.requires_grad:
            raise OptionError(
                f"objective {name}: expected a differentiable function of the logits, got a value "
                "without a gradient"
            )
        (grad,) = torch.autograd.grad(value.sum(), z)
    if not bool(grad.isfinite().all()):
        bad = (~grad.isfinite()).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"objective {name}: expected finite gradients, got others in samples {{samples}}", bad
        )
    return grad
