"""The eigenvalue of largest magnitude of many symmetric operators at once, by Lanczos' method.

Lanczos finds both ends of a spectrum, in one batch; LOBPCG (torch.lobpcg) finds one end of one
explicit matrix.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Extreme", "Operator", "extreme_eigenpairs"]


class Operator(Protocol):
    """Symmetric operators on R^p, one for each of b samples."""

    def __call__(self, v: Tensor) -> Tensor:
        """The products with v [b, p], float64."""

    def keep(self, samples: Tensor) -> None:
        """Goes on with the operators at positions [b'] among the present ones."""


class Extreme(NamedTuple):
    """Eigenpairs of B operators.

    Attributes:
        value: [B] float64, with its sign.
        vector: [B, p] float64, unit norm.
        iterations: [B] int64, products taken.
        residual: [B] float64, |A v - value v| / |value|; 0 where A v = 0.
        converged: [B] bool.
    """

    value: Tensor
    vector: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor


class _Ritz(NamedTuple):
    """The approximate eigenpair of largest magnitude after n steps.

    Attributes:
        value: [b].
        weights: [b, n], of the basis in the eigenvector.
        error: [b], the length of its residual.
        reach: [b], the largest |value| + error of all n pairs: how far an eigenvalue near one of
            them may be from 0.
    """

    value: Tensor
    weights: Tensor
    error: Tensor
    reach: Tensor


def _ritz(diagonal: Tensor, off: Tensor, beta: Tensor) -> _Ritz:
    """Of tridiagonal matrices with the diagonals [b, n] and [b, n - 1]; beta [b] is the length of
    what the last product has outside the basis."""
    t = torch.diag_embed(diagonal) + torch.diag_embed(off, -1)  # eigh reads the lower triangle
    values, vectors = torch.linalg.eigh(t)
    errors = beta[:, None] * vectors[:, -1].abs()  # [b, n]
    best = values.abs().argmax(1, keepdim=True)
    weights = vectors.gather(2, best[:, None].expand(-1, t.shape[1], 1)).squeeze(2)
    value, error = values.gather(1, best).squeeze(1), errors.gather(1, best).squeeze(1)
    return _Ritz(value, weights, error, (values.abs() + errors).amax(1))


def extreme_eigenpairs(
    operator: Operator, start: Tensor, batch: int, tol: float, max_iterations: int
) -> Extreme:
    """Eigenpairs of largest magnitude, each to a relative residual of ``tol``.

    A sample stops once none of its approximate eigenvalues, the other end's for instance, may grow
    by its residual beyond 1 + tol times the largest: an own small residual tells that there is an
    eigenvalue near, not that it is the largest.

    Every new vector is made orthogonal to all before it, twice, so that rounding brings no copies
    of eigenvalues. Where the space becomes invariant, the residual is 0 and the sample stops.
    Samples that stopped are dropped once they are half of what is left.

    Args:
        operator: of ``batch`` samples.
        start: [p] float64, unit norm, for all samples alike.
        max_iterations: at least 1; p suffice.
    """
    steps = min(max_iterations, len(start))
    basis = start.new_empty(batch, steps, len(start))  # [b, m, p]
    basis[:, 0] = start
    diagonal, off = start.new_zeros(batch, steps), start.new_zeros(batch, steps)
    active = torch.arange(batch, device=start.device)  # positions of the operators left
    stopped = torch.zeros_like(active, dtype=torch.bool)
    found = Extreme(
        start.new_zeros(batch),
        start.new_zeros(batch, len(start)),
        torch.zeros_like(active),
        start.new_zeros(batch),
        torch.zeros_like(stopped),
    )
    for m in range(1, steps + 1):
        known = basis[:, :m]  # [b, m, p]
        w = operator(known[:, -1])  # [b, p]
        for again in (False, True):
            along = torch.einsum("bmp,bp->bm", known, w)
            if not again:
                diagonal[:, m - 1] = along[:, -1]
            w = w - torch.einsum("bmp,bm->bp", known, along)
        beta = torch.linalg.vector_norm(w, dim=1)  # [b]
        ritz = _ritz(diagonal[:, :m], off[:, : m - 1], beta)
        size = ritz.value.abs()
        converged = ritz.reach <= (1 + tol) * size
        new = ~stopped & (converged | (m == steps))
        if bool(new.any()):
            at = active[new]
            found.value[at] = ritz.value[new]
            found.vector[at] = torch.einsum("bmp,bm->bp", known[new], ritz.weights[new])
            found.iterations[at] = m
            found.residual[at] = torch.where(ritz.error > 0, ritz.error / size, 0.0)[new]
            found.converged[at] = converged[new]
            stopped = stopped | new
        left = (~stopped).nonzero().flatten()
        if len(left) == 0:
            break
        off[:, m - 1] = beta
        basis[:, m] = w / torch.where(beta > 0, beta, 1.0)[:, None]
        if 2 * len(left) <= len(stopped):
            operator.keep(left)
            basis, diagonal, off = basis[left], diagonal[left], off[left]
            active, stopped = active[left], stopped[left]
    return found
