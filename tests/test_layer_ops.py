"""``linear_gram`` and ``conv_gram``, Gram matrices of per-sample weight gradients, by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def linear_gram(a: Tensor, d: Tensor, ghost: bool) -> Tensor:
    """The operator, with its rows d [B, n, T, O] as one tensor."""
    return torch.ops.fastfi.linear_gram(a, [*d.unbind(1)], ghost)


def conv_gram(x: Tensor, d: Tensor, *options: Any) -> Tensor:
    """The same: d [B, n, O, *positions]."""
    return torch.ops.fastfi.conv_gram(x, [*d.unbind(1)], *options)


def epsilon(dtype: torch.dtype) -> float:
    """What products and sums may round at: float64's for float64, float32's for shorter types,
    whose own numbers are exact in it."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-23


def assert_gram(got: Tensor, rows: Tensor, terms: int, dtype: torch.dtype) -> None:
    """``got`` is the Gram matrix of rows [B, n, p] (float64), up to rounding.

    The sums have ``terms`` positions and p products. Each order of summation errs by at most its
    number of terms times epsilon times the sum of magnitudes, which Cauchy and Schwarz bound by the
    rows' lengths; terms partly cancel in a row, by no more than sqrt(terms) for random numbers.
    """
    batch, n, p = rows.shape
    assert got.shape == (batch, n, n) and got.dtype == torch.float64
    want = rows @ rows.mT
    length = want.diagonal(dim1=1, dim2=2).sqrt()
    scale = length[:, :, None] * length[:, None, :] + 1e-300
    bound = 20 * epsilon(dtype) * (terms * terms**0.5 + p**0.5)
    assert bool(((got - want).abs() <= bound * scale).all())
    # symmetric, and its diagonal not negative: to the last bit or to the same bound
    assert bool(((got - got.mT).abs() <= bound * scale).all())
    assert bool((got.diagonal(dim1=1, dim2=2) >= 0).all())


def linear_rows(a: Tensor, d: Tensor) -> Tensor:
    """Weight gradients of F.linear, by autograd, one sample and one cotangent at a time: [B, n,
    O * D] float64."""
    a, d = a.double(), d.double()
    weight = torch.zeros(d.shape[3], a.shape[2], dtype=torch.float64, requires_grad=True)
    rows = []
    for one, cotangents in zip(a, d, strict=True):
        z = F.linear(one, weight)
        rows += [torch.autograd.grad(z, weight, c, retain_graph=True)[0] for c in cotangents]
    return torch.stack(rows).reshape(d.shape[0], d.shape[1], -1)


Geometry = tuple[list[int], list[int], list[int], list[int], int]


def conv_rows(x: Tensor, d: Tensor, geometry: Geometry) -> Tensor:
    """The same of a convolution: [B, n, O * C / groups * kernel] float64."""
    kernel, stride, padding, dilation, groups = geometry
    x, d = x.double(), d.double()
    shape = (d.shape[2], x.shape[1] // groups, *kernel)
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    rows = []
    for one, cotangents in zip(x, d, strict=True):
        conv = CONVOLUTIONS[len(kernel) - 1]
        z = conv(one[None], weight, None, stride, padding, dilation, groups)[0]
        rows += [torch.autograd.grad(z, weight, c, retain_graph=True)[0] for c in cotangents]
    return torch.stack(rows).reshape(d.shape[0], d.shape[1], -1)


def output_size(spatial: Sequence[int], geometry: Geometry) -> list[int]:
    kernel, stride, padding, dilation, _ = geometry
    return [
        (s + 2 * p - e * (k - 1) - 1) // t + 1
        for s, k, t, p, e in zip(spatial, kernel, stride, padding, dilation, strict=True)
    ]


def conv_arguments(
    dtype: torch.dtype,
    geometry: Geometry,
    spatial: Sequence[int],
    batch: int = 2,
    n: int = 3,
    channels: int = 4,
    outputs: int = 6,
) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, channels, *spatial).to(dtype)
    return x, torch.randn(batch, n, outputs, *output_size(spatial, geometry)).to(dtype)


