"""Layers' Gram matrices by Triton: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_layer_ops import GEOMETRIES, Geometry, conv_arguments, conv_rows, linear_rows
from torch import Tensor

pytest.importorskip("triton", "3.5")

from fastfi.backends import blas, triton_direct, triton_ghost, triton_layers, triton_plan
from fastfi.backends.triton_parts import accumulate_parts

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_gram(a: Tensor, d: Tensor, ghost: bool, **options: Any) -> Tensor:
    """The kernels' result on the CPU; d [B, n, T, O]."""
    rows = [*d.to(DEVICE).unbind(1)]
    return triton_layers.linear_gram(a.to(DEVICE), rows, ghost, **options).cpu()


def conv_gram(x: Tensor, d: Tensor, geometry: Geometry, ghost: bool) -> Tensor:
    """The same: d [B, n, O, *positions]."""
    rows = [*d.to(DEVICE).unbind(1)]
    return triton_layers.conv_gram(x.to(DEVICE), rows, *geometry, ghost).cpu()


def linear_arguments(
    sizes: tuple[int, ...], n: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """sizes: B, T, D, O."""
    batch, positions, inputs, outputs = sizes
    a = torch.randn(batch, positions, inputs).to(dtype)
    return a, torch.randn(batch, n, positions, outputs).to(dtype)


def epsilon(work: torch.dtype, ghost: bool) -> float:
    """A rounding of one sum over positions: to nearest, but for tensor cores, which cut off what
    they add to float32."""
    if ghost or work == torch.float64:
        return 2.0**-53
    return 2.0**-24 if work == torch.float32 else 2.0**-23


def assert_gram(
    got: Tensor, rows: Tensor, magnitudes: Tensor, terms: int, work: torch.dtype, ghost: bool
) -> None:
    """``got`` is the Gram matrix of rows [B, n, p], up to rounding.

    With u the rounding of sums of ``terms`` positions, a gradient errs by terms * u times the
    magnitudes' sum U, and its products with others, to first order, by twice that times <U_r, U_s>.
    Sums of p products in float64 (in the ghost way, of p * terms) come on top.
    """
    want, most = rows @ rows.mT, magnitudes @ magnitudes.mT
    in_float64 = (rows.shape[2] * (terms if ghost else 1) + 4) * 2.0**-52
    bound = (2.01 * (terms + 1) * epsilon(work, ghost) + in_float64) * most
    assert got.shape == want.shape and got.dtype == torch.float64
    assert bool(((got - want).abs() <= bound).all())
    assert torch.equal(got, got.mT)


def assert_linear(a: Tensor, d: Tensor, ghost: bool, got: Tensor | None = None) -> None:
    got = linear_gram(a, d, ghost) if got is None else got
    rows, magnitudes = linear_rows(a, d), linear_rows(a.abs(), d.abs())
    assert_gram(got, rows, magnitudes, a.shape[1], torch.promote_types(a.dtype, d.dtype), ghost)


def assert_convolution(x: Tensor, d: Tensor, geometry: Geometry, ghost: bool) -> None:
    got = conv_gram(x, d, geometry, ghost)
    rows, magnitudes = conv_rows(x, d, geometry), conv_rows(x.abs(), d.abs(), geometry)
    assert_gram(got, rows, magnitudes, d[0, 0, 0].numel(), x.dtype, ghost)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 19, 21, 5), (1, 33, 70, 23), (2, 2, 3, 1), (3, 5, 1, 2)])
def test_linear(sizes: tuple[int, ...], dtype: torch.dtype, ghost: bool) -> None:
    """B, T, D, O with tails of every tile."""
    assert_linear(*linear_arguments(sizes, 3, dtype), ghost)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("n", [1, 2, 9, 13, 17, 40, 130])
def test_rows(n: int, ghost: bool) -> None:
    """Several outputs in a tile, one, and pairs of blocks of rows."""
    assert_linear(*linear_arguments((2, 6, 7, 9 if n < 40 else 4), n), ghost)


