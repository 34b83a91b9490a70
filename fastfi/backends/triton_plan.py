"""How a layer's Gram matrix is split into tiles, and the tiles among programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["MOST_ROWS", "PARTS", "PART_BYTES", "Plan", "plan", "power_of_two"]

# Programs for each sample, where its layer has so many tiles, and the largest size of their
# results.
PARTS, PART_BYTES = 32, 1 << 20
# The rows of one block; more are taken in pairs of blocks, whose gradients are formed anew.
MOST_ROWS = 128


def power_of_two(size: int, least: int, most: int) -> int:
    """The power of two that holds ``size``, between the two limits, powers of two themselves."""
    return max(least, min(most, 1 << (max(1, size) - 1).bit_length()))


class Plan(NamedTuple):
    """How one sample's work is split; it follows from the layer's shape and never from the batch,
    so that a sample's sums are always taken in the same order.

    Attributes:
        rows, width: lines of a block of rows, and of a packed tile.
        blocks: of rows.
        tile: columns of a tile.
        group_chunk, output_chunk, column_chunk: groups, tiles of outputs and tiles of columns that
            one program takes.
        output_parts, column_parts: programs along these two dimensions.
        parts: programs for each sample and pair of blocks.
    """

    rows: int
    width: int
    blocks: int
    tile: int
    group_chunk: int
    output_chunk: int
    column_chunk: int
    output_parts: int
    column_parts: int
    parts: int


def _width(n: int, outputs: int, terms: int, widest: int) -> int:
    """Lines of a tile: the fewest operations, counting the padding, the product that is folded, and
    the other factor's tile, which is loaded anew for each of them."""
    widths = [w for w in ((16, 32, 64) if n <= 32 else (64, 128)) if n <= w <= widest]

    def cost(width: int) -> int:
        return -(-outputs // (width // n)) * (terms * (width + 16) + width * width)

    return min(widths, key=cost)


def plan(
    n: int,
    groups: int,
    outputs: int,
    terms: int,
    columns: int,
    tiles: Mapping[int, int],
    widest: int = MOST_ROWS,
) -> Plan:
    """Splits ``groups`` times [n * outputs, columns] numbers, each a sum of ``terms`` products.
    ``tiles`` are the most columns of a tile, by its lines; ``widest`` the most lines, 64 or 128."""
    blocks = -(-n // min(MOST_ROWS, widest))
    rows = -(-n // blocks)
    width = _width(rows, outputs, terms, widest)
    tile = power_of_two(columns, 16, tiles[width])
    most = max(1, min(PARTS, PART_BYTES // (8 * n * n)))

    def split(total: int, wanted: int) -> tuple[int, int]:
        chunk = -(-total // max(1, min(total, wanted)))
        return chunk, -(-total // chunk)

    output_chunk, output_parts = split(-(-outputs // (width // rows)), most)
    group_chunk, group_parts = split(groups, most // output_parts)
    column_chunk, column_parts = split(-(-columns // tile), most // output_parts // group_parts)
    parts = group_parts * output_parts * column_parts
    return Plan(rows, width, blocks, tile, group_chunk, output_chunk, column_chunk,
                output_parts, column_parts, parts)  # fmt: skip
