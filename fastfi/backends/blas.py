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

from fastfi._ops import check_channel_sums, check_conv_gram, check_linear_gram
from fastfi.convolution import Geometry, unfold

__all__ = ["WORK_BYTES", "channel_sums", "conv_gram", "linear_gram", "steps"]

# Temporaries of one step: large enough for efficient products, small enough for the caches.
WORK_BYTES = 8 << 20


def _ghost(a: Tensor, d: Tensor) -> Tensor:
    """a [b, T, D]; d [b, n, O, T]."""
    a = a.double()
    s = a @ a.mT  # [b, T, T]
    rows = d.double()
    h = rows.flatten(1, 2) @ s
    return h.view_as(rows).flatten(2) @ rows.flatten(2).mT


def _direct(a: Tensor, d: Tensor) -> Tensor:
    """a [b, T, D]; d [b, n, O, T]."""
    precision = torch.promote_types(torch.promote_types(a.dtype, d.dtype), torch.float32)
    if a.device.type == "cuda":
        precision = torch.float64  # float32 may mean TF32 there, three digits
    a, d = a.to(precision), d.to(precision)
    batch, n, outputs, _ = d.shape
    each = batch * n * a.shape[2] * a.element_size()
    tile = max(1, min(outputs, WORK_BYTES // max(1, each)))
    out = a.new_zeros(batch, n, n, dtype=torch.float64)
    for first in range(0, outputs, tile):
        part = d[:, :, first : first + tile]
        w = part.flatten(1, 2) @ a  # [b, n * tile, D]
        out += torch.ops.fastfi.gram(w.view(batch, n, -1))
    return out


def steps(batch: int, bytes_each: int) -> Sequence[slice]:
    """Slices of a batch whose temporaries fit :data:`WORK_BYTES`, at least one sample each."""
    size = max(1, min(batch, WORK_BYTES // max(1, bytes_each)))
    return [slice(first, first + size) for first in range(0, batch, size)]


def _bytes(a: Tensor, positions: int, inputs: int, n: int, outputs: int, ghost: bool) -> int:
    """Of one sample's temporaries."""
    if ghost:
        return 8 * (positions * (inputs + positions) + 2 * n * positions * outputs)
    return a.element_size() * (positions * (inputs + n * outputs) + n * outputs * inputs)


def linear_gram(a: Tensor, d: Sequence[Tensor], ghost: bool) -> Tensor:
    """N [B, n, n] float64, ``N_rs = <d_r^T a, d_s^T a>``.

    Args:
        a: inputs [B, T, D].
        d: cotangents of the outputs, [B, T, O] for each of n rows.
        ghost: which of the two ways.
    """
    check_linear_gram(a, d)
    batch, positions, outputs = d[0].shape
    n = len(d)
    out = a.new_empty(batch, n, n, dtype=torch.float64)
    way = _ghost if ghost else _direct
    for part in steps(batch, _bytes(a, positions, a.shape[2], n, outputs, ghost)):
        if positions == 1:  # W_r has rank one
            length = a[part].double().square().sum((1, 2))
            rows = torch.stack([t[part, 0] for t in d], 1)  # [b, n, O]
            out[part] = torch.ops.fastfi.gram(rows) * length[:, None, None]
        else:
            out[part] = way(a[part], torch.stack([t[part].mT for t in d], 1))
    return out


def conv_gram(
    x: Tensor,
    d: Sequence[Tensor],
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
        d: cotangents of the outputs, [B, O, *positions] for each of n rows.
        ghost: which of the two ways.
    """
    check_conv_gram(x, d, kernel, stride, padding, dilation, groups)
    g = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    n, batch = len(d), len(x)
    positions = d[0].shape[2:].numel()
    inputs, outputs = x.shape[1] * torch.Size(kernel).numel(), d[0].shape[1]
    out = x.new_empty(batch, n, n, dtype=torch.float64)
    way = _ghost if ghost else _direct
    for part in steps(batch, _bytes(x, positions, inputs, n, outputs, ghost)):
        columns = unfold(x[part], g).unflatten(1, (groups, -1))  # [b, g, D, T]
        a = columns.flatten(0, 1).mT  # [b * g, T, D]
        rows = torch.stack([t[part].flatten(2).unflatten(1, (groups, -1)) for t in d], 2)
        rows = rows.flatten(0, 1)  # [b * g, n, O, T]
        out[part] = way(a, rows).unflatten(0, (-1, groups)).sum(1)
    return out


def channel_sums(d: Sequence[Tensor], factor: Sequence[Tensor]) -> Tensor:
    """Sums over T of d * factor, and of d, for pairs of d and factor [B, C, T]: [B, 2 * sum of C],
    first the products' and then the plain ones of each pair."""
    check_channel_sums(d, factor)
    return torch.cat(
        [s for t, f in zip(d, factor, strict=True) for s in ((t * f).sum(2), t.sum(2))], 1
    )