@pytest.mark.parametrize("ghost", [False, True])
def test_blocks_of_rows(ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small blocks, the last one not full: every pair of rows is met once."""
    monkeypatch.setattr(triton_plan, "MOST_ROWS", 4)
    for n in (8, 10):
        assert_linear(*linear_arguments((2, 18, 19, 6), n), ghost)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact(dtype: torch.dtype, ghost: bool) -> None:
    """Numbers below 4: sums of 40 products stay below 2^24, and all of theirs below 2^53."""
    a, d = (torch.randint(-3, 4, s).to(dtype) for s in ((2, 40, 37), (2, 5, 40, 14)))
    rows = linear_rows(a, d)
    assert torch.equal(linear_gram(a, d, ghost), rows @ rows.mT)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_convolution(name: str, ghost: bool) -> None:
    geometry, spatial = GEOMETRIES[name]
    assert_convolution(*conv_arguments(torch.float32, geometry, spatial), geometry, ghost)


def test_products_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """S from the pixels' products where patches overlap, from the patches where they do not."""
    taken = []
    by_pixels = triton_layers._by_pixels

    def noted(layer: Any) -> bool:
        taken.append(by_pixels(layer))
        return taken[-1]

    monkeypatch.setattr(triton_layers, "_by_pixels", noted)
    for name, want in (("3x3", True), ("wide padding", True), ("strided", False)):
        taken.clear()
        geometry, spatial = GEOMETRIES[name]
        assert_convolution(*conv_arguments(torch.float32, geometry, spatial), geometry, True)
        assert set(taken) == {want}


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_convolution_types(dtype: torch.dtype, ghost: bool) -> None:
    geometry, spatial = GEOMETRIES["grouped"]
    assert_convolution(*conv_arguments(dtype, geometry, spatial), geometry, ghost)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize(("groups", "outputs"), [(6, 6), (6, 12), (35, 35)])
def test_depthwise(groups: int, outputs: int, ghost: bool) -> None:
    """Also more groups than programs."""
    geometry: Geometry = ([3, 3], [2, 1], [1, 1], [1, 1], groups)
    x, d = conv_arguments(torch.float32, geometry, [4, 3], 1, 3, groups, outputs)
    assert_convolution(x, d, geometry, ghost)
    if groups == 35:
        _, *split = triton_plan.plan(3, 35, 1, 6, 6 if ghost else 9, triton_direct.COLUMNS)
        assert split[3] == 2  # groups of one program


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 100])
def test_parts(parts: int, ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a sample split among few programs and many, over outputs, groups and columns."""
    monkeypatch.setattr(triton_plan, "PARTS", parts)
    geometry, spatial = GEOMETRIES["1-d long"]
    geometry = (*geometry[:4], 2)
    for outputs in (2, 28):
        x, d = conv_arguments(torch.float32, geometry, spatial, 1, 5, 30, outputs)
        assert_convolution(x, d, geometry, ghost)


def test_sums_of_parts() -> None:
    """Tails of both loops; the last part counts."""
    for count, size in ((1, 1), (8, 16), (9, 17), (23, 40)):
        parts = torch.randn(3, count, size, dtype=torch.float64, device=DEVICE)
        out = torch.empty(3, size, dtype=torch.float64, device=DEVICE)
        grid = (3 * -(-size // 16),)
        accumulate_parts[grid](parts, out, count, size, BLOCK=16, STEP=8, enable_fp_fusion=True)
        bound = count * 2.0**-53 * parts.abs().sum(1)
        assert bool(((out - parts.sum(1)).abs() <= 2 * bound).all())


@pytest.mark.parametrize("ghost", [False, True])
def test_a_sample_does_not_depend_on_its_batch(
    ghost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: alone, among others, beside NaN, and in chunks of samples."""
    geometry = GEOMETRIES["3x3"][0]
    x, d = conv_arguments(torch.float32, geometry, [3, 3], batch=4, outputs=25)
    want = conv_gram(x, d, geometry, ghost)
    assert torch.equal(conv_gram(x[2:3], d[2:3], geometry, ghost)[0], want[2])
    with monkeypatch.context() as patch:  # two samples at a time
        patch.setattr(triton_layers, "WORK_BYTES", 3000 if ghost else 300)
        patch.setattr(triton_layers, "WIDE_OFFSETS", 0)
        assert torch.equal(conv_gram(x, d, geometry, ghost), want)
    x[1], d[3] = torch.nan, torch.nan
    got = conv_gram(x, d, geometry, ghost)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert bool(got[[1, 3]].isnan().all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("where", ["inputs", "cotangents"])
def test_infinity_is_not_spoilt_by_padding(where: str, ghost: bool) -> None:
    """Of positive numbers all products are: those of what is infinite must not become NaN by the
    zeros that fill a tile, and the others must not change. Five rows leave lines of a tile empty,
    and 14 outputs most of a second tile."""
    a, d = (t.abs() + 0.1 for t in linear_arguments((1, 19, 21, 14), 5))
    if where == "inputs":
        a[0, 18, 20] = torch.inf
        assert bool((linear_gram(a, d, ghost) == torch.inf).all())
        return
    want = linear_gram(a, d, ghost)[0]
    d[0, 4, 18, 13] = torch.inf
    got = linear_gram(a, d, ghost)[0]
    assert bool((got[4] == torch.inf).all())
    assert torch.equal(got[:4, :4], want[:4, :4])


@pytest.mark.parametrize("ghost", [False, True])
def test_layouts(ghost: bool) -> None:
    """Channels-last images, strided views and expanded cotangents are read where they lie; rows
    that lie differently are copied."""
    geometry, spatial = GEOMETRIES["3x3"]
    x, d = conv_arguments(torch.float32, geometry, spatial)
    want = conv_gram(x, d, geometry, ghost)
    last = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    rows = [t.to(DEVICE).contiguous(memory_format=torch.channels_last) for t in d.unbind(1)]
    mixed = [rows[0], rows[1].contiguous(), rows[2]]
    for other in (rows, mixed):
        got = triton_layers.conv_gram(last, other, *geometry, ghost)
        assert torch.equal(got.cpu(), want)
    turned = d.to(DEVICE).permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    got = triton_layers.conv_gram(last, [*turned.unbind(1)], *geometry, ghost)
    assert torch.equal(got.cpu(), want)
    a, c = torch.randn(5, 2, 4, device=DEVICE), torch.randn(2, 1, 5, 6, device=DEVICE)
    c = c.expand(2, 3, 5, 6)
    want = triton_layers.linear_gram(
        a.transpose(0, 1).contiguous(), [*c.contiguous().unbind(1)], ghost
    )
    got = triton_layers.linear_gram(a.transpose(0, 1), [*c.unbind(1)], ghost)
    assert torch.equal(got, want)


@pytest.mark.parametrize("ghost", [False, True])
def test_narrow_tiles(monkeypatch: pytest.MonkeyPatch, ghost: bool) -> None:
    """Where shared memory is small, more than 64 rows are pairs of blocks."""
    monkeypatch.setattr(triton_layers, "_widest", lambda device: 64)
    columns = triton_ghost.COLUMNS if ghost else triton_direct.COLUMNS
    for n in (1, 9, 33, 64, 65, 130, 200):
        p = triton_plan.plan(n, 1, 7, 50, 40, columns, 64)
        assert p.rows <= p.width <= 64 and p.blocks * p.rows >= n
    assert_linear(*linear_arguments((1, 3, 2, 2), 70), ghost)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (1, 1)])
