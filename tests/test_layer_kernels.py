"""The compiled kernels for layers: every instruction set, both ways, threads, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfi.backends import blas, cpu, cpu_layers
from fastfi.layers.planner import ghost_is_cheaper

ALL = cpu.instruction_sets()

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

# [kernel, stride, padding, dilation], channels, outputs, groups, spatial: T = 1, less and more than
# a vector, tails of every tile, patches of one pixel with and without a stride, clipped borders.
CASES = {
    "pointwise": (([1, 1], [1, 1], [0, 0], [1, 1]), 5, 7, 1, [4, 4]),
    "pointwise, strided": (([1, 1], [2, 3], [0, 0], [1, 1]), 70, 6, 1, [5, 8]),
    "pointwise, padded": (([1], [1], [2], [1]), 3, 5, 1, [3]),
    "2 x 2 positions": (([3, 3], [1, 1], [1, 1], [1, 1]), 6, 9, 1, [2, 2]),
    "3 x 3": (([3, 3], [1, 1], [1, 1], [1, 1]), 3, 41, 1, [8, 8]),
    "strided": (([3, 2], [2, 1], [1, 0], [1, 1]), 4, 6, 2, [9, 4]),
    "dilated": (([2, 3], [1, 2], [2, 1], [3, 1]), 2, 4, 2, [6, 7]),
    "depthwise": (([3, 3], [1, 1], [1, 1], [1, 1]), 6, 6, 6, [5, 5]),
    "a signal": (([5], [1], [2], [1]), 3, 4, 1, [40]),
    "a volume": (([2, 1, 3], [1, 2, 1], [1, 0, 1], [1, 1, 1]), 2, 3, 1, [3, 4, 5]),
    "a large kernel": (([7, 7], [1, 1], [3, 3], [1, 1]), 2, 3, 1, [5, 5]),
}


def definition(x: Tensor, d: list[Tensor], geometry: tuple, groups: int) -> Tensor:
    """Gram matrices of the weight's gradients, formed by autograd in float64."""
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    x, kernel = x.double(), geometry[0]
    weight = torch.zeros(d[0].shape[1], x.shape[1] // groups, *kernel).double().requires_grad_()
    out = []
    for b in range(len(x)):
        z = conv(x[b : b + 1], weight, None, *geometry[1:], groups)
        rows = [
            torch.autograd.grad(z, weight, t[b : b + 1].double(), retain_graph=True)[0] for t in d
        ]
        w = torch.stack(rows).flatten(1)
        out.append(w @ w.mT)
    return torch.stack(out)


def arguments(name: str, dtype: torch.dtype, n: int, batch: int = 3) -> tuple:
    geometry, channels, outputs, groups, spatial = CASES[name]
    x = torch.randn(batch, channels, *spatial).to(dtype)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(spatial) - 1]
    shape = conv(
        x.double(), torch.zeros(outputs, channels // groups, *geometry[0]).double(), None,
        *geometry[1:], groups,
    ).shape  # fmt: skip
    return x, [torch.randn(shape).to(dtype) for _ in range(n)], geometry, groups


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(CASES))
def test_ghost_convolutions(name: str, dtype: torch.dtype, isa: str) -> None:
    for n in (1, 3, 9, 20):
        x, d, geometry, groups = arguments(name, dtype, n)
        got = cpu_layers.conv_gram(x, d, *geometry, groups, True, isa=isa)
        want = definition(x, d, geometry, groups)
        # Sums of some thousand products in float64.
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))
        assert torch.equal(got, got.mT)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 3, 5), (4, 70, 3), (17, 6, 30), (64, 5, 9)])
