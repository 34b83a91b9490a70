"""``direction``: the perturbation whose influence FI measures.

FI is the largest value of ``(h . w)^2 / (w^T G w)`` over directions w, and ``w = G^+ h`` attains
it. Every rule's inverse maps h into the span of the rows, so the direction is a combination of
them; the coefficients come from the same float64 coordinates as FI itself, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfi._checks import check_input, check_labels, check_model
from fastfi.backends.reference import (
    DampedCoordinates,
    ExactCoordinates,
    Problem,
    TruncatedCoordinates,
)
from fastfi.inverse import Exact, Inverse, Truncated, as_inverse, metric_trace
from fastfi.memory import ChunkPlan, check_budget, chunks
from fastfi.model import check_outputs
from fastfi.objectives import Objective, as_objective
from fastfi.rows import InputRows, gram_of, input_rows, measure

__all__ = ["direction"]


def _exact(q: Problem, rtol: float) -> Tensor:
    """Coefficients [B, n]: N_pp^-1 of the solution of G x = h in pivot-row coordinates."""
    c = ExactCoordinates(q, rtol)
    w = c.d + c.v * (c.dv / c.rest)[:, None]
    w = torch.linalg.solve_triangular(c.factor.mT, w[:, :, None], upper=True).squeeze(2)
    w = w * c.inv_pivot
    # Only the direction counts: keep what follows clear of overflow.
    w = w / w.abs().amax(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    valid = c.pivots.valid
    at = c.pivots.index[:, None].expand(-1, valid.shape[1], -1)
    triangle = c.pivots.factor.gather(2, at).triu()  # T^T, N_pp = T T^T
    used = valid[:, :, None] & valid[:, None, :]
    triangle = torch.where(
        used, triangle, torch.eye(valid.shape[1], dtype=triangle.dtype, device=triangle.device)
    )
    w = torch.linalg.solve_triangular(triangle.mT, w[:, :, None], upper=False)
    w = torch.linalg.solve_triangular(triangle, w, upper=True).squeeze(2)
    coefficients = w.new_zeros(w.shape[0], q.gram.shape[1])
    return coefficients.scatter_add_(1, c.pivots.index, w * valid)


def _truncated(q: Problem, eps: float) -> Tensor:
    """Coefficients of sum u_i (u_i . h) / s_i^2 over the singular vectors kept."""
    c = TruncatedCoordinates(q, eps)
    a = c.u @ (c.along / c.s.square())[:, :, None]  # [M, R, 1], in the orthonormal basis
    r = q.contrasts
    w = torch.linalg.pinv(c.factor[:, :, :r], rtol=1e-9) @ a
    return torch.nn.functional.pad(w.squeeze(2), (0, q.gram.shape[1] - r))


def _damped(q: Problem, tau: Tensor) -> Tensor:
    """Coefficients of (G + tau I)^-1 h."""
    c = DampedCoordinates(q, tau)
    right = c.mu if c.u is None else c.u
    w = c.weights @ torch.cholesky_solve(right[:, :, None], c.factor)
    w = w.squeeze(2) * c.positive[:, None]
    if c.u is not None:
        return w
    return torch.cat([-w, c.positive[:, None].to(w)], 1)  # (h - G-part) / tau, times tau


def _coefficients(data: InputRows, gram: Tensor, inverse: Inverse) -> Tensor:
    """Weights [B, n] of the rows in the direction."""
    log_prob = data.classes.log_prob
    q = Problem(gram, log_prob, data.label, data.grad)
    if isinstance(inverse, Exact):
        return _exact(q, data.rtol if inverse.rtol is None else inverse.rtol)
    if isinstance(inverse, Truncated):
        return _truncated(q, inverse.eps)
    r = q.contrasts
    return _damped(q, inverse.alpha * metric_trace(gram[:, :r, :r], log_prob))


def direction(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    objective: str | Objective = "cross_entropy",
    inverse: Inverse | str = "exact",
    outputs: str = "logits",
    memory_budget: int | None = None,
) -> Tensor:
    """The most influential perturbation of each sample: ``G^+ h`` scaled to unit length.

    Along it the objective rises (``h . v >= 0``), and no direction changes it more for the same
    distance in the metric G. With another inverse than Exact, G is what that rule makes of it.

    Args:
        model, x, y, objective, inverse, outputs, memory_budget: as in :func:`influence`.

    Returns:
        v, like x, with Euclidean norm 1 for each sample; 0 where FI is 0.

    Raises:
        The exceptions of :func:`influence`.
    """
    rule = as_inverse(inverse)
    objective = as_objective(objective)
    check_outputs(outputs)
    check_budget(memory_budget)
    check_model(model)
    check_input(x)
    y = None if y is None else check_labels(y, x.shape[0], x.device)
    plan = ChunkPlan(memory_budget, x, None, model, (outputs, None))

    def run(part: slice) -> Tensor:
        data = input_rows(model, x, part, y, outputs=outputs, objective=objective)
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            gram = gram_of(data)
            w = _coefficients(data, gram, rule)  # [B, n]
            v = torch.einsum("bn,bnp->bp", w, data.rows.double())
            # Scaled first: a norm may underflow or overflow where its direction does not.
            v = v / v.abs().amax(1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
            length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
            v = v / torch.where(length > 0, length, 1.0)
            return v.to(x.dtype).reshape(x[part].shape)

    measure(model, x, plan, outputs)
    return torch.cat(list(chunks(x.shape[0], plan, run)))
