"""Cotangents of the taps for some rows, and the Gram matrix of each parameter's gradients.

What is small (biases, norms) is reduced to gradients as soon as a backward pass has ended. The
cotangents of weights are kept for all rows; their Gram matrices follow from them and from the
layer's input, without the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfi.layers.calls import Call
from fastfi.layers.planner import ghost_is_cheaper
from fastfi.layers.source import Source
from fastfi.layers.uses import Convolution, Lookup, Outer, Pulled, Scaled, Use

__all__ = ["Cotangents", "root_grams"]

# Gradients that have to be formed (tied weights, whole modules) are held for as many samples and
# rows at once as fit here.
GRADIENT_BYTES = 64 << 20


class Cotangents:
    """Of the uses of a tape, for n rows of every sample.

    Args:
        uses: with their batchings.
        batch: samples.
        rows: n.
    """

    def __init__(self, uses: Sequence[Use | Call], batch: int, rows: int) -> None:
        self.uses, self.batch, self.rows = uses, batch, rows
        self.held: dict[int, Tensor] = {}  # by number of the use: [B, n, ...]
        self.leaves: dict[tuple[int, int], Tensor] = {}  # of calls, by output
        self._small: dict[int, Tensor] = {}  # gradients of Scaled uses

    def take(self, r: int, grads: Sequence[Tensor | None]) -> None:
        """Row r, from the cotangents of the tape's edges."""
        for i, use in enumerate(self.uses):
            if isinstance(use, Call):
                for leaf, edge in enumerate(use.edges):
                    d = grads[edge]
                    if d is not None:
                        self._put(self.leaves, (i, leaf), r, use.cotangent(leaf, d, self.batch))
                continue
            d = grads[use.edge]
            if d is None:
                continue
            if isinstance(use, Scaled):
                self._put(self._small, i, r, use.gradient(d, self.batch))
            else:
                assert isinstance(use, (Outer, Convolution, Lookup))
                self._put(self.held, i, r, use.cotangent(d, self.batch))

    def _put(self, where: dict, key: object, r: int, value: Tensor) -> None:  # type: ignore[type-arg]
        if key not in where:
            where[key] = value.new_empty(self.batch, self.rows, *value.shape[1:])
        where[key][:, r] = value

    def small(self, i: int) -> Tensor:
        """Gradients [B, n, size] of a Scaled use."""
        return self._small[i]

    def reached(self, i: int) -> bool:
        """Whether any cotangent came to the use."""
        return i in self.held or i in self._small or any(k[0] == i for k in self.leaves)


def _in_storage(source: Source, g: Tensor) -> Tensor:
    """Gradients [b, n, size] of a view as [b, n, numel] of its parameter, as that lies in memory."""
    if source.in_order:
        return g
    out = g.new_zeros(*g.shape[:2], source.numel)
    return out.index_add_(2, source.positions().to(g.device), g)


def _components(c: Cotangents) -> list[tuple[set[int], list[int]]]:
    """Parameters that have uses in common, with the numbers of these uses."""
    found: list[tuple[set[int], list[int]]] = []
    for i, use in enumerate(c.uses):
        if not c.reached(i):
            continue
        roots, uses = set(use.roots), [i]
        for other in [f for f in found if f[0] & roots]:
            roots |= other[0]
            uses = [*other[1], *uses]
            found.remove(other)
        found.append((roots, uses))
    return found


def root_grams(c: Cotangents) -> Iterator[tuple[int, Tensor]]:
    """(number, N [B, n, n] float64) of every parameter that cotangents have reached, where
    ``N_rs`` is the inner product of its gradients for rows r and s. A number comes once."""
    small: list[tuple[int, Tensor]] = []
    for roots, numbers in _components(c):
        uses = [c.uses[i] for i in numbers]
        if all(type(u) is Scaled for u in uses):
            rows = [_in_storage(u.source, c.small(i)) for u, i in zip(uses, numbers, strict=True)]
            total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
            small.append((min(roots), total))
        elif len(numbers) == 1 and isinstance(uses[0], Lookup):
            yield min(roots), _lookup_gram(c, numbers[0])
        elif len(roots) == 1 and (n := _matrix_gram(c, numbers)) is not None:
            yield min(roots), n
        else:
            yield from _formed_grams(c, roots, numbers)
    if small:
        sizes = torch.tensor([0, *(rows.shape[2] for _, rows in small)]).cumsum(0)
        joined = torch.cat([rows for _, rows in small], 2)
        grams = torch.ops.fastfi.segment_gram(joined, sizes[None].to(joined.device))
        for g, (root, _) in enumerate(small):
            yield root, grams[:, g]


