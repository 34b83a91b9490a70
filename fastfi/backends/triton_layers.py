"""``linear_gram`` and ``conv_gram`` by Triton: strides, addresses and launches.

A layer's input is read as patches of pixels, by strides and a table of each patch's pixels, and the
rows' cotangents by a table of addresses: nothing is unfolded, stacked or copied, unless the rows
lie in memory in different ways. Nothing waits for the device, but the first call for a geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from fastfi._ops import check_conv_gram, check_linear_gram
from fastfi.backends import triton_direct as direct
from fastfi.backends import triton_ghost as ghost_
from fastfi.backends.triton_parts import add_parts, device_of
from fastfi.backends.triton_plan import Plan, plan, power_of_two
from fastfi.convolution import Geometry, patches

__all__ = ["WORK_BYTES", "conv_gram", "linear_gram"]

# Of one launch's partial sums and positions' products S.
WORK_BYTES = 256 << 20

# From this number of elements on, offsets inside a sample are 64 bits wide.
WIDE_OFFSETS = 1 << 31


class _Layer(NamedTuple):
    """Inputs x [batch, groups * channels, pixels] and each of the rows' cotangents d [batch, groups
    * outputs, positions], by strides in elements; ``at`` int32 [positions, taps], or None where
    patch t is pixel t."""

    x: Tensor
    x_stride: tuple[int, int, int]
    at: Tensor | None
    d: list[Tensor]
    d_stride: tuple[int, int, int]
    batch: int
    groups: int
    channels: int
    taps: int
    positions: int
    outputs: int


def _merged(t: Tensor) -> tuple[int, int, int] | None:
    """The strides of t [B, C, *sizes] as [B, C, size], if it has them: 0 where a size is 1."""
    sizes, strides = t.shape[2:], t.stride()[2:]
    last, span = 0, -1  # of an expanded dimension the span is 0, which is no reason to merge it
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        if size == 1:
            continue
        if span >= 0 and stride != span:
            return None
        last, span = stride if span < 0 else last, stride * size
    first = [0 if n == 1 else s for n, s in zip(t.shape[:2], t.stride()[:2], strict=True)]
    return first[0], first[1], last


def _alike(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, int, int]]:
    """Tensors [B, C, *sizes] and the strides of [B, C, size] that all of them have; copies where
    they have none in common."""
    strides = {_merged(t) for t in tensors}
    common = strides.pop()
    if len(strides) == 0 and common is not None:
        return list(tensors), common
    shape = tensors[0].shape
    size = shape[2:].numel()
    return [t.contiguous() for t in tensors], (shape[1] * size, size, 1)


def _to_device(t: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


@lru_cache(maxsize=16)
def _widest(device: torch.device) -> int:
    """The most lines of a tile: 128 take as many KiB of shared memory where a GPU has no fast
    float64 tensor cores (all but A100's and H100's kind), and those have 99."""
    if device.type != "cuda":
        return 128
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return 128 if shared["max_shared_mem"] >= 160 << 10 else 64


@lru_cache(maxsize=256)
def _patches_on(g: Geometry, spatial: tuple[int, ...], device: torch.device) -> Tensor:
    """The pixel under each tap of each patch, or -1: int32 [T, taps]. Kept for calls on any
    stream, so it is there, not on its way, when this returns."""
    return patches(g, spatial).to(device)


@lru_cache(maxsize=256)
def _only_patch(g: Geometry, spatial: tuple[int, ...], device: torch.device) -> Tensor:
    """The pixels of a layer's only patch, without those beyond the border: int64 [pixels]."""
    at = patches(g, spatial)[0].long()
    return at[at >= 0].to(device)


def _work(x: Tensor, d: torch.dtype, allow_tf32: bool) -> tuple[torch.dtype, str]:
    """The type that numbers are multiplied in, and the dot product's precision."""
    if x.dtype == d == torch.float16 or (x.dtype == d == torch.bfloat16 and x.is_cuda):
        return d, "ieee"  # Triton's interpreter, for CPU tensors, multiplies no bfloat16
    wide = torch.promote_types(torch.promote_types(x.dtype, d), torch.float32)
    if wide == torch.float32 and allow_tf32:
        return wide, "tf32x3"
    return torch.float64 if direct.DOUBLE else wide, "ieee"


