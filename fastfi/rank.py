"""``check_rank``: how far the contrasts' Jacobian is from losing rank, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_wrt
from fastfi.inverse import Exact, solve
from fastfi.layers.grams import BlockGrams
from fastfi.layers.parameters import Parameters, blocks, exclusive
from fastfi.layers.sweeper import Sweeper
from fastfi.rows import InputRows, gram_of
from fastfi.sweep import Request, sweep, sweep_chunks

__all__ = ["RankCheck", "check_rank"]


class RankCheck(NamedTuple):
    """What :func:`check_rank` found.

    Attributes:
        names: of the blocks.
        rank: [B, L] int64, as :class:`fastfi.Exact` decides it.
        margin: [B, L] float64, the smallest over the largest of the K - 1 singular values of the
            contrasts' Jacobian: the relative distance to the nearest matrix of lower rank
            (Eckart and Young). Resolved down to 1e-7 or the rows' own precision, whichever is
            larger; 0 for a block that nothing reaches.
        full: [B, L] bool, whether the rank is K - 1, at which Exact FI of cross-entropy is
            (1 - P_y) / P_y whatever the block is.
    """

    names: tuple[str, ...]
    rank: Tensor
    margin: Tensor
    full: Tensor


def _decide(data: InputRows | BlockGrams, gram: Tensor, rule: Exact) -> tuple[Tensor, ...]:
    """rank, margin, full, each [B, L], of Gram matrices [B, L, n, n]."""
    c = data.classes
    _, rank = solve(rule, gram, c.log_prob, data.label, data.grad, data.rtol)
    assert rank is not None
    used = c.log_prob.isfinite().sum(1, keepdim=True) - 1  # contrasts; fewer where lumped
    peak = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(gram.dtype).tiny)
    squares = torch.linalg.eigvalsh(gram / peak[..., None, None]).flip(-1).clamp(min=0)
    last = squares.gather(-1, (used - 1).expand(rank.shape)[..., None])[..., 0]
    margin = (last / squares[..., 0].clamp(min=torch.finfo(gram.dtype).tiny)).sqrt()
    return rank, margin, rank == used


def check_rank(
    model: Any,
    x: Tensor,
    *,
    wrt: str | Sequence[str] = "params",
    outputs: str = "logits",
    lump: float | None = None,
    rtol: float | None = None,
    memory_budget: int | None = None,
) -> RankCheck:
    """The rank on which Exact FI rests, and how clear it is.

    FI under :class:`Exact` jumps where the rank changes. A block with a margin far above ``rtol``
    has a rank that rounding cannot change; near it, the decision is arbitrary, and Damped is the
    better question to ask.

    Args:
        model, x, wrt, outputs, lump, memory_budget: as in :func:`fastfi.influence`. ``"params"``,
            ``"input"`` and ``"all"`` are one block, L = 1.
        rtol: of :class:`Exact`; None means its default.

    Returns:
        :class:`RankCheck`.

    Raises:
        The exceptions of :func:`fastfi.influence`.

    Example:
        >>> found = fastfi.check_rank(model, x, wrt="layers")
        >>> [name for name, full in zip(found.names, found.full.all(0)) if not full]
        ['bn1']
    """
    check_wrt(wrt)
    rule = Exact(rtol)
    q = Request.checked(
        model, x, None, outputs=outputs, lump=lump, memory_budget=memory_budget,
        integers=wrt not in ("input", "all"),
    )  # fmt: skip
    if wrt == "input":
        return sweep(q, lambda d, at: RankCheck(("input",), *_decide(d, gram_of(d)[:, None], rule)))
    with exclusive(model):
        parameters = Parameters(model)
        groups = blocks(parameters, wrt)
        grams = Sweeper(q, parameters, groups, total=False, with_input=wrt == "all")

        def work(data: BlockGrams, at: Tensor) -> RankCheck:
            assert data.gram is not None
            return RankCheck(groups.names, *_decide(data, data.gram, rule))

        return sweep_chunks(q, grams.chunks(), grams, work)