GEOMETRIES: dict[str, tuple[Geometry, list[int]]] = {
    "pointwise": (([1, 1], [1, 1], [0, 0], [1, 1], 1), [4, 5]),
    "3x3": (([3, 3], [1, 1], [1, 1], [1, 1], 1), [5, 4]),
    "strided": (([3, 2], [2, 3], [1, 0], [1, 1], 1), [7, 8]),
    "dilated": (([2, 3], [1, 1], [2, 1], [3, 2], 1), [6, 7]),
    "grouped": (([3, 3], [1, 2], [1, 1], [1, 1], 2), [5, 6]),
    "patches": (([3, 3], [3, 3], [0, 0], [1, 1], 1), [7, 6]),
    "whole image": (([4, 3], [1, 1], [0, 0], [1, 1], 1), [4, 3]),
    "wide padding": (([2, 2], [1, 1], [3, 2], [1, 1], 1), [2, 3]),
    "1-d": (([3], [2], [1], [2], 2), [11]),
    "1-d long": (([5], [1], [2], [1], 1), [40]),
    "3-d": (([1, 3, 2], [1, 2, 1], [0, 1, 1], [1, 1, 2], 1), [3, 4, 5]),
    "3-d grouped": (([2, 2, 2], [1, 1, 1], [0, 0, 1], [1, 1, 1], 2), [2, 3, 4]),
}


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 4, 6), (3, 1, 7, 2, 5), (1, 9, 1, 1, 1), (2, 2, 40, 9, 3)]
)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, ghost: bool) -> None:
    """[B, T, D, n, O]; T = 1 is a layer on vectors."""
    batch, positions, fan_in, n, fan_out = shape
    a = torch.randn(batch, positions, fan_in).to(dtype)
    d = torch.randn(batch, n, positions, fan_out).to(dtype)
    got = linear_gram(a, d, ghost)
    assert_gram(got, linear_rows(a, d), positions, dtype)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_convolution(name: str, dtype: torch.dtype, ghost: bool) -> None:
    geometry, spatial = GEOMETRIES[name]
    x, d = conv_arguments(dtype, geometry, spatial)
    got = conv_gram(x, d, *geometry, ghost)
    assert_gram(got, conv_rows(x, d, geometry), d[0, 0, 0].numel(), dtype)


@pytest.mark.parametrize("ghost", [False, True])
def test_depthwise(ghost: bool) -> None:
    """groups = C, also with two outputs for each channel."""
    geometry: Geometry = ([3, 3], [2, 1], [1, 1], [1, 1], 6)
    for outputs in (6, 12):
        x, d = conv_arguments(torch.float64, geometry, [5, 4], channels=6, outputs=outputs)
        got = conv_gram(x, d, *geometry, ghost)
        assert_gram(got, conv_rows(x, d, geometry), d[0, 0, 0].numel(), torch.float64)


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 9)] * 3),
    dtype=st.sampled_from(DTYPES),
    ghost=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_sizes(sizes: tuple[int, ...], dtype: torch.dtype, ghost: bool, seed: int) -> None:
    torch.manual_seed(seed)
    batch, n, positions, fan_in, fan_out = sizes
    a = torch.randn(batch, positions, fan_in).to(dtype)
    d = torch.randn(batch, n, positions, fan_out).to(dtype)
    got = linear_gram(a, d, ghost)
    # One to some positions may cancel by more than sqrt(T): the magnitudes' Gram is the scale.
    rows, upper = linear_rows(a, d), linear_rows(a.abs(), d.abs())
    bound = 20 * epsilon(dtype) * (positions + fan_in * fan_out) * (upper @ upper.mT)
    assert bool(((got - rows @ rows.mT).abs() <= bound).all())


@given(
    axes=st.lists(
        st.tuples(
            *[st.integers(1, 3)] * 2, st.integers(0, 2), st.integers(1, 2), st.integers(0, 4)
        ),
        min_size=1,
        max_size=3,
    ),
    groups=st.sampled_from([1, 2]),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    n=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    ghost=st.booleans(),
)
def test_convolution_sizes(
    axes: list[tuple[int, ...]],
    groups: int,
    widths: tuple[int, int],
    n: int,
    dtype: torch.dtype,
    ghost: bool,
) -> None:
    """Kernel, stride, padding and dilation of each axis, and a size that leaves an output."""
    torch.manual_seed(len(axes))
    kernel, stride, padding, dilation, extra = (list(v) for v in zip(*axes, strict=True))
    geometry: Geometry = (kernel, stride, padding, dilation, groups)
    spatial = [
        max(1, e * (k - 1) + 1 - 2 * p) + more
        for k, p, e, more in zip(kernel, padding, dilation, extra, strict=True)
    ]
    channels, outputs = groups * widths[0], groups * widths[1]
    x, d = conv_arguments(dtype, geometry, spatial, 2, n, channels, outputs)
    got = conv_gram(x, d, *geometry, ghost)
    rows, upper = conv_rows(x, d, geometry), conv_rows(x.abs(), d.abs(), geometry)
    terms = d[0, 0, 0].numel() + rows.shape[2]
    bound = 20 * epsilon(dtype) * terms * (upper @ upper.mT)
    assert got.dtype == torch.float64
    assert bool(((got - rows @ rows.mT).abs() <= bound).all())


def test_the_two_ways_agree_and_leave_their_arguments_alone() -> None:
    geometry, spatial = GEOMETRIES["grouped"]
    x, d = conv_arguments(torch.float64, geometry, spatial)
    a, c = torch.randn(2, 5, 4).double(), torch.randn(2, 3, 5, 6).double()
    before = [t.clone() for t in (x, d, a, c)]
    conv = [conv_gram(x, d, *geometry, ghost) for ghost in (False, True)]
    linear = [linear_gram(a, c, ghost) for ghost in (False, True)]
    torch.testing.assert_close(conv[0], conv[1], rtol=0.0, atol=1e-11 * float(conv[0].max()))
    torch.testing.assert_close(linear[0], linear[1], rtol=0.0, atol=1e-12 * float(linear[0].max()))
    assert all(torch.equal(t, b) for t, b in zip((x, d, a, c), before, strict=True))


