"""The influence measure from its definition, in arithmetic that does not lose digits.

Nothing here is shared with the package. A problem is given exactly: the contrasts against class 0
are integers (times a power of two), the log-probabilities are the float64 numbers an op would be
handed, and P is their softmax. The three inverses are then evaluated as they are defined:

    P_k, dl_k = dz_k - sum_j P_j dz_j,    G = sum_k P_k dl_k dl_k^T,    h = sum_k g_k dl_k
    exact      h^T G^+ h
    truncated  the authors' rule: L0_k = dP_k / (sqrt P_k + eps), h = -dP_y / (P_y + eps), and only
               the singular values of L0 above eps
    damped     h^T (G + tau I)^-1 h

The pseudo-inverse needs a rank. Eigenvalues of G cannot tell it (P spreads them over hundreds of
digits), so it is decided where it is a question about integers: fraction-free elimination of the
contrasts. The working precision starts at 80 digits and grows with the condition of the problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, isfinite, log10

import mpmath as mp
import numpy as np

__all__ = [
    "DIGITS",
    "Problem",
    "contrasts",
    "damped",
    "exact",
    "full_rank",
    "log_softmax",
    "rank_of",
    "relations",
    "relative_error",
    "trace",
    "truncated",
]

DIGITS = 80


@dataclass(frozen=True)
class Problem:
    """One sample: contrasts, log-probabilities and an objective.

    Attributes:
        rows: integers D, shape [K-1, p]; dz_{k+1} - dz_0 = D_k * 2**shift.
        log_prob: float64, K of them; P is their softmax. -inf for an absent class.
        label: the objective is -log P_label, unless ``grad`` or ``raw`` is given.
        grad: float64, K of them, g = df/dz with sum 0. Entry 0 is implied by the others.
        raw: integers, shape [p]; h itself is raw * 2**shift.
        shift: the power of two that scales rows and raw.
    """

    rows: np.ndarray
    log_prob: tuple[float, ...]
    label: int | None = None
    grad: tuple[float, ...] | None = None
    raw: np.ndarray | None = None
    shift: int = 0

    @property
    def classes(self) -> int:
        return len(self.log_prob)

    def scaled(self, shift: int) -> Problem:
        """The same problem with every derivative multiplied by 2**shift."""
        return replace(self, shift=self.shift + shift)

    def gram(self) -> np.ndarray:
        """What the ops are given: D D^T as float64, [K-1, K-1], or [K, K] with h as last row."""
        rows = self.rows if self.raw is None else np.vstack([self.rows, self.raw[None]])
        product = rows.astype(object) @ rows.astype(object).T
        out = product.astype(np.float64)
        if any(int(a) != b for a, b in zip(out.ravel(), product.ravel(), strict=True)):
            raise ValueError("the Gram matrix is not exact in float64: choose smaller integers")
        return np.ldexp(out, 2 * self.shift)


def contrasts(jacobian: np.ndarray) -> np.ndarray:
    """Rows J_k - J_0 of an integer Jacobian [K, p]: [K-1, p]."""
    jacobian = jacobian.astype(object)
    return jacobian[1:] - jacobian[:1]


def log_softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """log P of float64 logits, each entry rounded once."""
    with mp.workdps(DIGITS + _spread_digits(logits)):
        z = [mp.mpf(v) for v in logits]
        top = max(z)
        total = mp.log(mp.fsum(mp.exp(v - top) for v in z))
        return tuple(float(v - top - total) for v in z)


def relations(rows: np.ndarray) -> tuple[list[int], np.ndarray, int]:
    """Rank and linear relations of integer rows, by fraction-free Gauss-Jordan elimination.

    Args:
        rows: integers, shape [n, p].

    Returns:
        (basis, numerators [n, r], denominator) with rows[k] * denominator ==
        sum_i numerators[k, i] * rows[basis[i]]; the basis is the first independent rows in order.
    """
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    return _eliminate(rows.tobytes(), rows.shape)


@lru_cache(maxsize=256)
def _eliminate(data: bytes, shape: tuple[int, int]) -> tuple[list[int], np.ndarray, int]:
    rows = np.frombuffer(data, dtype=np.int64).reshape(shape)
    m = rows.T.astype(object).copy()  # [p, n]: a column for each row
    basis: list[int] = []
    last = 1
    for column in range(m.shape[1]):
        step = len(basis)
        candidates = [i for i in range(step, m.shape[0]) if m[i, column] != 0]
        if not candidates:
            continue
        m[[step, candidates[0]]] = m[[candidates[0], step]]
        pivot_row, pivot = m[step].copy(), m[step, column]
        m = (m * pivot - np.outer(m[:, column], pivot_row)) // last  # exact: Bareiss
        m[step] = pivot_row
        last = pivot
        basis.append(column)
    r = len(basis)
    return basis, m[:r].T.copy(), last


def rank_of(rows: np.ndarray) -> int:
    """The exact rank of integer rows."""
    return len(relations(rows)[0])


def exact(problem: Problem) -> tuple[mp.mpf, int]:
    """h^T G^+ h and the rank of G.

    With V [r, p] a basis of the contrasts' row space and D = A V, G = V^T W V where
    W = A^T (diag P - P P^T) A is nonsingular, and h = V^T c + (something orthogonal to V). Then
    G^+ = V^+ W^-1 V^+T and h^T G^+ h = c^T W^-1 c.
    """
    basis, numerators, denominator = relations(problem.rows)
    r = len(basis)
    if r == 0:
        return mp.mpf(0), 0
    largest = max(abs(int(v)) for v in numerators.ravel()) / mp.mpf(abs(denominator))
    with mp.workdps(DIGITS):
        # W >= P_0 min_b P_b I (A holds the identity), W <= K max |a|^2: its condition is known.
        log_p = _log_probabilities(problem)
        weakest = min(log_p[b + 1] for b in basis)
        spread = -(weakest + log_p[0]) / mp.log(10) + 2 * mp.log10(max(largest, mp.mpf(1)))
        digits = DIGITS + 2 * int(mp.ceil(spread)) + 3 * ceil(log10(problem.classes + 1))
    with mp.workdps(digits):
        p = [mp.exp(v) for v in _log_probabilities(problem)][1:]
        a = [[mp.mpf(int(v)) / denominator for v in row] for row in numerators]  # [K-1, r]
        present = [k for k in range(len(p)) if p[k] != 0]
        columns = [[a[k][i] for k in present] for i in range(r)]
        weighted = [[p[k] * a[k][i] for k in present] for i in range(r)]
        mean = [mp.fsum(w) for w in weighted]
        w = [
            [mp.fdot(weighted[i], columns[j]) - mean[i] * mean[j] for j in range(i + 1)]
            for i in range(r)
        ]
        if problem.raw is not None:
            c = _coordinates(problem.rows[basis], problem.raw)
        elif problem.grad is not None:
            g = [mp.mpf(v) for v in problem.grad[1:]]
            c = [mp.fdot([g[k] for k in present], columns[i]) for i in range(r)]
        else:
            y = _label(problem)
            own = [mp.mpf(0)] * r if y == 0 else a[y - 1]
            c = [own[i] - mean[i] for i in range(r)]
        value = _quadratic(w, c)
    return value, r


def full_rank(log_prob: Sequence[float], label: int) -> mp.mpf:
    """F2: (1 - P_y) / P_y."""
    with mp.workdps(DIGITS + _spread_digits(log_prob)):
        own = mp.mpf(log_prob[label])
        others = (v for k, v in enumerate(log_prob) if k != label)
        return mp.fsum(mp.exp(mp.mpf(v) - own) for v in others)


def truncated(problem: Problem, eps: float) -> tuple[mp.mpf, int, float]:
    """The authors' rule.

    Returns:
        (FI, number of singular values kept, gap), where gap is the least |s_i - eps| / eps.
    """
    with mp.workdps(_working_digits(problem)):
        log_p, dl, h = _derivatives(problem)
        p = [mp.exp(v) for v in log_p]
        cut = mp.mpf(eps)
        if problem.raw is None and problem.grad is None:  # h = -dP_y / (P_y + eps)
            y = _label(problem)
            h = [-p[y] * v / (p[y] + cut) for v in dl[y]]
        factor = [
            [pk * v / (mp.sqrt(pk) + cut) for v in row] for pk, row in zip(p, dl, strict=True)
        ]  # L0, [K, p]
        pairs = _singular_pairs(factor, h)
        kept = [(s2, wh) for s2, wh in pairs if s2 > cut**2]
        gap = min((abs(mp.sqrt(max(s2, 0)) - cut) / cut for s2, _ in pairs), default=mp.inf)
        return mp.fsum(wh**2 / s2 for s2, wh in kept), len(kept), float(gap)


def damped(problem: Problem, tau: float) -> mp.mpf:
    """h^T (G + tau I)^-1 h."""
    with mp.workdps(_working_digits(problem, tau)):
        log_p, dl, h = _derivatives(problem)
        root = [mp.exp(v / 2) for v in log_p]
        factor = [[rk * v for v in row] for rk, row in zip(root, dl, strict=True)]  # [K, p]
        small = mp.mpf(tau)
        rows, width = len(factor), len(h)
        if width <= rows:
            columns = [list(c) for c in zip(*factor, strict=True)]
            m = [[mp.fdot(columns[i], columns[j]) for j in range(i + 1)] for i in range(width)]
            for i in range(width):
                m[i][i] += small
            return _quadratic(m, h)
        m = [[mp.fdot(factor[i], factor[j]) for j in range(i + 1)] for i in range(rows)]
        for i in range(rows):
            m[i][i] += small
        projected = [mp.fdot(row, h) for row in factor]
        return (mp.fdot(h, h) - _quadratic(m, projected)) / small


def trace(problem: Problem) -> mp.mpf:
    """trace(G), for choosing a damping on the scale of the metric."""
    with mp.workdps(_working_digits(problem)):
        log_p, dl, _ = _derivatives(problem)
        return mp.fsum(mp.exp(lp) * mp.fdot(row, row) for lp, row in zip(log_p, dl, strict=True))


def relative_error(got: float, want: mp.mpf) -> float:
    """|got - want| / |want|; 0 for two zeros, infinite for a got that is NaN or not finite."""
    if not isfinite(got):
        return float("inf")
    with mp.workdps(DIGITS):
        if want == 0:
            return 0.0 if got == 0 else float("inf")
        return float(abs(mp.mpf(got) - want) / abs(want))


def _spread_digits(logs: Sequence[float]) -> int:
    finite = [v for v in logs if isfinite(v)]
    return ceil((max(finite) - min(finite)) / 2.302585) + 2


def _working_digits(problem: Problem, tau: float | None = None) -> int:
    """Digits for sums over classes: the spread of P twice, and what damping cancels."""
    digits = DIGITS + 2 * _spread_digits(problem.log_prob)
    if tau is not None:
        size = float(np.abs(problem.gram()).max())
        digits += max(0, ceil(log10(max(size, 1e-300)) - log10(tau)))
    return digits


def _label(problem: Problem) -> int:
    if problem.label is None:
        raise ValueError("a problem needs a label, a grad or a raw h")
    return problem.label


def _log_probabilities(problem: Problem) -> list[mp.mpf]:
    logs = [mp.mpf(v) for v in problem.log_prob]
    total = mp.log(mp.fsum(mp.exp(v) for v in logs))
    return [v - total for v in logs]


def _derivatives(problem: Problem) -> tuple[list[mp.mpf], list[list[mp.mpf]], list[mp.mpf]]:
    """log P [K], dl [K, p] and h [p] of a problem."""
    log_p = _log_probabilities(problem)
    p = [mp.exp(v) for v in log_p]
    unit = mp.ldexp(mp.mpf(1), problem.shift)
    width = problem.rows.shape[1]
    dz = [[mp.mpf(0)] * width]
    dz += [[mp.mpf(int(v)) * unit for v in row] for row in problem.rows]
    mean = [mp.fdot(p, column) for column in zip(*dz, strict=True)]
    dl = [[v - m for v, m in zip(row, mean, strict=True)] for row in dz]
    if problem.raw is not None:
        h = [mp.mpf(int(v)) * unit for v in problem.raw]
    elif problem.grad is not None:  # sum g = 0, so h = sum_k g_k dz_k, and dz_0 = 0 here
        g = [mp.mpf(v) for v in problem.grad]
        h = [mp.fdot(g[1:], column[1:]) for column in zip(*dz, strict=True)]
    else:
        h = [-v for v in dl[_label(problem)]]
    return log_p, dl, h


def _coordinates(basis: np.ndarray, h: np.ndarray) -> list[mp.mpf]:
    """c with V^T c the projection of h on the row space of V: V V^T c = V h, solved exactly."""
    v, r = basis.astype(object), len(basis)
    columns = np.concatenate([v @ v.T, (v @ h.astype(object))[:, None]], axis=1)  # [r, r + 1]
    _, numerators, denominator = relations(columns.T)  # the last column in terms of the others
    return [mp.mpf(int(n)) / denominator for n in numerators[r]]


def _singular_pairs(factor: list[list[mp.mpf]], h: list[mp.mpf]) -> list[tuple[mp.mpf, mp.mpf]]:
    """(s_i^2, w_i . h) for the right singular vectors w_i of a factor [K, p], on its short side."""
    rows, width = len(factor), len(h)
    if width <= rows:
        columns = [list(c) for c in zip(*factor, strict=True)]
        values, vectors = mp.eigsy(mp.matrix([[mp.fdot(a, b) for b in columns] for a in columns]))
        projected = h
    else:
        values, vectors = mp.eigsy(mp.matrix([[mp.fdot(a, b) for b in factor] for a in factor]))
        projected = [mp.fdot(row, h) for row in factor]  # w_i . h = v_i . (L0 h) / s_i
    pairs = []
    for i in range(len(values)):
        along = mp.fdot([vectors[j, i] for j in range(len(projected))], projected)
        if width > rows:
            along = along / mp.sqrt(values[i]) if values[i] > 0 else mp.mpf(0)
        pairs.append((values[i], along))
    return pairs


def _quadratic(lower: list[list[mp.mpf]], c: Sequence[mp.mpf]) -> mp.mpf:
    """c^T W^-1 c for a positive definite W given by its lower triangle: Cholesky, one solve."""
    factor: list[list[mp.mpf]] = []
    x: list[mp.mpf] = []
    for i, row in enumerate(lower):
        new: list[mp.mpf] = []
        for j in range(i):
            new.append((row[j] - mp.fdot(new, factor[j][:j])) / factor[j][j])
        left = row[i] - mp.fdot(new, new)
        if left <= 0:
            raise ArithmeticError("the oracle ran out of digits")
        x.append((c[i] - mp.fdot(new, x)) / mp.sqrt(left))
        factor.append([*new, mp.sqrt(left)])
    return mp.fdot(x, x)
