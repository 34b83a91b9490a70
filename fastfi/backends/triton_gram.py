"""Gram matrices in Triton: products summed in float64, one reading of the rows.

Few rows (R <= :data:`MOST_ROWS`): a program reads a run of columns of all R rows, every thread
keeps its own R (R + 1) / 2 partial sums in registers, and they meet once, at the end. A float64
matrix product would have to pad R to 16 and be bound by arithmetic. More rows: tiles of the R x R
matrix by float64 matrix products, on and below the diagonal.

Long runs are cut into parts, as many as p and R say and never the batch: a sample's matrix has the
same bits alone and in any batch.
"""

# Kernels are no typed Python; neither does triton know (*a, b).
# mypy: disable-error-code="no-untyped-def,import-untyped,assignment,var-annotated"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfi._ops import check_gram, check_segments
from fastfi.backends.triton_parts import add_parts, device_of

__all__ = ["CHUNK", "MOST_ROWS", "gram", "segment_gram"]

# The most rows whose sums fit a thread's registers: 78 sums of two registers for 12.
MOST_ROWS = 12
_WIDE_ROWS = 10  # the most that leave registers for loads of 16 bytes
CHUNK = 4096  # columns of a program, at most, while there are fewer than _PROGRAMS
_PROGRAMS = 512  # of one sample's segment: parts times tiles of R x R
# Of the kernel for few rows. One warp: its threads' sums meet without shared memory, and once for
# all of its columns, while other programs of the same multiprocessor load.
_WARPS = 1


