"""The layers' operators against float64: both ways, types, layouts, and IEEE precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.gpu_compare import EPS32, EPS64, Worst, call, gram_error, relative
from bench.gpu_problems import ConvShape, layer_inputs
from bench.gpu_report import Run
from fastfi.backends import blas

__all__ = ["CONVOLUTIONS", "channel_sums", "conv_gram", "linear_gram"]


def _shape(
    channels: int,
    outputs: int,
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> ConvShape:
    dims = len(spatial)
    out = tuple(
        (s + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for s, k in zip(spatial, kernel, strict=True)
    )
    return ConvShape(channels, outputs, tuple(spatial), tuple(kernel), (stride,) * dims,
                     (padding,) * dims, (dilation,) * dims, groups, out)  # fmt: skip


CONVOLUTIONS = [
    _shape(5, 7, (4, 4), (1, 1)), _shape(6, 9, (2, 2), (3, 3), padding=1),
    _shape(3, 41, (8, 8), (3, 3), padding=1), _shape(4, 6, (9, 5), (3, 2), 2, 1, groups=2),
    _shape(2, 4, (9, 9), (2, 3), dilation=3, padding=2), _shape(6, 6, (5, 5), (3, 3), groups=6),
    _shape(3, 4, (40,), (5,), padding=2), _shape(2, 3, (3, 4, 5), (2, 1, 3), padding=1),
    _shape(70, 66, (4, 4), (1, 1), 2), _shape(8, 16, (3, 3), (3, 3)),
    _shape(3, 64, (32, 32), (7, 7), 2, 3), _shape(64, 64, (8, 8), (3, 3), padding=1),
    _shape(512, 512, (1, 1), (3, 3), padding=1), _shape(256, 1024, (2, 2), (1, 1)),
    _shape(64, 128, (16, 16), (3, 3), 2, 1),
]  # fmt: skip


def _layer_bound(ghost: bool, dtype: torch.dtype, positions: int, inputs: int) -> float:
    """Ghost products, and all of float64's, are float64 sums of T D terms; direct ones are float32
    sums over T, whose errors grow as sqrt(T)."""
    if ghost or dtype == torch.float64:
        return 64 * EPS64 * (positions + inputs)
    return 8 * EPS32 * (positions + 1) ** 0.5


_LAYER_KINDS = [(9, torch.float32), (9, torch.float64), (9, torch.bfloat16), (1, torch.float32),
                (20, torch.float32)]  # fmt: skip


def _differences(gram: Tensor) -> Tensor:
    """The squared length of row 0 minus row 1, relative to nothing: [B]."""
    return gram[:, 0, 0] - 2 * gram[:, 0, 1] + gram[:, 1, 1]


def _nearly_equal(d: list[Tensor]) -> list[Tensor]:
    """Two rows that differ by 2^-12: TF32, which rounds at 2^-11, takes them for the same or
    doubles the difference."""
    return [d[0], d[0] + 2.0**-12 * d[1]]


def conv_gram(run: Run, worst: Worst, g: torch.Generator) -> None:
    for number, shape in enumerate(CONVOLUTIONS[:10] if run.small else CONVOLUTIONS):
        positions = torch.Size(shape.positions).numel()
        inputs = shape.channels // shape.groups * torch.Size(shape.kernel).numel()
        for n, dtype in _LAYER_KINDS if number < 5 else _LAYER_KINDS[:1]:
            for ghost in (True, False):
                x, d = layer_inputs(shape, 3, n, dtype, g)
                want = blas.conv_gram(x.double(), [t.double() for t in d], *shape.form, False)
                (got,) = call("conv_gram", run.device, x, d, *shape.form, ghost)
                bound = _layer_bound(ghost, dtype, positions, inputs)
                case = f"{shape.title()}, n = {n}, {dtype}, {'ghost' if ghost else 'direct'}"
                gram_error(worst, case, got, want, bound)
                run.check_time()
        if len(shape.spatial) == 2:
            x, d = layer_inputs(shape, 3, 9, torch.float32, g)
            last = [t.to(memory_format=torch.channels_last) for t in (x, *d)]
            want = blas.conv_gram(x.double(), [t.double() for t in d], *shape.form, False)
            (got,) = call("conv_gram", run.device, last[0], last[1:], *shape.form, False)
            bound = _layer_bound(False, torch.float32, positions, inputs)
            gram_error(worst, f"{shape.title()}, channels last", got, want, bound)
        x, d = layer_inputs(shape, 3, 2, torch.float32, g)
        d = _nearly_equal(d)
        want = blas.conv_gram(x.double(), [t.double() for t in d], *shape.form, True)
        (got,) = call("conv_gram", run.device, x, d, *shape.form, False)
        error = float(relative(_differences(got), _differences(want)).max())
        worst.add(f"{shape.title()}, rows that differ by 2^-12, direct", error, 0.1)


def linear_gram(run: Run, worst: Worst, g: torch.Generator) -> None:
    shapes = [(3, 1, 40, 10), (3, 2, 3, 5), (2, 17, 6, 30), (2, 70, 33, 65), (5, 64, 5, 9)]
    shapes += [] if run.small else [(4, 1, 2048, 1000), (2, 197, 192, 768), (2, 65, 768, 96)]
    for number, (batch, positions, inputs, outputs) in enumerate(shapes):
        for n, dtype in _LAYER_KINDS if number < 3 else _LAYER_KINDS[:1]:
            for ghost in (True, False):
                a = torch.randn(batch, positions, inputs, generator=g).to(dtype)
                size = (batch, positions, outputs)
                d = [torch.randn(size, generator=g).to(dtype) for _ in range(n)]
                want = blas.linear_gram(a.double(), [t.double() for t in d], False)
                (got,) = call("linear_gram", run.device, a, d, ghost)
                case = f"T, D, O = {positions}, {inputs}, {outputs}, n = {n}, {dtype}, "
                bound = _layer_bound(ghost, dtype, positions, inputs)
                gram_error(worst, case + ("ghost" if ghost else "direct"), got, want, bound)
                run.check_time()


def channel_sums(run: Run, worst: Worst, g: torch.Generator) -> None:
    sizes = [(3, 5), (1, 1), (64, 64), (7, 1025), (2048, 1), (33, 16)]
    for dtype in (torch.float32, torch.float64):
        for count in (1, 3, 6):
            d, factor = (
                [torch.randn(4, c, t, generator=g).to(dtype) for c, t in sizes[:count]]
                for _ in range(2)
            )
            want = blas.channel_sums([t.double() for t in d], [t.double() for t in factor])
            size = blas.channel_sums(
                [t.double().abs() for t in d], [t.double().abs() for t in factor]
            )
            (got,) = call("channel_sums", run.device, d, factor)
            if got.dtype != dtype or got.shape != want.shape:
                worst.add(f"{got.dtype} {list(got.shape)}", torch.inf, 1.0)
                continue
            error = ((got.double() - want).abs() / size).nan_to_num(nan=torch.inf)
            longest = max(t for _, t in sizes[:count])
            # Any order of summation of random numbers: sqrt(T) roundings of the sum's size.
            bound = float(torch.finfo(dtype).eps) * (4 + longest**0.5)
            worst.add(f"{count} pairs, {dtype}", float(error.max()), bound)
