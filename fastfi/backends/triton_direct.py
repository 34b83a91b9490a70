"""Direct: tiles of the gradients ``W_r = d_r^T a`` of all rows at once, contracted where they are.

float32 products are IEEE float32 unless the caller asks otherwise; float16 and bfloat16 go to
tensor cores, where their products are exact, and float64 to float64's. Sums over positions are
float32 (float64 for float64), sums of products of gradients float64.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from fastfi.backends.triton_packing import block_pair, cotangents, fold, packed_rows, patches

__all__ = ["COLUMNS", "DOUBLE", "POSITIONS", "STAGES", "WARPS", "direct_kernel"]

# Tile sizes, found by compiling for sm_80 and sm_90 alone: hardly a spilled register up to 64
# lines, and at most 64 KiB of shared memory. Columns: inputs of a tile, by its lines.
COLUMNS = {16: 64, 32: 64, 64: 64, 128: 32}
# Positions of a step, by the bytes of a number as it is multiplied.
POSITIONS = {2: 32, 4: 16, 8: 16}
WARPS, STAGES = {16: 4, 32: 4, 64: 8, 128: 8}, 3
# Whether float32 is multiplied as float64, whose tensor cores are as fast as float32's units on
# A100 and H100.
DOUBLE = False

# What numbers are multiplied in, by the names of torch's types.
TYPES = {
    "torch.float16": tl.float16,
    "torch.bfloat16": tl.bfloat16,
    "torch.float32": tl.float32,
    "torch.float64": tl.float64,
}
# Of offsets inside a sample, by whether they may be large.
OFFSETS = {False: tl.int32, True: tl.int64}


# Only strides of 1 make other code, and x's multiples of 16 wider loads.
@triton.jit(
    do_not_specialize=[
        "sample_first", "groups", "channels", "taps", "positions", "outputs", "n", "x_sample",
        "d_sample", "pairs", "group_chunk", "output_chunk", "column_chunk", "output_parts",
        "column_parts", "parts",
    ],
    do_not_specialize_on_alignment=["d_output", "d_position"],
)  # fmt: skip
def direct_kernel(
    x, at, table, d_like, out,
    sample_first, groups, channels, taps, positions, outputs, n,
    x_sample, x_channel, x_pixel, d_sample, d_output, d_position,
    pairs, group_chunk, output_chunk, column_chunk, output_parts, column_parts, parts,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, LINEAR: tl.constexpr, PAIRS: tl.constexpr, OFFSET: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the sums of one sample and one pair of blocks of rows.

    Args:
        x: inputs, [samples, groups * channels, pixels] with strides in elements.
        at: int32 [positions, taps], pixels or -1 beyond the border; not read where LINEAR.
        table: int64 [n], addresses of the cotangents [samples, groups * outputs, positions];
            d_like is a pointer of their type.
        out: float64 [samples from sample_first on, parts, n, n].
        PAIRS: whether the pairs are those of different blocks, else of each block with itself.
    """
    SUM: tl.constexpr = tl.float64 if WORK.primitive_bitwidth == 64 else tl.float32
    pid = tl.program_id(0)
    part = pid % parts
    pair = pid // parts % pairs
    local = (pid // parts // pairs).to(tl.int64)
    sample = sample_first + local
    columns = channels * taps

    i, j = block_pair(pair, PAIRS)
    column_part = part % column_parts
    output_part = part // column_parts % output_parts
    group_first = (part // column_parts // output_parts * group_chunk).to(tl.int64)
    tile_first = column_part * column_chunk
    tile_end = min(tile_first + column_chunk, tl.cdiv(columns, BD))
    steps = min(output_chunk, tl.cdiv(outputs, WIDTH // ROWS) - output_part * output_chunk)
    gram = tl.zeros([WIDTH, WIDTH], tl.float64)
    for number in range(min(group_chunk, groups - group_first)):
        group = group_first + number
        own = x + sample * x_sample + group * channels * x_channel
        for step in range(steps):
            output_first = (output_part * output_chunk + step) * (WIDTH // ROWS)
            row, output, valid = packed_rows(i * ROWS, n, output_first, outputs, ROWS, WIDTH)
            offset = sample * d_sample + (group * outputs + output) * d_output
            lines = tl.load(table + row, mask=valid, other=0).to(d_like.dtype) + offset
            if PAIRS:
                row2, _, valid2 = packed_rows(j * ROWS, n, output_first, outputs, ROWS, WIDTH)
                lines2 = tl.load(table + row2, mask=valid2, other=0).to(d_like.dtype) + offset
            for tile in range(tile_first, tile_end):
                column = tile * BD + tl.arange(0, BD)
                w = tl.zeros([WIDTH, BD], SUM)
                if PAIRS:
                    w2 = tl.zeros([WIDTH, BD], SUM)
                for t in range(0, positions, BT):
                    position = t + tl.arange(0, BT)
                    a = patches(own, at, position, positions, column, columns, taps, x_channel,
                                x_pixel, LINEAR, OFFSET, WORK)  # fmt: skip
                    d = cotangents(lines, valid, position, positions, d_position, OFFSET, WORK)
                    w = tl.dot(d, a, w, input_precision=PRECISION, out_dtype=SUM)
                    if PAIRS:
                        d2 = cotangents(
                            lines2, valid2, position, positions, d_position, OFFSET, WORK
                        )
                        w2 = tl.dot(d2, a, w2, input_precision=PRECISION, out_dtype=SUM)
                # What is infinite, times the zeros beyond columns and outputs, is NaN.
                inside = (column < columns)[None, :]
                left = tl.where(inside & valid[:, None], w, 0.0).to(tl.float64)
                if PAIRS:
                    right = tl.where(inside & valid2[:, None], w2, 0.0).to(tl.float64)
                else:
                    right = left
                gram = tl.dot(left, tl.trans(right), gram, out_dtype=tl.float64)
    out += (local * parts + part) * n * n
    fold(gram, out, i * ROWS, j * ROWS, n, ROWS, WIDTH, SIZE)
