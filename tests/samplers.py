"""Problems of a known rank, grading and objective, exact in float64.

Contrasts are integers of a few bits, so that their Gram matrix is exact and their rank is decided
by integer elimination. Class 0 is the most probable one, as the ops require.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mpmath as mp
import numpy as np
import torch
from oracle import DIGITS, Problem, log_softmax, rank_of, relations
from torch import Tensor

__all__ = [
    "LABELS",
    "RESOLVED",
    "SPREADS",
    "arguments",
    "integer_rows",
    "label_of",
    "log_probabilities",
    "problem",
    "ranks",
    "sensitivity",
    "sweep",
    "zero_sum_gradient",
]

SPREADS = (1.0, 5.0, 15.0, 30.0, 60.0)
LABELS = ("top", "middle", "least")

# The contract for exact influence: 1e-10.
RESOLVED = 1e-10


def integer_rows(
    rng: np.random.Generator, classes: int, width: int, rank: int, bits: int = 3
) -> np.ndarray:
    """Contrasts [K-1, p] of exactly this rank, drawn again until it is.

    Rank p (narrow) or K-1 (full) is generic. Any other rank comes from writing the rows as integer
    combinations of ``rank`` generators, so that which rows are dependent is not known in advance;
    above rank 12 the generators themselves are among the rows, or few draws would have the rank.
    """
    rows = classes - 1
    if not 1 <= rank <= min(rows, width):
        raise ValueError(f"expected a rank from 1 to {min(rows, width)}, got {rank}")
    bound = 2**bits - 1
    while True:
        if rank in (width, rows):
            out = rng.integers(-bound, bound + 1, (rows, width))
        else:
            mix = rng.integers(-2, 3, (rows, rank)) * (rng.random((rows, rank)) < 4 / rank)
            if rank > 12:
                mix[rng.permutation(rows)[:rank]] = np.eye(rank, dtype=np.int64)
            out = mix @ rng.integers(-bound, bound + 1, (rank, width))
        if rank_of(out) == rank:
            return out


def log_probabilities(rng: np.random.Generator, classes: int, spread: float) -> tuple[float, ...]:
    """log P of normal logits with this standard deviation, in descending order."""
    return log_softmax(sorted(rng.normal(0.0, spread, classes), reverse=True))


def label_of(which: str, classes: int) -> int:
    """The position of the top, the middle or the least likely class."""
    return {"top": 0, "middle": classes // 2, "least": classes - 1}[which]


def zero_sum_gradient(
    rng: np.random.Generator, kind: str, log_prob: Sequence[float]
) -> tuple[float, ...]:
    """g = df/dz with sum 0: small integers, a margin, or the entropy's (graded like P)."""
    k = len(log_prob)
    if kind == "integers":
        tail = rng.integers(-9, 10, k - 1)
        tail[rng.integers(k - 1)] = 7  # never all zero
        return (float(-tail.sum()), *map(float, tail))
    if kind == "margin":
        g = np.zeros(k)
        one, other = rng.choice(k, 2, replace=False)
        g[one], g[other] = 1.0, -1.0
        return tuple(g.tolist())
    with mp.workdps(4 * DIGITS):
        log_p = [mp.mpf(v) for v in log_prob]
        entropy = -mp.fsum(mp.exp(v) * v for v in log_p)
        tail_ = [float(-mp.exp(v) * (v + entropy)) for v in log_p[1:]]
        return (float(-mp.fsum(tail_)), *tail_)