@triton.jit
def _run(
    offsets, segment, offset_stride, groups, columns, splits, part,
    STEP: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """The columns [first, last) of one part of one segment; offsets are clamped to the row."""
    first = columns * 0
    last = columns
    if OFFSETS:
        at = offsets + (segment // groups) * offset_stride + segment % groups
        first = tl.minimum(tl.maximum(tl.load(at), 0), columns)
        last = tl.minimum(tl.maximum(tl.load(at + 1), first), columns)
    length = (last - first + splits - 1) // splits
    length = (length + STEP - 1) // STEP * STEP
    first = tl.minimum(first + part * length, last)
    return first, tl.minimum(first + length, last)


@triton.jit
def _load(
    at, start, remaining,
    LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """LANES * VEC columns from ``at``, 0 before ``start`` and from ``remaining`` on.

    UNIT = VEC: as [LANES, VEC], a thread's columns in one load of up to 16 bytes; the mask asks for
    whole vectors, and what they hold beside the run goes afterwards. UNIT = 1, where a row may
    begin anywhere: VEC times [LANES].
    """
    remaining = tl.minimum(remaining, LANES * VEC).to(tl.int32)
    if UNIT > 1:
        lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        out = tl.load(at + lane, mask=lane // UNIT * UNIT < remaining, other=0.0)
        if OFFSETS:
            out = tl.where((lane >= start) & (lane < remaining), out, 0.0)
    else:
        out = ()
        for c in tl.static_range(VEC):
            lane = c * LANES + tl.arange(0, LANES)
            out = out + (tl.load(at + lane, mask=lane < remaining, other=0.0),)
    return out


@triton.jit
def _vectors(x, VEC: tl.constexpr, UNIT: tl.constexpr):
    """What was loaded, as VEC times [LANES] in float64. No data moves: a thread holds its own."""
    if UNIT == 4:
        x = tl.reshape(x.to(tl.float64), (x.shape[0], 2, 2))
        even, odd = tl.split(x)
        a, c = tl.split(even)
        b, d = tl.split(odd)
        out = (a, b, c, d)
    elif UNIT == 2:
        a, b = tl.split(x.to(tl.float64))
        out = (a, b)
    else:
        out = ()
        for c in tl.static_range(VEC):
            out = out + (x[c].to(tl.float64),)
    return out


@triton.jit
def _beside(sums, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """sums[FIRST], sums[FIRST + STEP], ... side by side, [LANES, COUNT]; zeros past the end."""
    if COUNT == 1:
        out = sums[FIRST] if len(sums) > FIRST else tl.zeros_like(sums[0])
    else:
        left = _beside(sums, FIRST, 2 * STEP, COUNT // 2)
        right = _beside(sums, FIRST + STEP, 2 * STEP, COUNT // 2)
        out = tl.reshape(tl.join(left, right), (sums[0].shape[0], COUNT))
    return out


@triton.jit(do_not_specialize=["units", "groups", "offset_stride", "splits"])
def _few_rows(
    rows, offsets, out, units, groups, offset_stride, splits,
    R: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """rows [B, R, units * UNIT] -> out [B * groups, splits, R, R], one program for each of the
    B * groups * splits."""
    STEP: tl.constexpr = LANES * VEC
    SUMS: tl.constexpr = R * (R + 1) // 2
    program = tl.program_id(0).to(tl.int64)
    segment = program // splits
    columns = units.to(tl.int64) * UNIT
    first, last = _run(
        offsets, segment, offset_stride, groups, columns, splits, program % splits, STEP, OFFSETS
    )
    begin = first // UNIT * UNIT
    base = rows + segment // groups * R * columns + begin
    left = last - begin
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros((LANES,), tl.float64),)
    # What the next turn multiplies is loaded in this one.
    ahead = ()
    for r in tl.static_range(R):
        at = base + r * columns
        ahead = ahead + (_load(at, first - begin, left, LANES, VEC, UNIT, OFFSETS),)
    for _ in range(0, last - begin, STEP):
        x = ()
        for r in tl.static_range(R):
            x = x + (_vectors(ahead[r], VEC, UNIT),)
        base += STEP
        left -= STEP
        ahead = ()
        for r in tl.static_range(R):
            ahead = ahead + (_load(base + r * columns, 0, left, LANES, VEC, UNIT, OFFSETS),)
        summed = ()
        for i in tl.static_range(R):
            for j in tl.static_range(i + 1):
                s = sums[i * (i + 1) // 2 + j]
                for c in tl.static_range(VEC):
                    s = tl.fma(x[i][c], x[j][c], s)
                summed = summed + (s,)
        sums = summed
    # 16 at a time through shared memory, row by row of the lower triangle.
    for at in tl.static_range(0, SUMS, 16):
        entry = at + tl.arange(0, 16)
        i = tl.zeros((16,), tl.int32)
        for r in tl.static_range(1, R):
            i += (entry >= r * (r + 1) // 2).to(tl.int32)
        j = entry - i * (i + 1) // 2
        total = tl.sum(_beside(sums, at, 1, 16), 0)
        here = out + program * (R * R)
        tl.store(here + i * R + j, total, mask=entry < SUMS)
        tl.store(here + j * R + i, total, mask=entry < SUMS)


@triton.jit(do_not_specialize=["units", "count", "groups", "offset_stride", "splits"])
def _many_rows(
    rows, offsets, out, units, count, groups, offset_stride, splits,
    UNIT: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """rows [B, count, units * UNIT] -> out [B * groups, splits, count, count], one program for each
    of the B * groups * splits times a tile [SIDE, SIDE]."""
    side = (count + SIDE - 1) // SIDE
    tile = tl.program_id(0) % (side * side)
    above, right = tile // side, tile % side
    if right <= above:
        program = (tl.program_id(0) // (side * side)).to(tl.int64)
        segment = program // splits
        columns = units.to(tl.int64) * UNIT
        first, last = _run(
            offsets, segment, offset_stride, groups, columns, splits, program % splits, STEP,
            OFFSETS,
        )  # fmt: skip
        begin = first // UNIT * UNIT
        i = (above * SIDE + tl.arange(0, SIDE)).to(tl.int64)
        j = (right * SIDE + tl.arange(0, SIDE)).to(tl.int64)
        lane = tl.arange(0, STEP)[None, :]
        base = rows + segment // groups * count * columns + begin
        in_i, in_j = (i < count)[:, None], (j < count)[:, None]
        at_i, at_j = base + i[:, None] * columns + lane, base + j[:, None] * columns + lane
        total = tl.zeros((SIDE, SIDE), tl.float64)
        for at in range(0, last - begin, STEP):
            live = lane // UNIT * UNIT < last - begin - at
            a = tl.load(at_i + at, mask=in_i & live, other=0.0)
            b = tl.load(at_j + at, mask=in_j & live, other=0.0)
            if OFFSETS:
                live = (lane >= first - begin - at) & (lane < last - begin - at)
                a, b = tl.where(live, a, 0.0), tl.where(live, b, 0.0)
            a, b = a.to(tl.float64), tl.trans(b.to(tl.float64))
            total = tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float64)
        # Rows past the end are zeros here, and 0 * inf stays outside of what is stored. On the
        # diagonal both triangles are written from the lower one.
        inside = in_i & tl.trans(in_j) & (i[:, None] >= j[None, :])
        here = out + program * count * count
        tl.store(here + i[:, None] * count + j[None, :], total, mask=inside)
        tl.store(here + j[None, :] * count + i[:, None], total, mask=inside)


def _gram(rows: Tensor, offsets: Tensor | None) -> Tensor:
    """[B, G, R, R]"""
    batch, count, columns = rows.shape
    groups = 1 if offsets is None else offsets.shape[1] - 1
    out = rows.new_empty((batch, groups, count, count), dtype=torch.float64)
    if out.numel() == 0:
        return out
    few = count <= MOST_ROWS
    if not few and rows.element_size() == 2:
        rows = rows.float()  # exact; triton 3.6 cannot make float64 operands of half types
    rows = rows.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    stride = 0 if offsets is None or len(offsets) == 1 else groups + 1
    vector = 2 if rows.dtype == torch.float64 else 4  # 16 bytes, 8 of the half types
    if few and count > _WIDE_ROWS:
        vector //= 2
    unit = vector if columns % vector == 0 else 1
    if unit > 1 and rows.data_ptr() % 16:
        # Not another unit: the order of summation must not depend on where a tensor begins.
        rows = rows.clone()
    side = 16 if count <= 16 else 32 if count <= 64 else 64
    tiles = 1 if few else triton.cdiv(count, side) ** 2
    splits = triton.cdiv(columns, groups * CHUNK)
    splits = max(1, min(splits, _PROGRAMS // tiles))
    parts = out if splits == 1 else out.new_empty((batch, groups, splits, count, count))
    grid = (batch * groups * splits * tiles,)
    with device_of(rows):
        if few:
            _few_rows[grid](
                rows, offsets, parts, columns // unit, groups, stride, splits,
                R=count, VEC=vector, UNIT=unit, LANES=32 * _WARPS, OFFSETS=offsets is not None,
                num_warps=_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            _many_rows[grid](
                rows, offsets, parts, columns // unit, count, groups, stride, splits,
                UNIT=unit, SIDE=side, STEP=32, OFFSETS=offsets is not None,
                num_warps=4 if side < 64 else 8, enable_fp_fusion=True,
            )  # fmt: skip
        if splits > 1:
            add_parts(parts, out)
    return out


def gram(rows: Tensor) -> Tensor:
    """Gram matrices [B, R, R] float64 of rows [B, R, p]; see :func:`reference.gram`.

    Raises:
        ValueError: rows are not three-dimensional and floating-point.
    """
    check_gram(rows)
    return _gram(rows, None).squeeze(1)


def segment_gram(rows: Tensor, offsets: Tensor) -> Tensor:
    """Gram matrices [B, G, R, R]; see :func:`reference_windows.segment_gram`.

    The offsets' values stay on the device and are not checked. They are clamped to 0..p, and a
    segment that ends before it begins is empty, so that none of them reads outside of its rows.

    Raises:
        ValueError: rows or offsets are of other shapes or dtypes.
    """
    check_segments(rows, offsets)
    return _gram(rows, offsets)
