"""Gram matrices of each parameter's gradients, from the cotangents and the layers' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfi.layers.cotangents import Cotangents
from fastfi.layers.formed import GRADIENT_BYTES, formed_grams, in_storage, parts, spread
from fastfi.layers.planner import ghost_is_cheaper
from fastfi.layers.uses import Convolution, Lookup, Outer, Scaled, Tapped

__all__ = ["root_grams"]


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
        yield from _joint_grams(c, c.joint)
    for roots, numbers in _components(c):
        if numbers[0] in c.columns:
            continue
        root, uses = min(roots), [c.uses[i] for i in numbers]
        scaled = [u for u in uses if type(u) is Scaled]
        if len(scaled) == len(uses):
            rows = [in_storage(u.source, c.small(i)) for u, i in zip(scaled, numbers, strict=True)]
            yield root, torch.ops.fastfi.gram(torch.stack(rows).sum(0))
        elif len(uses) == 1 and isinstance(uses[0], Lookup):
            yield root, _lookup_gram(c, numbers[0], uses[0])
        elif len(roots) == 1 and (n := _weight_gram(c, numbers, uses)) is not None:
            yield root, n
        elif {type(u) for u in uses} == {Outer, Lookup} and len({u.source for u in uses}) == 1:  # type: ignore[attr-defined]
            yield root, _tied_gram(c, numbers)
        else:
            yield from formed_grams(c, roots, numbers)


def _joint_grams(c: Cotangents, joint: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Of norms' weights and biases, whose gradients lie side by side."""
    places = sorted((columns.start, columns.stop, i) for i, columns in c.columns.items())
    bounds, at = [0], []
    for start, stop, i in places:
        if start > bounds[-1]:
            bounds.append(start)  # a norm without a bias leaves its columns unused
        at.append((len(bounds) - 1, i))
        bounds.append(stop)
    grams = torch.ops.fastfi.segment_gram(joint, torch.tensor([bounds], device=joint.device))
    for g, i in at:
        yield c.uses[i].roots[0], grams[:, g]


def _weight_gram(c: Cotangents, numbers: Sequence[int], uses: Sequence[Tapped]) -> Tensor | None:
    """N of one weight, used in linear maps alone or in convolutions alone, all in the same way;
    None if it is used otherwise."""
    outer = [u for u in uses if isinstance(u, Outer)]
    if len(outer) == len(uses) and len({u.source for u in outer}) == 1:
        a = [u.inputs(c.batch) for u in outer]
        if len(a) == 1:
            return _linear(a[0], c.cotangents(numbers[0]))
        # Uses side by side are one use at more positions: cross terms count.
        rows = [torch.cat(d, 1) for d in zip(*map(c.cotangents, numbers), strict=True)]
        return _linear(torch.cat(a, 1), rows)
    convolutions = [u for u in uses if isinstance(u, Convolution)]
    alike = len({(u.source, u.transposed) for u in convolutions}) == 1
    if len(convolutions) == len(uses) and alike:
        one = convolutions[0]
        if len(uses) == 1 and one.by_image(c.batch):
            return _convolution(c, numbers[0], one)
        return _unfolded(c, numbers, convolutions)
    return None


def _linear(a: Tensor, d: Sequence[Tensor]) -> Tensor:
    sizes, device = (a.shape[1], a.shape[2], d[0].shape[2]), a.device.type
    ghost = ghost_is_cheaper(*sizes, len(d), d[0].dtype, device=device)
    return torch.ops.fastfi.linear_gram(a, d, ghost)


def _convolution(c: Cotangents, number: int, use: Convolution) -> Tensor:
    """A convolution of one image for each sample."""
    x, d = use.activation.tensor, c.held[number]  # [B, C, *spatial], [B, O, *positions] each
    g = use.geometry
    taps, pixels = torch.Size(g.kernel).numel(), x.shape[2:].numel()
    sizes = d[0].shape[2:].numel(), x.shape[1] // g.groups * taps, d[0].shape[1] // g.groups
    ghost = ghost_is_cheaper(*sizes, c.rows, d[0].dtype, taps, pixels, x.device.type)
    return torch.ops.fastfi.conv_gram(
        x, d, g.kernel, g.stride, g.padding, g.dilation, g.groups, ghost
    )


