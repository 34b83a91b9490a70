"""Gradients that have to be formed: of weights used in several ways, and of whole modules' calls.

A few samples and rows at a time, so that memory does not grow with rows times parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfi.layers.calls import Call
from fastfi.layers.cotangents import Cotangents
from fastfi.layers.source import Source
from fastfi.layers.uses import Convolution, Lookup, Outer, Pulled, Scaled, Use

__all__ = ["GRADIENT_BYTES", "formed_grams", "in_storage", "parts", "spread"]

# Of the gradients that are held at once.
GRADIENT_BYTES = 256 << 20


def in_storage(source: Source, g: Tensor) -> Tensor:
    """Gradients [b, n, size] of a view as those of its parameter, [b, n, numel] as it lies in
    memory."""
    if source.in_order:
        return g
    out = g.new_zeros(*g.shape[:2], source.numel)
    return out.index_add_(2, source.positions().to(g.device), g)


def parts(total: int, bytes_each: int, limit: int) -> list[slice]:
    """Slices of so many things whose bytes stay within the limit, at least one thing each."""
    size = max(1, min(total, limit // max(1, bytes_each)))
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def spread(index: Tensor, d: Tensor) -> Tensor:
    """[b, N] as [b, n, N, E]."""
    return index[:, None, :, None].expand(-1, d.shape[1], -1, d.shape[3])


def _flat(root: int, parameter: Tensor, g: Tensor) -> Tensor:
    """Gradients [b, n, *shape] of a parameter as it lies in memory."""
    return in_storage(Source.of(root, parameter, parameter), g.reshape(*g.shape[:2], -1))


def _formed(c: Cotangents, number: int, part: slice, rows: slice) -> dict[int, Tensor]:
    """Gradients [b, r, numel] of a use's parameters, formed."""
    use = c.uses[number]
    if isinstance(use, Call):
        d = {leaf: t[part, rows] for (i, leaf), t in c.leaves.items() if i == number}
        own = {r: use.module.get_parameter(n) for r, n in use.parameters.items()}
        grads = use.rows(d, part, c.batch)
        return {root: _flat(root, own[root], g) for root, g in grads.items()}
    if isinstance(use, Pulled):
        grads = use.pull_back(c.small(number)[part, rows])
        return {root: _flat(root, use.origins[root], g) for root, g in grads.items()}
    assert isinstance(use, Use)
    if isinstance(use, Scaled):
        g = c.small(number)[part, rows]
    elif isinstance(use, Lookup):
        g = _formed_lookup(use, c.stacked(number, part, rows), part, c.batch)
    elif isinstance(use, Outer):
        a = use.inputs(c.batch)[part]
        g = torch.einsum("bnto,btd->bnod", c.stacked(number, part, rows), a).flatten(2)
    else:
        assert isinstance(use, Convolution)
        x = use.inputs(c.batch)[part]
        left, right = use.factors(x, c.stacked(number, part, rows))  # [b, n | 1, g, T, I | J]
        g = (left.mT @ right).flatten(2)
    return {use.source.root: in_storage(use.source, g)}


def _formed_lookup(use: Lookup, d: Tensor, part: slice, batch: int) -> Tensor:
    index, place, weight = (None if t is None else t[part] for t in use.entries(batch))
    assert index is not None
    assert place is not None
    each = d.gather(2, spread(place, d))
    if weight is not None:
        each = each * weight[:, None, :, None].to(each)
    out = d.new_zeros(*d.shape[:2], *use.source.shape)
    return out.scatter_add_(2, spread(index, d), each).flatten(2)


def formed_grams(
    c: Cotangents, roots: set[int], numbers: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """N of parameters whose gradients have to be formed, a few samples and rows at a time."""
    sizes: dict[int, int] = {}
    for i in numbers:
        use = c.uses[i]
        if isinstance(use, Call):
            own = {r: use.module.get_parameter(n) for r, n in use.parameters.items()}
            sizes.update({root: p.numel() for root, p in own.items()})
        elif isinstance(use, Pulled):
            sizes.update({root: p.numel() for root, p in use.origins.items()})
        else:
            assert isinstance(use, Use)
            sizes[use.source.root] = use.source.numel
    each = 2 * 4 * sum(sizes.values())  # in float32, and a sum under way
    row_parts = parts(c.rows, each, GRADIENT_BYTES)
    step = len(range(*row_parts[0].indices(c.rows)))
    out = {
        r: torch.zeros(c.batch, c.rows, c.rows, dtype=torch.float64, device=c.device)
        for r in sorted(roots)
    }

    def formed(part: slice, rows: slice) -> dict[int, Tensor]:
        total: dict[int, Tensor] = {}
        for i in numbers:
            for root, g in _formed(c, i, part, rows).items():
                total[root] = total[root] + g if root in total else g
        return total

    for part in parts(c.batch, each * step, GRADIENT_BYTES):
        for i, first in enumerate(row_parts):
            left = formed(part, first)
            for second in row_parts[i:]:
                right = left if second == first else formed(part, second)
                for root, g in left.items():
                    if second == first:
                        out[root][part, first, first] = torch.ops.fastfi.gram(g)
                    else:
                        n = g.double() @ right[root].double().mT
                        out[root][part, first, second] = n
                        out[root][part, second, first] = n.mT
    yield from out.items()