def test_a_pointwise_convolution_is_a_linear_layer() -> None:
    geometry, spatial = GEOMETRIES["pointwise"]
    x, d = conv_arguments(torch.float64, geometry, spatial)
    a, c = x.flatten(2).mT, d.flatten(3).mT
    for ghost in (False, True):
        got = conv_gram(x, d, *geometry, ghost)
        want = linear_gram(a, c, ghost)
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-12 * float(want.max()))


@pytest.mark.parametrize("ghost", [False, True])
def test_layouts(ghost: bool) -> None:
    """Strided views, channels-last images, and cotangents that are expanded."""
    geometry, spatial = GEOMETRIES["3x3"]
    x, d = conv_arguments(torch.float64, geometry, spatial)
    want = conv_gram(x, d, *geometry, ghost)
    last = x.contiguous(memory_format=torch.channels_last)
    turned = d.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    got = conv_gram(last, turned, *geometry, ghost)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    a, c = torch.randn(5, 2, 4).double(), torch.randn(2, 1, 5, 6).double().expand(2, 3, 5, 6)
    want = linear_gram(a.transpose(0, 1).contiguous(), c.contiguous(), ghost)
    got = linear_gram(a.transpose(0, 1), c, ghost)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, ghost: bool) -> None:
    for batch in (2, 0):
        a, d = torch.randn(batch, 5, 3).to(dtype), torch.randn(batch, 2, 5, 4).to(dtype)
        torch.library.opcheck(torch.ops.fastfi.linear_gram.default, (a, [*d.unbind(1)], ghost))
    geometry, spatial = GEOMETRIES["grouped"]
    x, d = conv_arguments(dtype, geometry, spatial)
    arguments = (x, [*d.unbind(1)], *geometry, ghost)
    torch.library.opcheck(torch.ops.fastfi.conv_gram.default, arguments)


def test_fake_and_meta_tensors() -> None:
    geometry, spatial = GEOMETRIES["strided"]
    x, d = conv_arguments(torch.float32, geometry, spatial)
    a, c = torch.randn(2, 5, 3), torch.randn(2, 4, 5, 6)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, d, a, c)]
        conv = conv_gram(*fake[:2], *geometry, False)
        linear = linear_gram(*fake[2:], True)
    assert conv.shape == (2, 3, 3) and linear.shape == (2, 4, 4)
    assert conv.dtype == linear.dtype == torch.float64
    meta = linear_gram(a.to("meta"), c.to("meta"), False)
    assert meta.device.type == "meta" and meta.shape == (2, 4, 4)
    assert {"linear_gram", "conv_gram"} <= set(fastfi.backends())


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


@pytest.mark.parametrize(
    ("a", "d"),
    [
        (ones(2, 3), ones(2, 4, 3, 5)),
        (ones(2, 3, 4), ones(2, 3, 5)),
        (ones(2, 3, 4), ones(2, 1, 2, 5)),  # another T
        (ones(2, 3, 4), ones(3, 1, 3, 5)),  # another B
        (ones(2, 3, 4, dtype=torch.int64), ones(2, 1, 3, 5)),
        (ones(2, 3, 4), ones(2, 1, 3, 5, dtype=torch.int64)),
        (ones(2, 3, 4), ones(2, 1, 3, 5, device="meta")),
    ],
)
def test_linear_refuses(a: Tensor, d: Tensor) -> None:
    for ghost in (False, True):
        with pytest.raises(ValueError, match="linear_gram"):
            linear_gram(a, d, ghost)


FINE: tuple[Any, ...] = (ones(2, 4, 5, 5), ones(2, 3, 6, 5, 5), [3, 3], [1, 1], [1, 1], [1, 1], 2)
BAD_CONVOLUTIONS = {
    "x without channels": (0, ones(2, 5, 5)),
    "x of another batch": (0, ones(3, 4, 5, 5)),
    "x of other sizes": (0, ones(2, 4, 9, 5)),
    "x of integers": (0, ones(2, 4, 5, 5, dtype=torch.int64)),
    "channels not a multiple of groups": (0, ones(2, 3, 5, 5)),
    "outputs not a multiple of groups": (1, ones(2, 3, 5, 5, 5)),
    "d of other sizes": (1, ones(2, 3, 6, 4, 5)),
    "d without rows": (1, ones(2, 6, 5, 5)),
    "a kernel of one number": (2, [3]),
    "a kernel of zero": (2, [3, 0]),
    "a stride of zero": (3, [0, 1]),
    "a stride of three numbers": (3, [1, 1, 1]),
    "a padding below zero": (4, [-1, 1]),
    "a dilation of zero": (5, [1, 0]),
    "no groups": (6, 0),
}


@pytest.mark.parametrize("case", list(BAD_CONVOLUTIONS))
def test_convolution_refuses(case: str) -> None:
    conv_gram(*FINE, False)
    at, value = BAD_CONVOLUTIONS[case]
    for ghost in (False, True):
        with pytest.raises(ValueError, match="conv_gram"):
            conv_gram(*FINE[:at], value, *FINE[at + 1 :], ghost)