def _unfolded(c: Cotangents, numbers: Sequence[int], uses: Sequence[Convolution]) -> Tensor:
    """Convolutions of several images for each sample, transposed, or several with one weight."""
    each = 0
    for i, u in zip(numbers, uses, strict=True):
        taps = torch.Size(u.geometry.kernel).numel()
        patches, grid = u.inputs(c.batch)[0].nbytes, c.rows * c.held[i][0].nbytes // c.batch
        each += grid * taps + patches if u.transposed else patches * taps + grid
    out = torch.empty(c.batch, c.rows, c.rows, dtype=torch.float64, device=c.device)
    for part in parts(c.batch, each, GRADIENT_BYTES):
        pairs = [
            u.factors(u.inputs(c.batch)[part], c.stacked(i, part))
            for i, u in zip(numbers, uses, strict=True)
        ]
        left, right = (torch.cat(f, 3) if len(f) > 1 else f[0] for f in zip(*pairs, strict=True))
        if uses[0].transposed:
            left, right = right, left  # left now has the rows
        rows = [left[:, r].flatten(0, 1) for r in range(c.rows)]  # [b * g, T, .] each
        a = right[:, 0].flatten(0, 1)
        out[part] = _linear(a, rows).unflatten(0, (-1, right.shape[2])).sum(1)
    return out


def _lookup_gram(c: Cotangents, number: int, use: Lookup) -> Tensor:
    """N of a table: cotangents are summed for each index that a sample uses, then multiplied."""
    first = c.cotangents(number)[0]
    index, place, weight = use.entries(c.batch)  # [B, N]
    order = index.argsort(dim=1, stable=True)
    ranked = index.gather(1, order)
    slot = torch.zeros_like(ranked)
    slot[:, 1:] = (ranked.diff(dim=1) != 0).cumsum(1)
    width = int(slot[:, -1].max()) + 1
    grams = []
    # Each index has a cotangent of its own, and each different index a sum.
    bytes_each = c.rows * (index.shape[1] + width) * first.shape[2] * first.element_size()
    for part in parts(c.batch, bytes_each, GRADIENT_BYTES):
        at, d = order[part], c.stacked(number, part)
        each = d.gather(2, spread(place[part].gather(1, at), d))  # [b, n, N, E]
        each = each.to(torch.promote_types(each.dtype, torch.float32))
        if weight is not None:
            each = each * weight[part].gather(1, at)[:, None, :, None].to(each)
        rows = each.new_zeros(*each.shape[:2], width, each.shape[3])
        rows.scatter_add_(2, spread(slot[part], each), each)
        grams.append(torch.ops.fastfi.gram(rows.flatten(2)))
    return torch.cat(grams)


def _tied_gram(c: Cotangents, numbers: Sequence[int]) -> Tensor:
    """N of a table that is a linear map's weight too (tied embeddings): without its gradients,
    ``<e_v^T d_s, d_r^T a> = sum_lt d_r[t, v_l] (a_t . d_s[l])`` for the cross terms."""
    maps = [i for i in numbers if isinstance(c.uses[i], Outer)]
    tables = [i for i in numbers if isinstance(c.uses[i], Lookup)]
    if len(tables) > 1:
        return next(formed_grams(c, set(c.uses[numbers[0]].roots), numbers))[1]
    total = _weight_gram(c, maps, [c.uses[i] for i in maps])
    assert total is not None
    lookup = c.uses[tables[0]]
    assert isinstance(lookup, Lookup)
    total = total + _lookup_gram(c, tables[0], lookup)
    index, place, weight = lookup.entries(c.batch)  # [B, L]
    for i in maps:
        use = c.uses[i]
        assert isinstance(use, Outer)
        a = use.inputs(c.batch)  # [B, T, E]
        each = 8 * (2 * c.rows + 2) * (a.shape[1] + a.shape[2]) * index.shape[1]
        for part in parts(c.batch, each, GRADIENT_BYTES):
            d = c.stacked(tables[0], part).double()
            e = d.gather(2, spread(place[part], d))  # [b, n, L, E]
            if weight is not None:
                e = e * weight[part][:, None, :, None]
            products = a[part, None].double() @ e.mT  # [b, n, T, L]
            picked = c.stacked(i, part)  # [b, n, T, V]
            at = index[part][:, None, None].expand(*picked.shape[:3], -1)
            cross = picked.gather(3, at).double().flatten(2) @ products.flatten(2).mT
            total[part] += cross + cross.mT
    return total