def sensitivity(problem: Problem) -> float:
    """First-order estimate of the relative error that float64 allows in an exact FI.

    Let b be the first independent rows in order of probability (those that carry the metric when P
    is graded), kappa their condition number, and X the coordinates of every row in b. A Gram matrix
    rounded at eps gives a row of X to eps kappa^2 max|X_k| at best; its exact zeros can be kept,
    those of a general h cannot. So h's coordinates c_i = sum_k g_k X_ki are off by
    delta_i = eps kappa^2 sum_k |g_k| max|X_k|, over the k that contribute to i. In these
    coordinates a graded metric is near diag P_b, so that FI is near sum_i c_i^2 / P_bi and moves by
    sum_i (2 |c_i| delta_i + delta_i^2) / P_bi.
    """
    basis, numerators, denominator = relations(problem.rows)
    if len(basis) == problem.classes - 1 and problem.raw is None:
        return 0.0  # the closed form, from probabilities alone
    x = (numerators / denominator).astype(np.float64)  # [K-1, r]
    log_p = np.array(problem.log_prob)
    if problem.raw is not None:
        b = problem.rows[basis].T.astype(np.float64)
        c = np.linalg.lstsq(b, problem.raw.astype(np.float64), rcond=None)[0]
        size = np.full_like(c, np.abs(c).max())
    else:
        if problem.grad is not None:
            g = np.array(problem.grad[1:])
        elif problem.label:
            g = np.eye(problem.classes - 1)[problem.label - 1]
        else:
            g = np.exp(log_p[1:] - log_p[1])
        c = x.T @ g
        noisy = np.abs(g) * np.abs(x).max(1)
        noisy[basis] = 0.0  # their coordinates are the identity
        size = (x != 0).T @ noisy
    kappa = float(np.linalg.cond(problem.rows[basis].astype(np.float64)))
    delta = 2.0**-52 * kappa**2 * size
    root = np.exp((log_p[basis[-1] + 1] - log_p[np.array(basis) + 1]) / 2)  # 1 / sqrt(P_b), scaled
    value = float(((c * root) ** 2).sum())
    moved = float(((2 * np.abs(c) * root + delta * root) * delta * root).sum())
    return moved / value if value > 0 else float("inf")


def problem(
    rng: np.random.Generator,
    classes: int,
    width: int,
    rank: int,
    spread: float,
    objective: str = "top",
) -> Problem:
    """A problem that float64 can resolve to RESOLVED (see :func:`sensitivity`), drawn until it is.

    ``objective`` is one of LABELS, of zero_sum_gradient's kinds, or "raw".
    """
    for _ in range(200):
        rows = integer_rows(rng, classes, width, rank)
        log_prob = log_probabilities(rng, classes, spread)
        if objective in LABELS:
            out = Problem(rows, log_prob, label=label_of(objective, classes))
        elif objective == "raw":
            out = Problem(rows, log_prob, raw=rng.integers(-7, 8, width))
        else:
            out = Problem(rows, log_prob, grad=zero_sum_gradient(rng, objective, log_prob))
        if sensitivity(out) <= RESOLVED:
            return out
    raise RuntimeError("no draw that float64 resolves: choose another rank or width")


def ranks(rng: np.random.Generator, classes: int) -> Iterator[tuple[int, int]]:
    """(p, rank): one coordinate, narrow, dependent rows although p is large, full."""
    rows = classes - 1
    yield 1, 1
    if rows > 2:
        narrow = int(rng.integers(2, rows))
        yield narrow, narrow
        yield rows + 3, int(rng.integers(1, rows))
        yield rows + 3, rows - 1
    if rows > 1:
        yield rows + 2, rows


def sweep(
    seed: int, classes: Sequence[int], objectives: Sequence[str], spreads: Sequence[float] = SPREADS
) -> Iterator[Problem]:
    """Problems over classes, spreads, ranks and objectives, from one seed."""
    for k in classes:
        for spread in spreads:
            rng = np.random.default_rng([seed, k, int(spread)])
            for width, rank in ranks(rng, k):
                for objective in objectives:
                    yield problem(rng, k, width, rank, spread, objective)


def arguments(problems: Sequence[Problem]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """gram, log_prob, label, grad for an op: one batch of problems of one size and objective."""
    gram = torch.from_numpy(np.stack([q.gram() for q in problems]))
    log_prob = torch.tensor([q.log_prob for q in problems], dtype=torch.float64)
    label = grad = None
    if problems[0].raw is None and problems[0].grad is None:
        label = torch.tensor([q.label for q in problems], dtype=torch.int64)
    elif problems[0].raw is None:
        grad = torch.tensor([q.grad for q in problems], dtype=torch.float64)
    return gram, log_prob, label, grad
