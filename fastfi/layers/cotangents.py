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
        # By number of the use: the rows as they came from autograd, each [B, ...].
        self.held: dict[int, list[Tensor]] = {}
        self.leaves: dict[tuple[int, int], Tensor] = {}  # of calls, by output
        self._small: dict[int, Tensor] = {}  # gradients of Scaled uses, [B, n, size] each
        self.joint: Tensor | None = None  # those of parameters with one such use, side by side
        self.columns: dict[int, slice] = {}
        self._place()

    def _place(self) -> None:
        """Places for the gradients that need not be summed or rearranged."""
        used: dict[int, int] = {}
        for use in self.uses:
            for root in use.roots:
                used[root] = used.get(root, 0) + 1
        end = 0
        for i, use in enumerate(self.uses):
            if type(use) is Scaled and use.source.in_order and used[use.source.root] == 1:
                self.columns[i] = slice(end, end + use.source.numel)
                end += use.source.numel

    def take(self, r: int, grads: Sequence[Tensor | None]) -> None:
        """Row r, from the cotangents of the tape's edges."""
        plain: dict[int, Tensor] = {}  # by edge: sums over positions that came with weighted ones
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
                if use.factor is not None and use.channels(d, self.batch):
                    g, plain[use.edge] = use.both(d)
                elif use.factor is None and use.edge in plain and use.channels(d, self.batch):
                    g = plain[use.edge]
                else:
                    g = use.gradient(d, self.batch)
                self._put_small(i, r, g)
            else:
                assert isinstance(use, (Outer, Convolution, Lookup))
                self._hold(i, r, use.cotangent(d, self.batch))

    def _put_small(self, i: int, r: int, g: Tensor) -> None:
        columns = self.columns.get(i)
        if columns is None:
            return self._put(self._small, i, r, g)
        if self.joint is None:
            width = max(c.stop for c in self.columns.values())
            self.joint = g.new_zeros(self.batch, self.rows, width)
        self.joint[:, r, columns] = g
        self._small.setdefault(i, self.joint[:, :, columns])

    def _hold(self, i: int, r: int, value: Tensor) -> None:
        if i not in self.held:
            self.held[i] = [value] * self.rows
        self.held[i][r] = value

    def stacked(self, i: int, part: slice, rows: slice = slice(None)) -> Tensor:
        """The rows of some samples as one tensor, [b, n, ...]."""
        return torch.stack([d[part] for d in self.held[i][rows]], 1)

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
    if c.joint is not None:
        places = sorted(c.columns.items(), key=lambda item: item[1].start)
        ends = torch.tensor([0, *(columns.stop for _, columns in places)], device=c.joint.device)
        grams = torch.ops.fastfi.segment_gram(c.joint, ends[None])
        for g, (i, _) in enumerate(places):
            if c.reached(i):
                yield c.uses[i].source.root, grams[:, g]  # type: ignore[union-attr]
    for roots, numbers in _components(c):
        uses = [c.uses[i] for i in numbers]
        if numbers[0] in c.columns:
            continue
        if all(type(u) is Scaled for u in uses):
            rows = [_in_storage(u.source, c.small(i)) for u, i in zip(uses, numbers, strict=True)]
            total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
            yield min(roots), torch.ops.fastfi.gram(total)
        elif len(numbers) == 1 and isinstance(uses[0], Lookup):
            yield min(roots), _lookup_gram(c, numbers[0])
        elif len(roots) == 1 and (n := _matrix_gram(c, numbers)) is not None:
            yield min(roots), n
        else:
            yield from _formed_grams(c, roots, numbers)


