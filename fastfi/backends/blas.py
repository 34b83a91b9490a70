"""Gram matrices of a layer's per-sample weight gradients, by matrix products of torch.

``W_r = d_r^T a`` is the gradient of a linear map's weight for cotangent r. Two ways to
``N_rs = <W_r, W_s>``, both without more than a tile of the W_r:

* direct: W_r in the activations' precision, tile by tile, then its Gram matrix in float64;
* ghost: ``S = a a^T``, ``H_r = S d_r``, ``N_rs = <H_r, d_s>``, all in float64: products of float32
  numbers summed in float32 would lose half of the digits of N, and with them small singular values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi._ops import check_conv_gram, check_linear_gram
from fastfi.convolution import Geometry, unfold

__all__ = ["conv_gram", "linear_gram"]

# Temporaries of one step: large enough for efficient products, small enough for the caches.
WORK_BYTES = 8 << 20


def _ghost(a: Tensor, d: Tensor) -> Tensor:
    a = a.double()
    s = a @ a.mT  # [B, T, T]
    batch, n, positions, outputs = d.shape
    if d.stride(2) == 1:  # positions side by side, as convolutions have them
        rows = d.mT.double().reshape(batch, n * outputs, positions)
        h = rows @ s
    else:
        rows = d.double().contiguous()
        h = s[:, None] @ rows
    return h.reshape(batch, n, -1) @ rows.reshape(batch, n, -1).mT


def _direct(a: Tensor, d: Tensor) -> Tensor:
    precision = torch.promote_types(torch.promote_types(a.dtype, d.dtype), torch.float32)
    a, rows = a.to(precision), d.mT.to(precision)  # [B, T, D], [B, n, O, T]
    batch, n, outputs, _ = rows.shape
    each = batch * n * a.shape[2] * a.element_size()
    tile = max(1, min(outputs, WORK_BYTES // max(1, each)))
    out = a.new_zeros(batch, n, n, dtype=torch.float64)
    for first in range(0, outputs, tile):
        part = rows[:, :, first : first + tile]
        w = part.flatten(1, 2) @ a  # [B, n * tile, D]
        out += torch.ops.fastfi.gram(w.view(batch, n, -1))
    return out


def _steps(batch: int, bytes_each: int) -> Sequence[slice]:
    size = max(1, min(batch, WORK_BYTES // max(1, bytes_each)))
    return [slice(first, first + size) for first in range(0, batch, size)]


def linear_gram(a: Tensor, d: Tensor, ghost: bool) -> Tensor:
    """N [B, n, n] float64, ``N_rs = <d_r^T a, d_s^T a>``.

    Args:
        a: inputs [B, T, D].
        d: cotangents of the outputs [B, n, T, O].
        ghost: which of the two ways.
    """
    check_linear_gram(a, d)
    batch, n, positions, outputs = d.shape
    if positions == 1:  # W_r has rank one
        length = a.double().square().sum((1, 2))
        return torch.ops.fastfi.gram(d[:, :, 0]) * length[:, None, None]
    if ghost:
        each = 8 * (positions * (a.shape[2] + positions) + 2 * n * positions * outputs)
    else:
        each = a.element_size() * (
            positions * (a.shape[2] + n * outputs) + n * outputs * a.shape[2]
        )
    way = _ghost if ghost else _direct
    parts = [way(a[part], d[part]) for part in _steps(batch, each)]
    return torch.cat(parts) if parts else d.new_zeros(0, n, n, dtype=torch.float64)


def conv_gram(
    x: Tensor,
    d: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    ghost: bool,
) -> Tensor:
    """The same for a convolution's weight.

    Args:
        x: inputs [B, C, *spatial].
        d: cotangents of the outputs [B, n, O, *positions].
        ghost: which of the two ways.
    """
    check_conv_gram(x, d, kernel, stride, padding, dilation, groups)
    g = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    batch, n = d.shape[:2]
    positions = d.shape[3:].numel()
    each = x.element_size() * x.shape[1] * torch.Size(kernel).numel() * positions
    out = d.new_zeros(batch, n, n, dtype=torch.float64)
    for part in _steps(batch, each):
        columns = unfold(x[part], g).unflatten(1, (groups, -1))  # [b, g, D, T]
        a = columns.flatten(0, 1).mT  # [b * g, T, D]
        rows = d[part].flatten(3).unflatten(2, (groups, -1))  # [b, n, g, O, T]
        rows = rows.transpose(1, 2).flatten(0, 1).mT  # [b * g, n, T, O]
        out[part] = linear_gram(a, rows, ghost).unflatten(0, (-1, groups)).sum(1)
    return out
