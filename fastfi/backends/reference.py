"""Each operator in plain torch, on any device: the definition that every kernel is tested against.

Notation (B samples, K classes, R = K - 1 contrasts against class 0, all K x K work in float64):
``N = D D^T`` is the Gram matrix of the contrast rows, ``P = exp(log_prob)``, and the metric tensor
is ``G = D^T S D`` with ``S = diag(P') - P' P'^T``, ``P'`` being P without the reference class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfi._ops import check_gram, check_solve

__all__ = [
    "LOG_PROB_FLOOR",
    "DampedCoordinates",
    "ExactCoordinates",
    "Pivots",
    "Problem",
    "TruncatedCoordinates",
    "gram",
    "pivot_combinations",
    "pivot_cut",
    "pivoted_cholesky",
    "rank_tolerance",
    "solve_damped",
    "solve_exact",
    "solve_truncated",
    "weighted_pivots",
]

# Below exp(-1200) a probability is replaced by exp(-1200), so that 1 / sqrt(P) stays finite. 1 / P
# overflows float64 at exp(709) already, and to every other class the change is below 1e-200.
LOG_PROB_FLOOR = -1200.0

_EPS = torch.finfo(torch.float64).eps


def gram(rows: Tensor) -> Tensor:
    """Gram matrix of each sample's rows: [B, R, p] -> [B, R, R] float64.

    Products of float32 numbers are exact in float64, and the sum is accumulated in float64.
    """
    check_gram(rows)
    rows = rows.double()
    return rows @ rows.mT


def rank_tolerance(rtol: float, classes: int) -> float:
    """The relative residual (a square) under which a contrast row counts as dependent.

    The Gram matrix is held in float64, so residuals below ``8 K eps`` are rounding noise, whatever
    ``rtol`` says.
    """
    return max(rtol * rtol, 8.0 * classes * _EPS)


def pivot_cut(residuals: Tensor, rtol: float) -> Tensor:
    """Squared residual [M] that a dependent row may keep in its coordinates: the rows' own relative
    error, or the Gram matrix's rounding magnified by the smallest pivot.

    Args:
        residuals: of the pivots [M, R], largest first, 0 past the rank.
    """
    largest = residuals[:, :1].sum(1)
    smallest = torch.where(residuals > 0, residuals, torch.inf).amin(1)
    noise = (64.0 * (residuals.shape[1] + 1) * _EPS) ** 2
    return largest * (noise * largest / smallest).clamp(min=rtol * rtol)


class Problem:
    """A solve's arguments flattened to one problem per row; blocks repeat their sample's P."""

    def __init__(
        self, gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None
    ) -> None:
        self.shape = gram.shape[:-2]
        classes = log_prob.shape[1]
        blocks = self.shape[1:].numel()
        n = gram.shape[-1]
        self.contrasts = classes - 1
        self.gram = gram.reshape(-1, n, n)  # [M, n, n]
        lp = log_prob.repeat_interleave(blocks, 0)  # [M, K]
        self.present = lp > -torch.inf  # [M, K]; False for padding
        self.lp = lp.clamp(min=LOG_PROB_FLOOR)
        zero = lp.new_zeros(())
        self.sqrt_p = torch.where(self.present, (0.5 * self.lp).exp(), zero)  # [M, K]
        self.inv_sqrt_p = torch.where(self.present, (-0.5 * self.lp).exp(), zero)
        self.label = None if label is None else label.repeat_interleave(blocks, 0)  # [M]
        self.grad = None if grad is None else grad.repeat_interleave(blocks, 0)  # [M, K]

    def column_of_label(self, columns: Tensor) -> Tensor:
        """Entry of the label's contrast row in each of [M, i, n] columns, 0 for class 0: [M, i]."""
        assert self.label is not None
        at = (self.label - 1).clamp(min=0)[:, None, None].expand(-1, columns.shape[1], 1)
        return columns.gather(2, at).squeeze(2) * (self.label > 0)[:, None]

    def of_label(self, values: Tensor) -> Tensor:
        """values [M, K] at the label: [M]."""
        assert self.label is not None
        return values.gather(1, self.label[:, None]).squeeze(1)


