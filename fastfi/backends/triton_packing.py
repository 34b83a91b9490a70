"""How the Triton kernels for layers lay out rows, outputs and positions in tiles.

Both ways to a layer's Gram matrix are products whose left factor holds cotangents. Its rows are
packed: line ``m`` of a tile of ``WIDTH`` lines is row ``m % ROWS`` of output ``m // ROWS``, so that
nine rows fill 63 lines of 64, and one product serves all rows. A product of such a tile of
gradients with its own transpose, in float64, then has the wanted sums on the blocks of equal
outputs; it stays in registers over all tiles and is folded to [ROWS, ROWS] once, at the end.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["block_pair", "cotangents", "fold", "packed_rows", "patches"]


@triton.jit
def block_pair(pair, PAIRS: tl.constexpr):
    """The blocks of rows of a program: one with itself or, for PAIRS, i < j in the order (0, 1),
    (0, 2), (1, 2), (0, 3), ..."""
    i, j = pair, pair
    if PAIRS:
        j = pair * 0 + 1
        while j * (j + 1) // 2 <= pair:
            j += 1
        i = pair - j * (j - 1) // 2
    return i, j


@triton.jit
def packed_rows(first_row, n, first_output, outputs, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The row and the output of each line [WIDTH], and whether there are such."""
    m = tl.arange(0, WIDTH)
    row = first_row + m % ROWS
    output = first_output + m // ROWS
    valid = (m < WIDTH // ROWS * ROWS) & (row < n) & (output < outputs)
    return row, output, valid


@triton.jit
def widened(at, inside, always, WORK: tl.constexpr):
    """What is stored at the addresses, zero where not inside, as WORK."""
    if WORK.primitive_bitwidth == 64 and at.dtype.element_ty.primitive_bitwidth == 16:
        # Triton up to 3.6 chooses operands of a float64 product by the narrowest load that it finds
        # behind them, and fails for 16 bits; it does not look into a branch.
        tile = tl.zeros(at.shape, at.dtype.element_ty)
        if always > 0:
            tile = tl.load(at, mask=inside, other=0.0)
    else:
        tile = tl.load(at, mask=inside, other=0.0)
    return tile.to(WORK)


@triton.jit
def cotangents(lines, valid, position, positions, d_position, OFFSET: tl.constexpr,
               WORK: tl.constexpr):  # fmt: skip
    """A tile [WIDTH, BT] of cotangents, zero beyond them; ``lines`` [WIDTH] are addresses, and
    OFFSET the integers that hold what is added to them."""
    at = lines[:, None] + position.to(OFFSET)[None, :] * d_position
    inside = valid[:, None] & (position < positions)[None, :]
    return widened(at, inside, positions, WORK)


@triton.jit
def patches(x, at, position, positions, column, columns, taps, x_channel, x_pixel,
            LINEAR: tl.constexpr, OFFSET: tl.constexpr, WORK: tl.constexpr):  # fmt: skip
    """Inputs of patches, [BT, BD], zero beyond the border; ``column`` [BD] counts taps fastest.

    Where each patch is one pixel, in order (LINEAR), no table ``at`` is read.
    """
    inside = (position < positions)[:, None] & (column < columns)[None, :]
    if LINEAR:
        pixel, channel = position[:, None], column
    else:
        tap = position[:, None] * taps + (column % taps)[None, :]
        pixel, channel = tl.load(at + tap, mask=inside, other=-1), column // taps
        inside = pixel >= 0
    offset = pixel.to(OFFSET) * x_pixel + (channel.to(OFFSET) * x_channel)[None, :]
    return widened(x + offset, inside, positions, WORK)


@triton.jit
def fold(gram, out, first, second, n, ROWS: tl.constexpr, WIDTH: tl.constexpr,
         SIZE: tl.constexpr):  # fmt: skip
    """Sums the blocks of equal outputs of ``gram`` [WIDTH, WIDTH] float64, and writes them to out
    [n, n] for the rows from ``first`` on against those from ``second`` on, and mirrored.

    Beyond those blocks may be NaN, of numbers that are not finite: left out, not multiplied by
    zero. Lines that hold nothing are zero.
    """
    m = tl.arange(0, WIDTH)
    r = tl.arange(0, SIZE)
    if WIDTH // ROWS == 1:
        sums = gram  # SIZE is WIDTH
    else:
        same = (m // ROWS)[:, None] == (m // ROWS)[None, :]
        gram = tl.where(same, gram, 0.0)
        half = tl.zeros([WIDTH, SIZE], tl.float64)
        for s in range(ROWS):
            column = tl.sum(tl.where((m % ROWS == s)[None, :], gram, 0.0), axis=1)
            half = tl.where((r == s)[None, :], column[:, None], half)
        sums = tl.zeros([SIZE, SIZE], tl.float64)
        for s in range(ROWS):
            line = tl.sum(tl.where((m % ROWS == s)[:, None], half, 0.0), axis=0)
            sums = tl.where((r == s)[:, None], line[None, :], sums)
    i, j = first + r[:, None], second + r[None, :]
    wanted = (r < ROWS)[:, None] & (r < ROWS)[None, :] & (i < n) & (j < n) & (i <= j)
    tl.store(out + i * n + j, sums, mask=wanted)
    tl.store(out + j * n + i, sums, mask=wanted & (i < j))