def _parts(total: int, bytes_each: int, limit: int) -> list[slice]:
    size = max(1, min(total, limit // max(1, bytes_each)))
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


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
        if len(uses) == 1:
            return _linear(a[0], c.held[numbers[0]])
        rows = [torch.cat([c.held[i][r] for i in numbers], 1) for r in range(c.rows)]
        return _linear(torch.cat(a, 1), rows)
    assert isinstance(first, Convolution)
    x, d = first.inputs(c.batch), c.held[numbers[0]]
    if len(uses) == 1 and x.shape[1] == 1 and not first.transposed:
        g = first.geometry
        positions = d[0].shape[3:].numel()
        patch = x.shape[2] // g.groups * torch.Size(g.kernel).numel()
        taps, pixels = torch.Size(g.kernel).numel(), x.shape[3:].numel()
        outputs = d[0].shape[2] // g.groups
        ghost = ghost_is_cheaper(positions, patch, outputs, c.rows, d[0].dtype, taps, pixels)
        images = [t[:, 0] for t in d]
        return torch.ops.fastfi.conv_gram(
            x[:, 0], images, g.kernel, g.stride, g.padding, g.dilation, g.groups, ghost
        )
    return _unfolded(c, numbers)


def _linear(a: Tensor, d: Sequence[Tensor]) -> Tensor:
    ghost = ghost_is_cheaper(a.shape[1], a.shape[2], d[0].shape[2], len(d), d[0].dtype)
    return torch.ops.fastfi.linear_gram(a, d, ghost)


def _unfolded(c: Cotangents, numbers: Sequence[int]) -> Tensor:
    """Convolutions of several images for each sample, transposed, or several with one weight."""
    uses = [(i, c.uses[i], c.uses[i].inputs(c.batch)) for i in numbers]  # type: ignore[union-attr]
    each = sum(
        x[0].nbytes * torch.Size(u.geometry.kernel).numel() + c.rows * c.held[i][0][0].nbytes  # type: ignore[union-attr]
        for i, u, x in uses
    )
    out = torch.empty(c.batch, c.rows, c.rows, dtype=torch.float64, device=uses[0][2].device)
    for part in _parts(c.batch, each, GRADIENT_BYTES):
        pairs = [u.factors(x[part], c.stacked(i, part)) for i, u, x in uses]  # type: ignore[union-attr]
        left, right = (torch.cat(f, 3) if len(f) > 1 else f[0] for f in zip(*pairs, strict=True))
        if uses[0][1].transposed:  # type: ignore[union-attr]
            left, right = right, left  # left now has the rows
        rows = [left[:, r].flatten(0, 1) for r in range(c.rows)]  # [b * g, T, .] each
        a = right[:, 0].flatten(0, 1)
        out[part] = _linear(a, rows).unflatten(0, (-1, right.shape[2])).sum(1)
    return out


def _lookup_gram(c: Cotangents, number: int) -> Tensor:
    """N of a table: cotangents are summed for each index that a sample uses, then multiplied."""
    use, first = c.uses[number], c.held[number][0]
    assert isinstance(use, Lookup)
    index, place, weight = use.entries(c.batch)  # [B, N]
    order = index.argsort(dim=1, stable=True)
    ranked = index.gather(1, order)
    slot = torch.zeros_like(ranked)
    slot[:, 1:] = (ranked.diff(dim=1) != 0).cumsum(1)
    width = int(slot[:, -1].max()) + 1
    parts = []
    bytes_each = 2 * c.rows * first[0].nbytes * max(1, width // first.shape[1])
    for part in _parts(c.batch, bytes_each, GRADIENT_BYTES):
        at, d = order[part], c.stacked(number, part)
        each = d.gather(2, _spread(place[part].gather(1, at), d))  # [b, n, N, E]
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
        g = _formed_lookup(use, c.stacked(number, part, rows), part, c.batch)
    elif isinstance(use, Outer):
        a = use.inputs(c.batch)[part]
        g = torch.einsum("bnto,btd->bnod", c.stacked(number, part, rows), a).flatten(2)
    else:
        assert isinstance(use, Convolution)
        x = use.inputs(c.batch)[part]
        left, right = use.factors(x, c.stacked(number, part, rows))  # [b, n | 1, g, T, I | J]
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
    for d in (*(rows[0] for rows in c.held.values()), *c.leaves.values(), *c._small.values()):
        return d.device
    raise AssertionError("no cotangents")
