"""What maps are measured against: a loop of two SVDs per window, and batched eigenvalues.

Both take L0, the rows of the log-probabilities' gradients scaled so that G = L0^T L0, and follow
one rule or another by its weights and by what it does to singular values (:class:`_Rule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.map_problems import SCALES, MapProblem
from fastfi.inverse import Truncated

__all__ = ["Window", "eigh_maps", "log_prob_rows", "pick", "prepare", "svd_loop"]
__all__ += ["windows_of"]

Array: TypeAlias = NDArray[np.float64]


class _Rule(NamedTuple):
    """How a rule turns L0 into FI.

    Attributes:
        weights: [B, K] float64, L0_k = weights_k dl_k.
        factor: [B] float64, h = -factor L0_y.
        cut: singular values up to this one are dropped; relative to the largest for "exact".
        tau: [B] float64, added to the squares of the others.
    """

    weights: Tensor
    factor: Tensor
    cut: float
    tau: Tensor


def _rule(q: MapProblem, name: str) -> _Rule:
    p = q.log_prob.exp()  # [B, K]
    p_y = p.gather(1, q.label[:, None]).squeeze(1)
    zero = torch.zeros_like(p_y)
    if name == "truncated":
        eps = Truncated().eps
        factor = (p_y.sqrt() + eps) / (p_y + eps)
        return _Rule(p / (p.sqrt() + eps), factor, eps, zero)
    if name == "exact":
        return _Rule(p.sqrt(), p_y.rsqrt(), q.rtol, zero)
    return _Rule(p.sqrt(), p_y.rsqrt(), 0.0, q.tau)


def log_prob_rows(q: MapProblem) -> Tensor:
    """dl [B, K, C, H, W] float64, the gradients of the log-probabilities."""
    dz = torch.nn.functional.pad(q.rows.double(), (0, 0, 0, 0, 0, 0, 1, 0))  # [B, K, C, H, W]
    return dz - torch.einsum("bk,bkchw->bchw", q.log_prob.exp(), dz)[:, None]


class Window(NamedTuple):
    """A place in the maps of a sample: positions along S, C, H, W."""

    scale: int
    channel: int
    line: int
    column: int


def windows_of(q: MapProblem, count: int) -> list[Window]:
    """A random sample of windows, every scale alike; the first of each scale stands in a corner."""
    make = np.random.default_rng(0)
    places = [
        Window(i % len(SCALES), *map(int, make.integers(q.rows.shape[2:]))) for i in range(count)
    ]
    corners = [place._replace(line=0, column=0) for place in places[: len(SCALES)]]
    return corners + places[len(SCALES) :]


def pick(maps: Tensor, places: Sequence[Window]) -> Tensor:
    """The first sample's values at these windows."""
    return torch.stack([maps[0][place] for place in places])


class Prepared(NamedTuple):
    """What the loop starts from: one sample and one rule.

    Attributes:
        dl: [K, C, H, W], gradients of the log-probabilities.
        weights: [K], L0_k = weights_k dl_k.
        label: the objective's class, h = -factor dl_label.
        factor: see ``label``.
        cut: singular values up to this one are dropped.
        relative: whether the cut is relative to the largest.
        tau: the damping.
    """

    dl: Array
    weights: Array
    label: int
    factor: float
    cut: float
    relative: bool
    tau: float


def prepare(q: MapProblem, rule: str) -> Prepared:
    """The first sample, for :func:`svd_loop`."""
    r = _rule(q, rule)
    return Prepared(
        log_prob_rows(q)[0].numpy(),
        r.weights[0].numpy(),
        int(q.label[0]),
        float(r.factor[0] * r.weights[0, q.label[0]]),
        r.cut,
        rule == "exact",
        float(r.tau[0]),
    )


def svd_loop(q: Prepared, places: Sequence[Window]) -> Array:
    """FI of each window as in the paper's published scripts: an SVD of L0 for its range, and one of
    the small matrix inside it for the metric's inverse square root."""
    out = np.zeros(len(places))
    scaled = np.diag(q.weights)
    for i, (at, channel, line, column) in enumerate(places):
        radius = SCALES[at] // 2
        lines = slice(max(0, line - radius), line + radius + 1)
        columns = slice(max(0, column - radius), column + radius + 1)
        dl = q.dl[:, channel, lines, columns].reshape(len(q.weights), -1)  # [K, w]
        l0 = dl.T @ scaled  # [w, K]
        h = -q.factor * dl[q.label]  # [w]
        basis, s, other = np.linalg.svd(l0, full_matrices=False)
        rank = int((s > (q.cut * s[0] if q.relative else q.cut)).sum())
        if rank == 0:
            continue
        a = s[:rank, None] * other[:rank]  # [rank, K]
        inner, squares, _ = np.linalg.svd(a @ a.T)
        root = (h @ basis[:, :rank] @ inner) / np.sqrt(squares + q.tau)
        out[i] = root @ root
    return out


def eigh_maps(q: MapProblem, rule: str, scales: Sequence[int] = SCALES) -> Tensor:
    """All maps [B, S, C, H, W] float64 as torch does it: products of L0's rows pixel by pixel, box
    sums of them, and batched eigenvalues of every window's L0 L0^T, one scale at a time."""
    r = _rule(q, rule)
    batch, classes = q.log_prob.shape
    colours, height, width = q.rows.shape[2:]
    l0 = r.weights[:, :, None, None, None] * log_prob_rows(q)  # [B, K, C, H, W]
    lower, upper = torch.tril_indices(classes, classes)  # T = K (K + 1) / 2 pairs
    products = (l0[:, lower] * l0[:, upper]).flatten(1, 2)  # [B, T C, H, W]
    at = q.label.view(-1, 1, 1, 1, 1, 1).expand(-1, colours, height, width, 1, classes)
    maps = []
    for scale in scales:
        sums = torch.nn.functional.avg_pool2d(
            products, scale, stride=1, padding=scale // 2, divisor_override=1
        )
        gram = l0.new_zeros(batch, colours, height, width, classes, classes)
        sums = sums.unflatten(1, (len(lower), colours))  # [B, T, C, H, W]
        gram[..., lower, upper] = sums.permute(0, 2, 3, 4, 1)  # eigh reads the lower triangle
        squares, vectors = torch.linalg.eigh(gram)  # [B, C, H, W, K], ascending
        own = vectors.gather(-2, at).squeeze(-2)  # [B, C, H, W, K]
        cut = r.cut**2 * (squares[..., -1:] if rule == "exact" else 1.0)
        # L0 = V s W^T, so (W_i . h)^2 = factor^2 s_i^2 V_yi^2.
        kept = squares > cut
        share = squares / (squares + r.tau.view(-1, 1, 1, 1, 1))
        maps.append(torch.where(kept, share * own.square(), 0.0).sum(-1))
    return torch.stack(maps, 1) * r.factor.square().view(-1, 1, 1, 1, 1)
