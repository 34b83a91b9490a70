"""``direction``: the perturbation whose influence FI measures.

FI is the largest value of ``(h . w)^2 / (w^T G w)`` over directions w, and ``w = G^+ h`` attains
it. Every rule's inverse maps h into the span of the rows, so the direction is a combination of
them; the coefficients come from the same float64 coordinates as FI itself, in plain torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_mask
from fastfi.backends.reference import (
    DampedCoordinates,
    ExactCoordinates,
    Problem,
    TruncatedCoordinates,
)
from fastfi.inverse import Damped, Exact, Inverse, Truncated, as_inverse, damping
from fastfi.objectives import Objective
from fastfi.rows import InputRows, gram_of
from fastfi.sweep import Request, sweep

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


def _coefficients(data: InputRows, gram: Tensor, inverse: Inverse, tau: Tensor | None) -> Tensor:
    """Weights [B, n] of the rows in the direction."""
    q = Problem(gram, data.classes.log_prob, data.label, data.grad)
    if isinstance(inverse, Exact):
        return _exact(q, data.rtol if inverse.rtol is None else inverse.rtol)
    if isinstance(inverse, Truncated):
        return _truncated(q, inverse.eps)
    assert tau is not None
    return _damped(q, tau)


class _Part(NamedTuple):
    v: Tensor


def direction(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    region: Tensor | None = None,
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
        region: a boolean mask of the pixels that may change, in all channels: x.shape[2:] (for flat
            inputs [p]) for all samples alike, or one for each, [B, ...]. None means all. Damped
            takes tau from the whole input all the same, as :func:`region_influence` does.

    Returns:
        v, like x, with Euclidean norm 1 for each sample; 0 where FI is 0, and outside the region.

    Raises:
        InputError: also for a region that is empty or has another shape; and the exceptions of
            :func:`influence`.
    """
    rule = as_inverse(inverse)
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, memory_budget=memory_budget
    )
    mask = None if region is None else check_mask(region, x)  # [B or 1, P]

    def work(data: InputRows, at: Tensor) -> _Part:
        gram = gram_of(data)
        tau = damping(rule, gram, data.classes.log_prob) if isinstance(rule, Damped) else None
        if mask is not None:
            mine = mask[at] if len(mask) > 1 else mask
            rows = data.rows.unflatten(2, (-1, mask.shape[1])) * mine[:, None, None]
            data = replace(data, rows=rows.flatten(2))
            gram = gram_of(data)
        w = _coefficients(data, gram, rule, tau)  # [B, n]
        v = torch.einsum("bn,bnp->bp", w, data.rows.double())
        # Scaled first: a norm may underflow or overflow where its direction does not.
        v = v / v.abs().amax(1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        v = v / torch.where(length > 0, length, 1.0)
        return _Part(v.to(x.dtype).reshape(-1, *x.shape[1:]))

    # Rows in float64 and, within a region, a copy of them.
    return sweep(q, work, row_copies=2 if mask is None else 3).v