def test_expanded_pixels(shape: tuple[int, int], ghost: bool) -> None:
    """As means over one dimension send cotangents back: strides of 0 beside others are not taken
    for one dimension."""
    geometry = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    x = torch.randn(2, 3, *shape, device=DEVICE).expand(2, 3, 4, 3)
    rows = [torch.randn(2, 5, *shape, device=DEVICE).expand(2, 5, 4, 3) for _ in range(3)]
    copies = [t.contiguous() for t in rows]
    want = triton_layers.conv_gram(x.contiguous(), copies, *geometry, ghost)
    for inputs, d in ((x, rows), (x.contiguous(), rows), (x, copies)):
        assert torch.equal(triton_layers.conv_gram(inputs, d, *geometry, ghost), want)


def test_what_is_copied() -> None:
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for t, stride in ((x, (60, 20, 1)), (last, (60, 1, 3)), (x[:1], (0, 20, 1))):
        (same,), got = triton_layers._alike([t])
        assert same is t and got == stride
    (same,), got = triton_layers._alike([x[:, :, :1, :1].expand(2, 3, 4, 5)])
    assert same.stride() == (60, 20, 0, 0) and got == (60, 20, 0)
    half = x[:, :, :, :1].expand(2, 3, 4, 5)
    for tensors in ([x, last], [x[..., :4]], [x.mT], [half]):
        copies, got = triton_layers._alike(tensors)
        assert got == (3 * tensors[0][0, 0].numel(), tensors[0][0, 0].numel(), 1)
        assert all(t.is_contiguous() for t in copies)