def pivoted_cholesky(gram: Tensor, contrasts: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Coordinates of the rows in an orthonormal basis of the contrasts' span.

    The pivot is the row with the largest residual; rows whose residual does not exceed
    ``tolerance * max diag N`` are dependent. Rows beyond ``contrasts`` are carried along.

    Args:
        gram: N [M, n, n] float64.

    Returns:
        factor [M, R, n], ``N = factor^T factor`` on the first R rows, its row s zero for s >= rank;
        and the pivots' residuals [M, R], 0 for s >= rank.
    """
    m, n = gram.shape[:2]
    r = contrasts
    residual = gram.diagonal(dim1=1, dim2=2)[:, :r].clone()  # [M, R]
    cut = tolerance * residual.max(1).values
    factor = gram.new_zeros(m, r, n)
    pivots = gram.new_zeros(m, r)
    index = torch.arange(m, device=gram.device)
    for step in range(r):
        best, b = residual.max(1)  # [M]
        ok = best > cut
        column = gram[index, b] - torch.einsum(
            "mjk,mj->mk", factor[:, :step], factor[index, :step, b]
        )  # [M, n]
        column = column * torch.where(ok, best, 1.0).rsqrt()[:, None] * ok[:, None]
        # In earlier pivots' rows the entry is rounding noise where a zero belongs.
        column[:, :r] *= residual >= 0
        factor[:, step] = column
        pivots[:, step] = best * ok
        left = (residual - column[:, :r].square()).clamp(min=0)
        residual = torch.where(residual >= 0, left, residual)
        residual[index, b] = torch.where(ok, -1.0, residual[index, b])
    return factor, pivots


class Pivots:
    """Pivot rows chosen among the contrasts; see :func:`weighted_pivots`."""

    def __init__(self, factor: Tensor, index: Tensor, valid: Tensor) -> None:
        self.factor = factor  # [M, R, n]: coordinates of all rows along each pivot direction
        self.index = index  # [M, R]; 0 where not valid
        self.valid = valid  # [M, R]
        self.rank = valid.sum(1)  # [M]


def weighted_pivots(coordinates: Tensor, log_weight: Tensor, cut: Tensor) -> Pivots:
    """A basis among the rows, by weight times residual: orthogonalisation of coordinate vectors.

    On the Gram matrix, a pivot chosen for its weight may amplify rounding (1e-16 of the squared
    length) until a dependent row looks independent; on vectors rounding is 1e-16 of the length.

    Args:
        coordinates: [M, R, n], from :func:`pivoted_cholesky`.
        log_weight: [M, R], -inf excludes a row.
        cut: [M], the squared residual up to which a row counts as dependent.
    """
    m, r, n = coordinates.shape
    left = coordinates.clone()
    free = log_weight > -torch.inf
    basis = coordinates.new_zeros(m, r, r)
    factor = torch.zeros_like(coordinates)
    pivot = torch.zeros(m, r, dtype=torch.int64, device=left.device)
    valid = torch.zeros(m, r, dtype=torch.bool, device=left.device)
    index = torch.arange(m, device=left.device)
    for step in range(r):
        residual = left[:, :, :r].square().sum(1)  # [M, R]
        usable = free & (residual > cut[:, None])
        # A dependent row holds zeros along all later directions. What rounding left there would,
        # squared and divided by the probability of an unlikely pivot, outweigh FI itself.
        left[:, :, :r] *= (usable | ~free)[:, None]
        best, b = torch.where(usable, log_weight + residual.log(), -torch.inf).max(1)
        ok = best > -torch.inf
        q = left[index, :, b]  # [M, R]
        # The direction of a small residual has lost digits: orthogonalise it a second time.
        q = q - torch.einsum("mji,mj->mi", basis, torch.einsum("mji,mi->mj", basis, q))
        length = torch.linalg.vector_norm(q, dim=1)
        q = q * torch.where(ok, 1.0 / torch.where(ok, length, 1.0), 0.0)[:, None]
        column = torch.einsum("mi,mik->mk", q, left)
        left = left - q[:, :, None] * column[:, None]
        taken = torch.zeros(m, n, dtype=torch.bool, device=left.device)
        taken[:, :r] = (log_weight > -torch.inf) & ~free
        column[index, b] = torch.where(ok, length, column[index, b])
        factor[:, step] = torch.where(taken, 0.0, column)
        basis[:, step] = q
        pivot[:, step] = torch.where(ok, b, 0)
        valid[:, step] = ok
        free[index, b] &= ~ok
    return Pivots(factor, pivot, valid)


def pivot_combinations(chol: Pivots) -> Tensor:
    """``X`` [M, R, n] with row k of the contrasts equal to ``sum_i X_ik`` times pivot row i; the
    identity on the pivot rows, zero for i beyond the rank."""
    r = chol.factor.shape[1]
    at = chol.index[:, None, :].expand(-1, r, -1)
    triangle = chol.factor.gather(2, at).triu()  # T^T: entry (i, j) is L_i at pivot j, j >= i
    used = chol.valid[:, :, None] & chol.valid[:, None, :]
    triangle = torch.where(
        used, triangle, torch.eye(r, dtype=triangle.dtype, device=triangle.device)
    )
    return torch.linalg.solve_triangular(triangle, chol.factor, upper=True)


class ExactCoordinates:
    """The metric and the objective's gradient in coordinates of the scaled pivot rows.

    G there is C (I - v v^T) C^T and h is C d.
    """

    def __init__(self, q: Problem, rtol: float) -> None:
        r = q.contrasts
        coordinates, residuals = pivoted_cholesky(q.gram, r, rank_tolerance(rtol, r + 1))
        self.dimension = (residuals > 0).sum(1)
        log_weight = torch.where(q.present[:, 1:], q.lp[:, 1:], -torch.inf)
        self.pivots = weighted_pivots(coordinates, log_weight, pivot_cut(residuals, rtol))
        valid = self.pivots.valid
        x = pivot_combinations(self.pivots)  # [M, R, n]
        # [M, R]: 1 / sqrt(P_b)
        self.inv_pivot = q.inv_sqrt_p[:, 1:].gather(1, self.pivots.index) * valid
        # Pivots were chosen by probability, so Z = X sqrt(P_k / P_b) has moderate entries beside
        # the identity, and Z^T Z is well conditioned however graded P is.
        z = x[:, :, :r] * q.sqrt_p[:, None, 1:] * self.inv_pivot[:, :, None]  # [M, R(i), R(k)]
        mean = z @ q.sqrt_p[:, 1:, None]  # [M, R, 1]
        if q.label is not None:
            target = mean - (q.column_of_label(x) * self.inv_pivot)[:, :, None]
        elif q.grad is not None:
            target = (x @ q.grad[:, 1:, None]) * self.inv_pivot[:, :, None]
        else:
            target = (x[:, :, -1] * self.inv_pivot)[:, :, None]
        self.factor = torch.linalg.cholesky(z @ z.mT + torch.diag_embed((~valid).double()))
        w = torch.linalg.solve_triangular(self.factor, torch.cat([mean, target], 2), upper=False)
        self.v, self.d = w[:, :, 0], w[:, :, 1]
        self.dv = (self.d * self.v).sum(1)
        self.rest = 1.0 - self.v.square().sum(1)


def solve_exact(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, rtol: float
) -> tuple[Tensor, Tensor]:
    """``h^T G^+ h`` and the rank of the contrast rows.

    At full rank FI = sum_k g_k^2 / P_k. Below it, the procedure is accurate for any grading of P:
    see the comments. Shapes and the three forms of the objective are those of
    :mod:`fastfi._ops`.

    Returns:
        fi: [B, *blocks] float64. rank: [B, *blocks] int64.
    """
    check_solve("solve_exact", gram, log_prob, label, grad)
    q = Problem(gram, log_prob, label, grad)
    c = ExactCoordinates(q, rtol)
    # Sherman and Morrison invert I - v v^T. Both terms are squares: nothing cancels.
    fi = c.d.square().sum(1) + c.dv.square() / c.rest
    full = c.dimension >= q.present[:, 1:].sum(1)
    if q.label is not None:
        others = q.sqrt_p.square().scatter(1, q.label[:, None], 0.0).sum(1)
        fi = torch.where(full, others * q.of_label(q.inv_sqrt_p).square(), fi)
    elif q.grad is not None:
        fi = torch.where(full, (q.grad * q.inv_sqrt_p).square().sum(1), fi)
    rank = torch.where(full, c.dimension, c.pivots.rank)
    return fi.reshape(q.shape), rank.reshape(q.shape)


class TruncatedCoordinates:
    """The authors' L0 in an orthonormal basis of the contrasts' span, so that singular values are
    those of an r x K matrix, not square roots of a Gram matrix's."""

    def __init__(self, q: Problem, eps: float) -> None:
        p = q.sqrt_p.square()
        weight = p / (q.sqrt_p + eps)  # [M, K]: dP_k / (sqrt(P_k) + eps) = weight_k dl_k
        r = q.contrasts
        self.factor, _ = pivoted_cholesky(q.gram, r, rank_tolerance(0.0, r + 1))  # [M, R, n]
        basis = torch.cat([torch.zeros_like(self.factor[:, :, :1]), self.factor[:, :, :r]], 2)
        centred = basis - basis @ p[:, :, None]  # [M, R, K]: column k is dl_k
        if q.label is not None:
            at = q.label[:, None, None].expand(-1, r, 1)
            p_y = q.of_label(p)[:, None]
            h = -centred.gather(2, at).squeeze(2) * (p_y / (p_y + eps))
        elif q.grad is not None:
            h = (basis @ q.grad[:, :, None]).squeeze(2)
        else:
            h = self.factor[:, :, -1]  # [M, R]
        self.u, s, _ = torch.linalg.svd(centred * weight[:, None], full_matrices=False)
        self.keep = s > eps
        self.s = torch.where(self.keep, s, 1.0)
        self.along = (self.u.mT @ h[:, :, None]).squeeze(2) * self.keep  # [M, R]: u_i . h


def solve_truncated(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The rule of Shu and Zhu's published scripts, and the number of singular values it keeps.

    ``L0_k = dP_k / (sqrt(P_k) + eps)`` and ``FI = sum_{s_i > eps} (u_i . h)^2 / s_i^2`` over the
    singular values s_i and left singular vectors u_i of L0^T; for cross-entropy
    ``h = -dP_y / (P_y + eps)``.

    Returns:
        fi: [B, *blocks] float64. rank: [B, *blocks] int64.
    """
    check_solve("solve_truncated", gram, log_prob, label, grad)
    q = Problem(gram, log_prob, label, grad)
    c = TruncatedCoordinates(q, eps)
    fi = (c.along / c.s).square().sum(1)
    return fi.reshape(q.shape), c.keep.sum(1).reshape(q.shape)


class DampedCoordinates:
    """``S = W W^T`` with ``W = diag(p) (I - b p p^T)``, ``p = sqrt(P')``, ``b = 1 / (1 + p_0)``;
    ``M = W^T N W``, ``M + tau I = C C^T``, and either ``u = W^-1 g'`` and ``mu = M u``, or, for an
    objective with a row of its own, ``mu = W^T D h``. tau = 0 is replaced by 1."""

    def __init__(self, q: Problem, tau: Tensor) -> None:
        r = q.contrasts
        n = q.gram[:, :r, :r]
        top, p, inv_p = q.sqrt_p[:, :1], q.sqrt_p[:, 1:], q.inv_sqrt_p[:, 1:]
        beta = 1.0 / (1.0 + top)  # [M, 1]
        self.weights = torch.diag_embed(p) - (beta * p.square())[:, :, None] * p[:, None, :]  # W
        m = self.weights.mT @ n @ self.weights
        tau = tau.repeat_interleave(q.shape[1:].numel(), 0)  # [M]
        self.positive = tau > 0
        self.tau = torch.where(self.positive, tau, 1.0)
        self.factor = torch.linalg.cholesky(
            m + self.tau[:, None, None] * torch.eye(r, dtype=m.dtype, device=m.device)
        )
        self.u: Tensor | None = None
        if q.label is not None:
            onehot = torch.nn.functional.one_hot(q.label, r + 1)[:, 1:].double()
            is_top = (q.label == 0)[:, None]
            g = p.square() - onehot
            self.u = torch.where(is_top, p / top, beta * p - onehot * inv_p)
        elif q.grad is not None:
            g = q.grad[:, 1:]
            self.u = g * inv_p + beta / top * p * g.sum(1, keepdim=True)
        cross = q.gram[:, :r, r] if self.u is None else (n @ g[:, :, None]).squeeze(2)
        self.mu = (self.weights.mT @ cross[:, :, None]).squeeze(2)  # [M, R]


def solve_damped(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, tau: Tensor
) -> Tensor:
    """``h^T (G + tau I)^-1 h`` [B, *blocks] float64; 0 where tau is 0 (a metric that vanishes)."""
    check_solve("solve_damped", gram, log_prob, label, grad, tau)
    q = Problem(gram, log_prob, label, grad)
    c = DampedCoordinates(q, tau)
    right = c.mu if c.u is None else c.u
    w = torch.linalg.solve_triangular(c.factor, torch.stack([right, c.mu], 2), upper=False)
    fi = (w[:, :, 0] * w[:, :, 1]).sum(1)
    if c.u is None:
        fi = (q.gram[:, q.contrasts, q.contrasts] - fi) / c.tau
    return torch.where(c.positive, fi.clamp(min=0.0), 0.0).reshape(q.shape)
