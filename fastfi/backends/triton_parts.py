"""Partial sums of several programs, added in a fixed order; and the device that launches go to."""

# Kernels are no typed Python.
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["accumulate_parts", "add_parts", "device_of"]


@triton.jit(do_not_specialize=["count", "size"])
def accumulate_parts(parts, out, count, size, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sums parts [samples, count, size] -> out [samples, size] in a fixed order, whatever the
    number of samples. One program for each sample and block of columns."""
    blocks = tl.cdiv(size, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, STEP):
        part = first + tl.arange(0, STEP)
        at = parts + (sample * count + part)[:, None] * size + column[None, :]
        inside = (part < count)[:, None] & (column < size)[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    tl.store(out + sample * size + column, total, mask=column < size)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """Sums parts [..., count, n, n] -> out [..., n, n], float64, on the current device."""
    count, size = parts.shape[-3], parts.shape[-2:].numel()
    block = max(16, min(256, triton.next_power_of_2(size)))
    grid = (out.numel() // size * triton.cdiv(size, block),)
    accumulate_parts[grid](parts, out, count, size, BLOCK=block, STEP=8, enable_fp_fusion=True)


def device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The current device is the tensor's, for launches. The interpreter's tensors have none."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