@pytest.mark.parametrize("ghost", [False, True])
def test_types_that_differ(ghost: bool) -> None:
    a, d = linear_arguments((2, 7, 5, 4), 3)
    for other in (torch.float16, torch.float64):
        assert_linear(a, d.to(other), ghost)
        assert_linear(a.to(other), d, ghost)
    # Two 16-bit types have no common one but float32.
    rows = linear_rows(a.bfloat16(), d.half())
    magnitudes = linear_rows(a.bfloat16().abs(), d.half().abs())
    got = linear_gram(a.bfloat16(), d.half(), ghost)
    assert_gram(got, rows, magnitudes, 7, torch.float32, ghost)


def test_precision_is_ieee_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    f32, f64 = torch.float32, torch.float64
    x = torch.empty(1)
    assert triton_layers._work(x, f32, False) == (f32, "ieee")
    assert triton_layers._work(x, torch.bfloat16, True) == (f32, "tf32x3")
    assert triton_layers._work(x, f64, True) == (f64, "ieee")
    a, d = linear_arguments((2, 20, 18, 5), 3)
    got = linear_gram(a, d, False, allow_tf32=True)
    # Three products of 11 bits each: what is left out is below 2^-22 of a product, twice.
    rows, most = linear_rows(a, d), linear_rows(a.abs(), d.abs())
    bound = (2 * 2 * 2.0**-21 + 2 * 20 * 2.0**-23) * (most @ most.mT)
    assert bool(((got - rows @ rows.mT).abs() <= bound).all())
    monkeypatch.setattr(triton_direct, "DOUBLE", True)
    assert triton_layers._work(x, f32, False) == (f64, "ieee")
    magnitudes = linear_rows(a.abs(), d.abs())
    assert_gram(linear_gram(a, d, False), rows, magnitudes, 20, f64, False)


@pytest.mark.parametrize("ghost", [False, True])
def test_one_position(ghost: bool) -> None:
    """Gradients of rank one; of an image's only patch, the pixels inside."""
    assert_linear(*linear_arguments((3, 1, 7, 5), 4), ghost)
    for name, spatial in (("3x3", [1, 1]), ("whole image", [4, 3]), ("grouped", [1, 1])):
        geometry = GEOMETRIES[name][0]
        x, d = conv_arguments(torch.float32, geometry, spatial)
        assert d[0, 0, 0].numel() == 1
        assert_convolution(x, d, geometry, ghost)


@pytest.mark.parametrize("ghost", [False, True])
def test_nothing(ghost: bool) -> None:
    for sizes in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        got = linear_gram(*linear_arguments(sizes, 2), ghost)
        assert torch.equal(got, torch.zeros(sizes[0], 2, 2, dtype=torch.float64))
    geometry, spatial = GEOMETRIES["3x3"]
    x, d = conv_arguments(torch.float32, geometry, spatial, batch=0)
    assert conv_gram(x, d, geometry, ghost).shape == (0, 3, 3)


def test_it_agrees_with_products_of_torch() -> None:
    """And leaves its arguments alone."""
    geometry, spatial = GEOMETRIES["3-d grouped"]
    x, d = conv_arguments(torch.float64, geometry, spatial)
    before = [x.clone(), d.clone()]
    for ghost in (False, True):
        got = conv_gram(x, d, geometry, ghost)
        want = blas.conv_gram(x, [*d.unbind(1)], *geometry, ghost)
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-12 * float(want.abs().max()))
    assert torch.equal(x, before[0]) and torch.equal(d, before[1])


def test_it_refuses_what_the_operators_refuse() -> None:
    with pytest.raises(ValueError, match="linear_gram: expected each of d"):
        triton_layers.linear_gram(torch.ones(2, 3, 4), [torch.ones(2, 2, 5)], True)
    with pytest.raises(ValueError, match="conv_gram: expected"):
        triton_layers.conv_gram(torch.ones(2, 3, 4), [torch.ones(2, 2, 4)], [1], [1], [0], [1], 2,
                                False)  # fmt: skip
