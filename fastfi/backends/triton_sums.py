"""Per-channel sums in Triton: all pairs of a backward pass in one launch.

A table on the device says where each pair lies. A program takes some rows (of a sample and channel)
of one pair, in blocks whose width suits the pair's T, so that neither a long row nor a thousand
rows of one number leave threads idle.
"""

# Kernels are no typed Python.
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfi._ops import check_channel_sums
from fastfi.backends.triton_parts import device_of

__all__ = ["channel_sums"]

_BLOCK = 512  # numbers of a block: 16 bytes of float32 for each of 128 threads
_LEAST = 2048  # numbers of a program: finding its pair takes as long as reading a block
_KINDS = 5  # widths 1, 4, 16, 64, 256: the least that holds T, or the last, in several turns


@triton.jit
def _rows(
    d, factor, out, block, blocks, rows, channels, length, stride,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sums of rows of d and factor [rows, length * UNIT], BLOCK // WIDTH rows a block."""
    HEIGHT: tl.constexpr = BLOCK // WIDTH
    t = tl.arange(0, WIDTH)[None, :]
    # A block's columns fit 32 bits.
    at = tl.arange(0, HEIGHT)[:, None] * (length.to(tl.int32) * UNIT) + t
    for first in range(block * HEIGHT, tl.minimum((block + blocks) * HEIGHT, rows), HEIGHT):
        row = first + tl.arange(0, HEIGHT)
        start = first * length * UNIT
        products = tl.zeros((HEIGHT, WIDTH), tl.float64)
        plain = tl.zeros((HEIGHT, WIDTH), tl.float64)
        for turn in range(0, length * UNIT, WIDTH):
            # UNIT numbers are inside or outside together, and loaded at once.
            left = tl.minimum(length * UNIT - turn, WIDTH).to(tl.int32)
            mask = (row < rows)[:, None] & (t // UNIT * UNIT < left)
            a = tl.load(d + start + at, mask=mask, other=0.0).to(tl.float64)
            b = tl.load(factor + start + at, mask=mask, other=0.0).to(tl.float64)
            products = tl.fma(a, b, products)
            plain += a
            start += WIDTH
        here = out + row // channels * stride + row % channels
        tl.store(here, tl.sum(products, 1), mask=row < rows)
        tl.store(here + channels, tl.sum(plain, 1), mask=row < rows)


@triton.jit(do_not_specialize=["batch", "stride", "pairs"])
def _channel_sums(
    table, out, batch, stride, pairs,
    PAIRS: tl.constexpr, TYPE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    KINDS: tl.constexpr,
):  # fmt: skip
    """Some blocks of one pair.

    Args:
        table: int64 [8, pairs]: first program; addresses of d and of its factor [batch, C, T], both
            multiples of 16; C, T, first output column, kind, blocks of a program.
        out: [batch, stride].
        PAIRS: a power of 2, not below pairs.
        TYPE, VECTOR: of d, and how many of them 16 bytes hold.
    """
    program = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PAIRS)
    # The last pair that begins here or before.
    begins = tl.load(table + every, mask=every < pairs, other=program + 1)
    table += tl.sum((begins <= program).to(tl.int32)) - 1
    d = tl.multiple_of(tl.load(table + pairs).to(tl.pointer_type(TYPE)), 16)
    factor = tl.multiple_of(tl.load(table + 2 * pairs).to(tl.pointer_type(TYPE)), 16)
    channels = tl.load(table + 3 * pairs)
    length = tl.load(table + 4 * pairs)
    out += tl.load(table + 5 * pairs)
    kind = tl.load(table + 6 * pairs)
    blocks = tl.load(table + 7 * pairs)
    block = (program - tl.load(table)) * blocks
    rows = batch.to(tl.int64) * channels
    for k in tl.static_range(KINDS):
        if kind == k:
            _rows(d, factor, out, block, blocks, rows, channels, length, stride, BLOCK, 4**k, 1)
    for k in tl.static_range(1, KINDS):
        if kind == KINDS + k:
            length //= VECTOR
            _rows(
                d, factor, out, block, blocks, rows, channels, length, stride, BLOCK, 4**k, VECTOR
            )


@lru_cache(maxsize=256)
def _layout(batch: int, shapes: tuple[tuple[int, int], ...], vector: int) -> tuple[Tensor, int]:
    """The table [8, pairs] but for the addresses, and the number of programs."""
    columns = []
    programs, output = 0, 0
    for channels, length in shapes:
        kind = next((k for k in range(_KINDS) if 4**k >= length), _KINDS - 1)
        height, turns = _BLOCK // 4**kind, triton.cdiv(length, 4**kind)
        blocks = max(1, _LEAST // (_BLOCK * max(1, turns)))
        if kind > 0 and length % vector == 0:
            kind += _KINDS
        columns.append((programs, 0, 0, channels, length, output, kind, blocks))
        programs += triton.cdiv(batch * channels, height * blocks)
        output += 2 * channels
    return torch.tensor(columns, dtype=torch.int64).mT.contiguous(), programs


def _readable(t: Tensor) -> Tensor:
    """Contiguous, from an address that loads of 16 bytes may begin at."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def channel_sums(d: Sequence[Tensor], factor: Sequence[Tensor]) -> Tensor:
    """Sums over T of d * factor, and of d, for pairs [B, C, T]: [B, 2 * sum of C]; see
    :func:`blas.channel_sums`. Summed in float64, rounded once.

    Raises:
        ValueError: the pairs do not match.
    """
    check_channel_sums(d, factor)
    batch = len(d[0])
    d, factor = [_readable(t) for t in d], [_readable(t) for t in factor]
    shapes = tuple((t.shape[1], t.shape[2]) for t in d)
    out = d[0].new_empty(batch, 2 * sum(channels for channels, _ in shapes))
    if out.numel() == 0:
        return out
    layout, programs = _layout(batch, shapes, 16 // out.element_size())
    # From pinned memory the copy waits for nothing, and nothing waits for it.
    table = torch.empty(layout.shape, dtype=torch.int64, pin_memory=out.is_cuda)
    table.copy_(layout)
    table[1:3] = torch.tensor([[t.data_ptr() for t in ts] for ts in (d, factor)])
    with device_of(out):
        _channel_sums[(programs,)](
            table.to(out.device, non_blocking=True), out, batch, out.shape[1], len(d),
            PAIRS=triton.next_power_of_2(len(d)),
            TYPE=tl.float32 if out.dtype == torch.float32 else tl.float64,
            VECTOR=16 // out.element_size(), BLOCK=_BLOCK, KINDS=_KINDS, enable_fp_fusion=True,
        )  # fmt: skip
    return out
