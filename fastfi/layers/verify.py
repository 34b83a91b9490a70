"""``verify``: the layers' Gram matrices against those of the full Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi.cudnn import row_eps
from fastfi.errors import OptionError
from fastfi.layers.grams import BlockGrams
from fastfi.layers.parameters import Blocks, Parameters, exclusive
from fastfi.layers.sweeper import Sweeper
from fastfi.rows import record
from fastfi.sweep import Request, run_chunks

__all__ = ["Verification", "verify"]

_JACOBIAN_BYTES = 256 << 20  # of the layers' Jacobians that are held at once


class Verification(NamedTuple):
    """What :func:`verify` found.

    Attributes:
        names: of the layers.
        error: [L] float64, the relative difference of each layer's Gram matrices from those of the
            full Jacobian, in the Frobenius norm; the worst sample's.
        bound: what rounding may do.
        disagree: names of the layers whose error exceeds it; () where all is well.
    """

    names: tuple[str, ...]
    error: Tensor
    bound: float
    disagree: tuple[str, ...]


class _Errors(NamedTuple):
    error: Tensor  # [b, L]


def _few_at_once(groups: Blocks, parameters: Parameters, rows: int) -> Iterator[list[int]]:
    """Parameters of as many layers as fit the memory, at least one layer's."""
    chosen: list[int] = []
    held = 0
    for members in groups.members:
        size = rows * sum(parameters.tensors[r].nbytes for r in members)
        if chosen and held + size > _JACOBIAN_BYTES:
            yield chosen
            chosen, held = [], 0
        chosen += sorted(members - set(chosen))
        held += size
    yield chosen


def _full(
    parameters: Parameters, groups: Blocks, x: Tensor, outputs: str, cotangents: list[Tensor]
) -> Tensor:
    """Gram matrices [L, n, n] of one sample x [1, ...] from its Jacobian, by plain autograd."""
    z = record(parameters.model, x, outputs, to_input=False).z
    n = len(cotangents)
    grams = {}
    for chosen in _few_at_once(groups, parameters, n):
        tensors = [parameters.tensors[r] for r in chosen]
        rows = [
            torch.autograd.grad(z, tensors, d.to(z.dtype), retain_graph=True, allow_unused=True)
            for d in cotangents
        ]
        for i, (root, t) in enumerate(zip(chosen, tensors, strict=True)):
            each = [torch.zeros_like(t) if r[i] is None else r[i] for r in rows]
            jacobian = torch.stack([g.to_dense().double().flatten() for g in each])  # [n, numel]
            grams[root] = jacobian @ jacobian.mT
    return torch.stack([torch.stack([grams[r] for r in m]).sum(0) for m in groups.members])


def verify(
    model: Any,
    x: Tensor,
    *,
    outputs: str = "logits",
    rtol: float | None = None,
    memory_budget: int | None = None,
) -> Verification:
    """Checks the rules by which the influence of layers is computed, on a few samples.

    Every layer's Gram matrix of the class contrasts' gradients is compared with the one from the
    full Jacobian, which plain autograd computes sample by sample and row by row: slow, and
    independent of the rules. (Every call of :func:`fastfi.influence` has made a cheaper check of
    its own, on one row of one sample.)

    Args:
        model: as in :func:`fastfi.influence`; its trainable parameters are checked.
        x: a few samples [B, ...].
        outputs, memory_budget: as in :func:`fastfi.influence`.
        rtol: the bound, above 0; None means 1e4 machine epsilons of the parameters (on a GPU, of
            what their gradients are computed in), at least 1e-9 and at most 0.1.

    Returns:
        :class:`Verification`.

    Raises:
        OptionError: ``rtol`` is not positive; and the exceptions of :func:`fastfi.influence`.

    Example:
        >>> fastfi.layers.verify(model, x[:3]).disagree
        ()
    """
    if rtol is not None and not rtol > 0:
        raise OptionError(f"rtol: expected a number above 0 or None, got {rtol!r}")
    q = Request.checked(model, x, None, outputs=outputs, memory_budget=memory_budget, integers=True)
    with exclusive(model):
        return _verified(q, rtol)


def _verified(q: Request, rtol: float | None) -> Verification:
    parameters = Parameters(q.model)
    groups = parameters.layers()
    grams = Sweeper(q, parameters, groups, total=True, with_input=False)
    eps = row_eps(q.model, parameters.dtype, q.x.device)
    bound = min(max(1e4 * eps, 1e-9), 0.1) if rtol is None else rtol

    def run(part: slice) -> _Errors:
        data: BlockGrams = grams(q.x, part, None)
        assert data.gram is not None
        assert data.total is not None
        n = data.gram.shape[-1]
        # Gradients that cancel, such as those of the keys' bias in attention, are rounding noise.
        noise = (100 * eps) ** 2 * torch.linalg.matrix_norm(data.total)
        errors = []
        for i, at in enumerate(range(*part.indices(len(q.x)))):
            cotangents = [data.classes.cotangent(r + 1)[i : i + 1] for r in range(n)]
            with torch.autocast(q.x.device.type, enabled=False):
                full = _full(parameters, groups, q.x[at : at + 1], q.outputs, cotangents)
            size = torch.linalg.matrix_norm(full)
            error = torch.linalg.matrix_norm(data.gram[i] - full)
            scale = torch.maximum(size, noise[i] / bound)
            errors.append(torch.where(error > 0, error / scale, 0.0))
        return _Errors(torch.stack(errors))

    error = run_chunks(q, grams.chunks(), run).error.amax(0)
    wrong = (error > bound).nonzero().flatten().tolist()
    return Verification(groups.names, error, bound, tuple(groups.names[i] for i in wrong))