def test_ghost_linear(sizes: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    positions, inputs, outputs = sizes
    for n in (1, 4, 9):
        a = torch.randn(3, positions, inputs).to(dtype)
        d = [torch.randn(3, positions, outputs).to(dtype) for _ in range(n)]
        got = cpu_layers.linear_gram(a, d, True, isa=isa)
        rows = torch.einsum("nbto,btd->bnod", torch.stack(d).double(), a.double()).flatten(2)
        want = rows @ rows.mT
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


def test_the_fused_kernel_runs_where_the_planner_counts_on_it(monkeypatch) -> None:
    """The two must not drift apart: what is planned as fused is fused."""
    from fastfi.layers import planner

    assert planner._FUSED_POSITIONS == cpu_layers.MOST_POSITIONS
    assert planner._FUSED_PIXELS == cpu_layers.MOST_PIXELS

    def refused(*args: object) -> None:
        raise AssertionError("left the fused kernel")

    x, d, geometry, groups = arguments("3 x 3", torch.float32, 2)
    monkeypatch.setattr(blas, "conv_gram", refused)
    cpu_layers.conv_gram(x, d, *geometry, groups, True)
    with pytest.raises(AssertionError, match="left"):
        cpu_layers.conv_gram(x, d, *geometry, groups, False)
    wide, dw = torch.randn(1, 1, 17, 17), [torch.randn(1, 1, 17, 17)]  # 289 positions
    with pytest.raises(AssertionError, match="left"):
        cpu_layers.conv_gram(wide, dw, [3, 3], [1, 1], [1, 1], [1, 1], 1, True)


def test_the_planner() -> None:
    """The layers of ResNets at 32 x 32, nine rows: what was faster when both ways were timed."""
    f32 = torch.float32
    direct = [(256, 147, 64, 49, 1024), (1024, 576, 64, 9, 1024), (1024, 27, 64, 9, 1024)]
    ghost = [(64, 576, 64, 9, 64), (16, 1152, 128, 9, 16), (4, 256, 1024, 1, 4), (1, 9, 9, 9, 1)]
    for positions, inputs, outputs, taps, pixels in direct:
        assert not ghost_is_cheaper(positions, inputs, outputs, 9, f32, taps, pixels)
    for positions, inputs, outputs, taps, pixels in ghost:
        assert ghost_is_cheaper(positions, inputs, outputs, 9, f32, taps, pixels)


@pytest.mark.parametrize("isa", ALL)
def test_samples_do_not_touch_each_other(isa: str) -> None:
    """A sample's bits are the same alone, among others, and beside NaN."""
    for name in ("3 x 3", "2 x 2 positions", "pointwise, strided"):
        x, d, geometry, groups = arguments(name, torch.float32, 9, batch=5)
        want = cpu_layers.conv_gram(x, d, *geometry, groups, True, isa=isa)
        alone = cpu_layers.conv_gram(x[2:3], [t[2:3] for t in d], *geometry, groups, True, isa=isa)
        assert torch.equal(alone[0], want[2])
        x[1], d[3][4] = torch.nan, torch.inf
        got = cpu_layers.conv_gram(x, d, *geometry, groups, True, isa=isa)
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_threads(threads_restored: None) -> None:
    x, d, geometry, groups = arguments("3 x 3", torch.float32, 9, batch=40)
    want = cpu_layers.conv_gram(x, d, *geometry, groups, True)
    torch.set_num_threads(3)
    assert torch.equal(cpu_layers.conv_gram(x, d, *geometry, groups, True), want)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channel_sums(dtype: torch.dtype, isa: str) -> None:
    shapes = [(5, 37, t) for t in (1, 3, 4, 16, 33, 100)] + [(5, 1, 7)]
    d, factor = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
    got = cpu_layers.channel_sums(d, factor, isa=isa)
    pairs = [(t.double(), f.double()) for t, f in zip(d, factor, strict=True)]
    want = torch.cat([s for t, f in pairs for s in ((t * f).sum(2), t.sum(2))], 1)
    assert got.dtype == dtype
    # Summed in float64, rounded once.
    rtol = 1.2e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got, want.to(dtype), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(blas.channel_sums(d, factor), got, rtol=1e-5, atol=1e-5)


def test_channel_sums_op() -> None:
    for batch in (0, 5):
        d, factor = ([torch.randn(batch, 3, 7), torch.randn(batch, 4, 1)] for _ in range(2))
        torch.library.opcheck(torch.ops.fastfi.channel_sums.default, (d, factor))
    with pytest.raises(ValueError, match=r"channel_sums: expected its factor .*\[5, 3, 7\]"):
        torch.ops.fastfi.channel_sums(d, [factor[0][..., 1:], factor[1]])
    with pytest.raises(ValueError, match="channel_sums: expected as many"):
        torch.ops.fastfi.channel_sums(d, factor[:1])
    with pytest.raises(ValueError, match="channel_sums: expected d"):
        torch.ops.fastfi.channel_sums([d[0][0]], [factor[0][0]])
    with pytest.raises(ValueError, match="channel_sums: expected each of d"):
        torch.ops.fastfi.channel_sums([d[0], d[1][:2]], [factor[0], factor[1][:2]])
