"""Ghost: ``S = a a^T``, then ``N_rs = <S d_r, d_s>`` tile by tile; everything in float64."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fastfi.backends.triton_packing import block_pair, cotangents, fold, packed_rows, patches

__all__ = ["COLUMNS", "INNER", "POSITIONS", "PRODUCTS_WARPS", "STAGES", "STEP", "WARPS"]
__all__ += ["contract_kernel", "patch_products_kernel", "products_kernel"]

# Tile sizes, found by compiling as in triton_direct. Of S: positions along both sides, and inputs
# of a step.
POSITIONS, INNER, PRODUCTS_WARPS = 32, 16, 4
# Of the contraction: positions of a tile of H, by its lines, and of a step.
COLUMNS, STEP = {16: 32, 32: 32, 64: 32, 128: 16}, 16
WARPS, STAGES = {16: 4, 32: 4, 64: 8, 128: 8}, 2


@triton.jit
def lower_tile(positions, BT: tl.constexpr):
    """A program's sample and group, and the positions along both sides of its tile of S."""
    tiles = tl.cdiv(positions, BT)
    pairs = tiles * (tiles + 1) // 2
    pair = tl.program_id(0) % pairs
    i = pair * 0
    while (i + 1) * (i + 2) // 2 <= pair:
        i += 1
    j = pair - i * (i + 1) // 2
    block = (tl.program_id(0) // pairs).to(tl.int64)
    return block, i * BT + tl.arange(0, BT), j * BT + tl.arange(0, BT)


@triton.jit
def mirror(s, out, positions, t, u):
    """Writes the part of a tile s [BT, BT] on and below the diagonal, and its mirror image."""
    t, u = t.to(tl.int64)[:, None], u.to(tl.int64)[None, :]
    inside = (t < positions) & (u < positions)
    tl.store(out + t * positions + u, s, mask=inside & (t >= u))
    tl.store(out + u * positions + t, s, mask=inside & (t > u))


@triton.jit(
    do_not_specialize=["sample_first", "groups", "channels", "taps", "positions", "x_sample"]
)
def products_kernel(
    x, at, out,
    sample_first, groups, channels, taps, positions, x_sample, x_channel, x_pixel,
    LINEAR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """S of one sample and group, one tile on or below the diagonal and its mirror image.

    Arguments as of ``direct_kernel``; out: float64 [samples from sample_first on, groups,
    positions, positions].
    """
    block, t, u = lower_tile(positions, BT)
    columns = channels * taps
    own = x + (sample_first + block // groups) * x_sample + block % groups * channels * x_channel
    s = tl.zeros([BT, BT], tl.float64)
    for first in range(0, columns, BD):
        column = first + tl.arange(0, BD)
        left = patches(own, at, t, positions, column, columns, taps, x_channel, x_pixel,
                       LINEAR, OFFSET, tl.float64)  # fmt: skip
        right = patches(own, at, u, positions, column, columns, taps, x_channel, x_pixel,
                        LINEAR, OFFSET, tl.float64)  # fmt: skip
        s = tl.dot(left, tl.trans(right), s, out_dtype=tl.float64)
    mirror(s, out + block * positions * positions, positions, t, u)


@triton.jit(do_not_specialize=["taps", "positions", "pixels"])
def patch_products_kernel(
    products, at, out, taps, positions, pixels, BT: tl.constexpr, OFFSET: tl.constexpr
):
    """The same from the products of all pixels [samples, groups, pixels, pixels]: sums, over taps,
    of those under two patches."""
    block, t, u = lower_tile(positions, BT)
    own = products + block * pixels * pixels
    s = tl.zeros([BT, BT], tl.float64)
    for tap in range(taps):
        p = tl.load(at + t * taps + tap, mask=t < positions, other=-1)
        q = tl.load(at + u * taps + tap, mask=u < positions, other=-1)
        from_ = own + (p.to(OFFSET)[:, None] * pixels + q[None, :])
        s += tl.load(from_, mask=(p >= 0)[:, None] & (q >= 0)[None, :], other=0.0)
    mirror(s, out + block * positions * positions, positions, t, u)


@triton.jit(
    do_not_specialize=[
        "sample_first", "groups", "positions", "outputs", "n", "d_sample", "pairs", "group_chunk",
        "output_chunk", "column_chunk", "output_parts", "column_parts", "parts",
    ],
    do_not_specialize_on_alignment=["d_output", "d_position"],
)  # fmt: skip
def contract_kernel(
    s, table, d_like, out,
    sample_first, groups, positions, outputs, n, d_sample, d_output, d_position,
    pairs, group_chunk, output_chunk, column_chunk, output_parts, column_parts, parts,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, PAIRS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One part of the sums of one sample and one pair of blocks of rows, from its S.

    Arguments as of ``direct_kernel``; the columns of a tile of H are BD positions.
    """
    pid = tl.program_id(0)
    part = pid % parts
    pair = pid // parts % pairs
    local = (pid // parts // pairs).to(tl.int64)
    sample = sample_first + local
    i, j = block_pair(pair, PAIRS)
    column_part = part % column_parts
    output_part = part // column_parts % output_parts
    group_first = (part // column_parts // output_parts * group_chunk).to(tl.int64)
    tile_first = column_part * column_chunk
    tile_end = min(tile_first + column_chunk, tl.cdiv(positions, BD))
    steps = min(output_chunk, tl.cdiv(outputs, WIDTH // ROWS) - output_part * output_chunk)
    gram = tl.zeros([WIDTH, WIDTH], tl.float64)
    for number in range(min(group_chunk, groups - group_first)):
        group = group_first + number
        own = s + (local * groups + group) * positions * positions
        for step in range(steps):
            output_first = (output_part * output_chunk + step) * (WIDTH // ROWS)
            row, output, valid = packed_rows(i * ROWS, n, output_first, outputs, ROWS, WIDTH)
            offset = sample * d_sample + (group * outputs + output) * d_output
            lines = tl.load(table + row, mask=valid, other=0).to(d_like.dtype) + offset
            lines2, valid2 = lines, valid
            if PAIRS:
                row2, _, valid2 = packed_rows(j * ROWS, n, output_first, outputs, ROWS, WIDTH)
                lines2 = tl.load(table + row2, mask=valid2, other=0).to(d_like.dtype) + offset
            for tile in range(tile_first, tile_end):
                u = tile * BD + tl.arange(0, BD)
                h = tl.zeros([WIDTH, BD], tl.float64)
                for first in range(0, positions, BT):
                    t = first + tl.arange(0, BT)
                    inside = (t < positions)[:, None] & (u < positions)[None, :]
                    at = t.to(OFFSET)[:, None] * positions + u[None, :]
                    inner = tl.load(own + at, mask=inside, other=0.0)
                    d = cotangents(lines, valid, t, positions, d_position, OFFSET, tl.float64)
                    h = tl.dot(d, inner, h, out_dtype=tl.float64)
                # What is infinite, times the zeros beyond positions and outputs, is NaN.
                h = tl.where((u < positions)[None, :] & valid[:, None], h, 0.0)
                d = cotangents(lines2, valid2, u, positions, d_position, OFFSET, tl.float64)
                gram = tl.dot(h, tl.trans(d), gram, out_dtype=tl.float64)
    out += (local * parts + part) * n * n
    fold(gram, out, i * ROWS, j * ROWS, n, ROWS, WIDTH, SIZE)