def _parts(total: int, bytes_each: int, limit: int) -> list[slice]:
    size = max(1, min(total, limit // max(1, bytes_each)))
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def _simple(use: Use) -> bool:
    """Whether a convolution's samples are its images, and its direction the usual one."""
    return isinstance(use, Convolution) and not use.transposed


def _matrix_gram(c: Cotangents, numbers: Sequence[int]) -> Tensor | None:
    """N of one weight used in linear maps or convolutions, all in the same way; else None."""
    uses = [c.uses[i] for i in numbers]
    if not all(isinstance(u, (Outer, Convolution)) for u in uses):
        return None
    if len({(type(u), u.source, getattr(u, "transposed", None)) for u in uses}) > 1:  # type: ignore[union-attr]
        return None
    first = uses[0]
    if isinstance(first, Outer):
        a = [u.inputs(c.batch) for u in uses]  # type: ignore[union-attr]
        d = [c.held[i] for i in numbers]
        joined = (a[0], d[0]) if len(a) == 1 else (torch.cat(a, 1), torch.cat(d, 2))
        return _linear(*joined)
    assert isinstance(first, Convolution)
    x, d = first.inputs(c.batch), c.held[numbers[0]]
    if len(uses) == 1 and x.shape[1] == 1 and _simple(first):
        g = first.geometry
        positions = d.shape[4:].numel()
        patch = x.shape[2] // g.groups * torch.Size(g.kernel).numel()
        ghost = ghost_is_cheaper(positions, patch, d.shape[3] // g.groups, c.rows, d.dtype)
        return torch.ops.fastfi.conv_gram(
            x[:, 0], d[:, :, 0], g.kernel, g.stride, g.padding, g.dilation, g.groups, ghost
        )
    return _unfolded(c, numbers)


def _linear(a: Tensor, d: Tensor) -> Tensor:
    ghost = ghost_is_cheaper(a.shape[1], a.shape[2], d.shape[3], d.shape[1], d.dtype)
    return torch.ops.fastfi.linear_gram(a, d, ghost)


def _unfolded(c: Cotangents, numbers: Sequence[int]) -> Tensor:
    """Convolutions of several images for each sample, transposed, or several with one weight."""
    uses = [(c.uses[i], c.uses[i].inputs(c.batch), c.held[i]) for i in numbers]  # type: ignore[union-attr]
    each = sum(
        x[0].nbytes * torch.Size(u.geometry.kernel).numel() + d[0].nbytes  # type: ignore[union-attr]
        for u, x, d in uses
    )
    out = torch.empty(c.batch, c.rows, c.rows, dtype=torch.float64, device=uses[0][1].device)
    for part in _parts(c.batch, each, GRADIENT_BYTES):
        pairs = [u.factors(x[part], d[part]) for u, x, d in uses]  # type: ignore[union-attr]
        left, right = (torch.cat(f, 3) if len(f) > 1 else f[0] for f in zip(*pairs, strict=True))
        if uses[0][0].transposed:  # type: ignore[union-attr]
            left, right = right, left  # left now has the rows
        d = left.transpose(1, 2).flatten(0, 1)  # [b * g, n, T, .]
        a = right[:, 0].flatten(0, 1)  # [b * g, T, .]
        out[part] = _linear(a, d).unflatten(0, (-1, right.shape[2])).sum(1)
    return out


def _lookup_gram(c: Cotangents, number: int) -> Tensor:
    """N of a table: cotangents are summed for each index that a sample uses, then multiplied."""
    use, d = c.uses[number], c.held[number]
    assert isinstance(use, Lookup)
    index, place, weight = use.entries(c.batch)  # [B, N]
    order = index.argsort(dim=1, stable=True)
    ranked = index.gather(1, order)
    slot = torch.zeros_like(ranked)
    slot[:, 1:] = (ranked.diff(dim=1) != 0).cumsum(1)
    width = int(slot[:, -1].max()) + 1
    parts = []
    for part in _parts(c.batch, 2 * d[0].nbytes * max(1, width // d.shape[2]), GRADIENT_BYTES):
        at = order[part]
        each = d[part].gather(2, _spread(place[part].gather(1, at), d[part]))  # [b, n, N, E]
        if weight is not None:
            each = each * weight[part].gather(1, at)[:, None, :, None].to(each)
        rows = each.new_zeros(*each.shape[:2], width, each.shape[3])
        rows.scatter_add_(2, _spread(slot[part], each), each)
        parts.append(torch.ops.fastfi.gram(rows.flatten(2)))
    return torch.cat(parts)


def _spread(index: Tensor, d: Tensor) -> Tensor:
    """[b, N] as [b, n, N, E]."""
    return index[:, None, :, None].expand(-1, d.shape[1], -1, d.shape[3])


def _formed(c: Cotangents, number: int, part: slice, rows: slice) -> dict[int, Tensor]:
    """Gradients [b, r, numel] of a use's parameters, formed."""
    use = c.uses[number]
    if isinstance(use, Call):
        d = {leaf: t[part, rows] for (i, leaf), t in c.leaves.items() if i == number}
        tensors = {r: use.module.get_parameter(n) for r, n in use.parameters.items()}
        grads = use.rows(d, part, c.batch)
        return {
            root: _in_storage(
                Source.of(root, tensors[root], tensors[root]), g.reshape(*g.shape[:2], -1)
            )
            for root, g in grads.items()
        }
    if isinstance(use, Pulled):
        grads = use.pull_back(c.small(number)[part, rows])
        return {
            root: _in_storage(
                Source.of(root, p, p), grads[root].reshape(*grads[root].shape[:2], -1)
            )
            for root, p in use.origins.items()
            if root in grads
        }
    if isinstance(use, Scaled):
        g = c.small(number)[part, rows]
    elif isinstance(use, Lookup):
        g = _formed_lookup(use, c.held[number][part, rows], part, c.batch)
    elif isinstance(use, Outer):
        a = use.inputs(c.batch)[part]
        g = torch.einsum("bnto,btd->bnod", c.held[number][part, rows], a).flatten(2)
    else:
        assert isinstance(use, Convolution)
        x = use.inputs(c.batch)[part]
        left, right = use.factors(x, c.held[number][part, rows])  # [b, n | 1, g, T, I | J]
        g = (left.mT @ right).flatten(2)
    return {use.source.root: _in_storage(use.source, g)}


def _formed_lookup(use: Lookup, d: Tensor, part: slice, batch: int) -> Tensor:
    index, place, weight = (None if t is None else t[part] for t in use.entries(batch))
    assert index is not None and place is not None
    each = d.gather(2, _spread(place, d))
    if weight is not None:
        each = each * weight[:, None, :, None].to(each)
    out = d.new_zeros(*d.shape[:2], *use.source.shape)
    return out.scatter_add_(2, _spread(index, d), each).flatten(2)


def _formed_grams(
    c: Cotangents, roots: set[int], numbers: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """N of parameters whose gradients have to be formed, a few samples and rows at a time."""
    sizes = {}
    for i in numbers:
        use = c.uses[i]
        if isinstance(use, Call):
            sizes.update(
                {r: use.module.get_parameter(n).numel() for r, n in use.parameters.items()}
            )
        elif isinstance(use, Pulled):
            sizes.update({r: p.numel() for r, p in use.origins.items()})
        else:
            sizes[use.source.root] = use.source.numel
    each = 8 * sum(sizes.values())
    row_parts = _parts(c.rows, each, GRADIENT_BYTES)
    step = len(range(*row_parts[0].indices(c.rows)))
    out = {
        r: torch.zeros(c.batch, c.rows, c.rows, dtype=torch.float64, device=_device(c))
        for r in sorted(roots)
    }

    def formed(part: slice, rows: slice) -> dict[int, Tensor]:
        total: dict[int, Tensor] = {}
        for i in numbers:
            for root, g in _formed(c, i, part, rows).items():
                total[root] = total[root] + g if root in total else g
        return total

    for part in _parts(c.batch, each * step, GRADIENT_BYTES):
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


def _device(c: Cotangents) -> torch.device:
    for d in (*c.held.values(), *c.leaves.values(), *c._small.values()):
        return d.device
    raise AssertionError("no cotangents")
