"""The compiled CPU kernels for layers, and where matrix products of torch (BLAS) are faster.

Measured on two cores: the fused ghost kernel is faster wherever the positions' S stays in the
caches; direct products of large layers are BLAS's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi import _C  # type: ignore[attr-defined]
from fastfi._ops import check_channel_sums, check_conv_gram, check_linear_gram
from fastfi.backends import blas
from fastfi.convolution import Geometry, patches

__all__ = ["channel_sums", "conv_gram", "linear_gram"]

# The largest S, and the largest matrix of pixels' products, that the ghost kernel takes: beyond
# them it leaves the second-level cache.
MOST_POSITIONS, MOST_PIXELS = 256, 576


def _narrow(t: Tensor) -> Tensor:
    """As the kernels read it: float32 or float64."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _ghost(
    x: Tensor,
    x_stride: Sequence[int],
    shape: Sequence[int],
    patches: Tensor,
    d: Sequence[Tensor],
    d_stride: Sequence[int],
    outputs: int,
    isa: str,
) -> Tensor:
    """shape: samples, groups, channels of a group, pixels."""
    out = x.new_empty(shape[0], len(d), len(d), dtype=torch.float64)
    _C.ghost(
        x.data_ptr(),
        x.dtype == torch.float64,
        list(shape),
        list(x_stride),
        patches.data_ptr(),
        *patches.shape,
        [t.data_ptr() for t in d],
        d[0].dtype == torch.float64,
        outputs,
        list(d_stride),
        out.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return out


def linear_gram(a: Tensor, d: Sequence[Tensor], ghost: bool, *, isa: str = "") -> Tensor:
    """See :func:`blas.linear_gram`."""
    check_linear_gram(a, d)
    batch, positions, inputs = a.shape
    if not ghost or positions == 1 or positions > MOST_POSITIONS or a.numel() == 0:
        return blas.linear_gram(a, d, ghost)
    a, rows = _narrow(a).contiguous(), [_narrow(t).contiguous() for t in d]
    outputs = d[0].shape[2]
    patches = torch.arange(positions, dtype=torch.int32)[:, None].contiguous()
    return _ghost(a, (positions * inputs, 1, inputs), (batch, 1, inputs, positions), patches, rows,
                  (positions * outputs, 1, outputs), outputs, isa)  # fmt: skip


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
    isa: str = "",
) -> Tensor:
    """See :func:`blas.conv_gram`."""
    check_conv_gram(x, d, kernel, stride, padding, dilation, groups)
    g = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    positions, pixels = d[0].shape[2:].numel(), x.shape[2:].numel()
    taps = torch.Size(kernel).numel()
    small = positions <= MOST_POSITIONS and (taps == 1 or pixels <= MOST_PIXELS)
    if not ghost or not small or positions == 1 or x.numel() == 0:
        return blas.conv_gram(x, d, kernel, stride, padding, dilation, groups, ghost)
    x, rows = _narrow(x).contiguous(), [_narrow(t).contiguous() for t in d]
    channels, outputs = x.shape[1], d[0].shape[1]
    shape = (len(x), groups, channels // groups, pixels)
    return _ghost(x, (channels * pixels, pixels, 1), shape, patches(g, tuple(x.shape[2:])), rows,
                  (outputs * positions, positions, 1), outputs // groups, isa)  # fmt: skip


def channel_sums(d: Sequence[Tensor], factor: Sequence[Tensor], *, isa: str = "") -> Tensor:
    """See :func:`blas.channel_sums`; summed in float64."""
    check_channel_sums(d, factor)
    d, factor = [t.contiguous() for t in d], [f.contiguous() for f in factor]
    channels = [t.shape[1] for t in d]
    out = d[0].new_empty(d[0].shape[0], 2 * sum(channels))
    _C.channel_sums(
        [t.data_ptr() for t in d],
        [f.data_ptr() for f in factor],
        channels,
        [t.shape[2] for t in d],
        d[0].dtype == torch.float64,
        d[0].shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return out