def _gram(layer: _Layer, ghost: bool, allow_tf32: bool) -> Tensor:
    """N [B, n, n] float64, a chunk of samples at a time."""
    batch, n = layer.batch, len(layer.d)
    columns = layer.channels * layer.taps
    device = layer.x.device
    if 0 in (batch, layer.groups * columns, layer.groups * layer.outputs, layer.positions):
        return torch.zeros(batch, n, n, dtype=torch.float64, device=device)
    of = ghost_.COLUMNS if ghost else direct.COLUMNS
    length = layer.positions if ghost else columns
    p = plan(n, layer.groups, layer.outputs, layer.positions, length, of, _widest(device))
    inner = layer.groups * layer.positions**2 if ghost else 0  # numbers of S
    if ghost and _by_pixels(layer):
        inner += layer.groups * layer.x.shape[2:].numel() ** 2
    table = _to_device(torch.tensor([t.data_ptr() for t in layer.d]), device)  # [n]
    out = torch.empty(batch, n, n, dtype=torch.float64, device=device)
    size = max(1, min(batch, WORK_BYTES // (8 * (inner + p.parts * n * n))))
    with device_of(layer.x):
        for first in range(0, batch, size):
            part = out[first : first + size]  # [b, n, n]
            sums = part
            if p.parts > 1:
                sums = out.new_empty(len(part), p.parts, n, n)
            if ghost:
                _launch_ghost(layer, p, table, first, sums)
            else:
                _launch_direct(layer, p, table, first, sums, allow_tf32)
            if p.parts > 1:
                add_parts(sums, part)
    return out


def _shared(p: Plan, layer: _Layer) -> tuple[dict[str, int], dict[str, Any]]:
    """Arguments that both ways' kernels have: numbers, and constants of the compilation."""
    names = ("d_sample", "d_output", "d_position")
    numbers = {
        **dict(zip(names, layer.d_stride, strict=True)),
        "group_chunk": p.group_chunk,
        "output_chunk": p.output_chunk,
        "column_chunk": p.column_chunk,
        "output_parts": p.output_parts,
        "column_parts": p.column_parts,
        "parts": p.parts,
    }
    single = p.width // p.rows == 1
    size = p.width if single else power_of_two(p.rows, 1, 128)
    return numbers, {"ROWS": p.rows, "WIDTH": p.width, "SIZE": size, "BD": p.tile}


def _offset(layer: _Layer) -> Any:
    """The integers that hold what is added to the addresses of a sample, group and output."""
    _, channel, pixel = layer.x_stride
    pixels = layer.x.shape[2:].numel()
    farthest = max(
        (layer.channels - 1) * channel + (pixels - 1) * pixel,
        (layer.positions - 1) * layer.d_stride[2],
        max(layer.positions, pixels) ** 2,  # S and the pixels' products
    )
    return direct.OFFSETS[farthest >= WIDE_OFFSETS]


def _pairs(blocks: int) -> list[tuple[int, bool]]:
    """Launches over blocks of rows: how many pairs, and whether of different blocks."""
    return [(blocks, False)] + [(blocks * (blocks - 1) // 2, True)] * (blocks > 1)


def _launch_direct(
    layer: _Layer, p: Plan, table: Tensor, first: int, sums: Tensor, allow_tf32: bool
) -> None:
    """sums: float64 [b, parts, n, n] or [b, n, n], samples from ``first`` on."""
    work, precision = _work(layer.x, layer.d[0].dtype, allow_tf32)
    numbers, constants = _shared(p, layer)
    for pairs, different in _pairs(p.blocks):
        direct.direct_kernel[(len(sums) * p.parts * pairs,)](
            layer.x, layer.x if layer.at is None else layer.at, table, layer.d[0], sums,
            first, layer.groups, layer.channels, layer.taps, layer.positions, layer.outputs,
            len(layer.d), *layer.x_stride, pairs=pairs, **numbers, **constants,
            BT=power_of_two(layer.positions, 16, direct.POSITIONS[work.itemsize]),
            LINEAR=layer.at is None, PAIRS=different, OFFSET=_offset(layer),
            WORK=direct.TYPES[str(work)], PRECISION=precision, enable_fp_fusion=True,
            num_warps=direct.WARPS[p.width], num_stages=direct.STAGES,
        )  # fmt: skip


def _by_pixels(layer: _Layer) -> bool:
    """Whether S is taken from the products of all pixels, each computed once for all taps: where
    those are fewer by far."""
    pixels = layer.x.shape[2:].numel()
    return layer.at is not None and 2 * pixels**2 <= layer.taps * layer.positions**2


def _positions_products(layer: _Layer, first: int, batch: int) -> Tensor:
    """S [b, groups, positions, positions] float64 of the samples from ``first`` on."""
    options: dict[str, Any] = {
        "OFFSET": _offset(layer),
        "num_warps": ghost_.PRODUCTS_WARPS,
        "num_stages": ghost_.STAGES,
        "enable_fp_fusion": True,
    }

    def launch(kernel: Any, out: Tensor, *arguments: Any, **constants: Any) -> None:
        tile = power_of_two(out.shape[2], 16, ghost_.POSITIONS)
        tiles = -(-out.shape[2] // tile)
        grid = (batch * layer.groups * (tiles * (tiles + 1) // 2),)
        kernel[grid](*arguments, BT=tile, **constants, **options)

    def products(at: Tensor | None, taps: int, positions: int) -> Tensor:
        shape = (batch, layer.groups, positions, positions)
        out = layer.x.new_empty(shape, dtype=torch.float64)
        launch(
            ghost_.products_kernel, out, layer.x, layer.x if at is None else at, out, first,
            layer.groups, layer.channels, taps, positions, *layer.x_stride, LINEAR=at is None,
            BD=ghost_.INNER,
        )  # fmt: skip
        return out

    if not _by_pixels(layer):
        return products(layer.at, layer.taps, layer.positions)
    pixels = layer.x.shape[2:].numel()
    every = products(None, 1, pixels)  # [b, groups, pixels, pixels]
    out = every.new_empty(batch, layer.groups, layer.positions, layer.positions)
    launch(ghost_.patch_products_kernel, out, every, layer.at, out, layer.taps, layer.positions,
           pixels)  # fmt: skip
    return out


def _launch_ghost(layer: _Layer, p: Plan, table: Tensor, first: int, sums: Tensor) -> None:
    """The same, with S of these samples in between."""
    batch, positions = len(sums), layer.positions
    products = _positions_products(layer, first, batch)
    numbers, constants = _shared(p, layer)
    for pairs, different in _pairs(p.blocks):
        ghost_.contract_kernel[(batch * p.parts * pairs,)](
            products, table, layer.d[0], sums, first, layer.groups, positions, layer.outputs,
            len(layer.d), pairs=pairs, **numbers, **constants, PAIRS=different,
            BT=ghost_.STEP, OFFSET=_offset(layer), enable_fp_fusion=True,
            num_warps=ghost_.WARPS[p.width], num_stages=ghost_.STAGES,
        )  # fmt: skip


def _rank_one(a: Tensor, d: Sequence[Tensor]) -> Tensor:
    """N of gradients d_r a^T, with a [B, D] and each of d [B, O]."""
    length = torch.ops.fastfi.gram(a[:, None])  # [B, 1, 1]
    return torch.ops.fastfi.gram(torch.stack(list(d), 1)) * length


def linear_gram(a: Tensor, d: Sequence[Tensor], ghost: bool, *, allow_tf32: bool = False) -> Tensor:
    """N [B, n, n] float64, ``N_rs = <d_r^T a, d_s^T a>``.

    Args:
        a: inputs [B, T, D].
        d: cotangents of the outputs, [B, T, O] for each of n rows.
        ghost: which of the two ways.
        allow_tf32: float32 products of the direct way by three TF32 products each, which keep
            about 21 of 24 bits; the default is IEEE float32. (One TF32 product keeps 10 bits, too
            few for ranks; it is not offered.)
    """
    check_linear_gram(a, d)
    batch, positions, inputs = a.shape
    if positions == 1:
        return _rank_one(a[:, 0], [t[:, 0] for t in d])
    rows, d_stride = _alike([t.mT for t in d])
    (x,), x_stride = _alike([a.mT])
    layer = _Layer(x, x_stride, None, rows, d_stride, batch, 1, inputs, 1, positions,
                   d[0].shape[2])  # fmt: skip
    return _gram(layer, ghost, allow_tf32)


def conv_gram(
    x: Tensor,
    d: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    ghost: bool,
    *,
    allow_tf32: bool = False,
) -> Tensor:
    """The same for a convolution's weight.

    Args:
        x: inputs [B, C, *spatial].
        d: cotangents of the outputs, [B, O, *positions] for each of n rows.
        ghost, allow_tf32: as of :func:`linear_gram`.
    """
    check_conv_gram(x, d, kernel, stride, padding, dilation, groups)
    g = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    spatial, positions = tuple(x.shape[2:]), d[0].shape[2:].numel()
    if positions == 1 and groups == 1:
        inside = _only_patch(g, spatial, x.device)
        return _rank_one(x.flatten(2).index_select(2, inside).flatten(1), [t.flatten(1) for t in d])
    (x,), x_stride = _alike([x])
    rows, d_stride = _alike(d)
    at = None if g.pointwise else _patches_on(g._replace(groups=1), spatial, x.device)
    layer = _Layer(x, x_stride, at, rows, d_stride, len(x), groups, x.shape[1] // groups,
                   torch.Size(kernel).numel(), positions, d[0].shape[1] // groups)  # fmt: skip
    return _gram(layer, ghost, allow_tf32)
