"""The Gram op against exact sums."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastfi.backends import cpu

U = 2.0**-53  # unit roundoff of float64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# (B, R, p): ones, odd sizes with tails after any vector width, R past any tile, many columns
SHAPES = [
    (1, 1, 1),
    (3, 1, 5),
    (2, 2, 1),
    (5, 9, 17),
    (1, 7, 1023),
    (2, 13, 64),
    (3, 9, 784),
    (1, 99, 33),
    (1, 5, 20001),
    (2, 3, 4099),
]


def integers(shape: tuple[int, ...], bound: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-bound, bound + 1, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(ops: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Integers below 2^8 have exact products, and all sums stay below 2^53: no digit may differ,
    whatever the order of summation."""
    rows = integers(shape, 200, 1)
    out = ops.gram(rows.to(dtype))
    assert out.dtype == torch.float64
    assert torch.equal(out, (rows @ rows.mT).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_integers_are_exact(ops: Any, dtype: torch.dtype) -> None:
    """2^20 in size: a float32 product or sum would round, a float64 one does not."""
    rows = integers((2, 6, 101), 2**20, 2)
    assert torch.equal(ops.gram(rows.to(dtype)), (rows @ rows.mT).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 9, 257), (1, 4, 3001)])
def test_real_numbers(ops: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Any order of summation errs by at most p u sum |a b| (u = 2^-53; for float64 the product
    rounds as well). The exact sum is math.fsum's, of exact products or of Fractions."""
    torch.manual_seed(3)
    scale = torch.tensor(2.0).pow(torch.randint(-6, 7, shape))
    rows = (torch.randn(shape) * scale).to(dtype)
    out = ops.gram(rows)
    exact = rows.double()
    for b in range(shape[0]):
        for i in range(0, shape[1], 2):
            for j in range(i, shape[1], 3):
                left, right = exact[b, i].tolist(), exact[b, j].tolist()
                if dtype == torch.float64:
                    products = [Fraction(x) * Fraction(y) for x, y in zip(left, right, strict=True)]
                    want = float(sum(products))
                else:
                    want = math.fsum(x * y for x, y in zip(left, right, strict=True))
                size = math.fsum(abs(x * y) for x, y in zip(left, right, strict=True))
                bound = (shape[2] + 2) * U * size
                assert abs(out[b, i, j].item() - want) <= bound
                assert abs(out[b, j, i].item() - want) <= bound


def test_float32_rows_are_accumulated_in_float64(ops: Any) -> None:
    """A small direction of nearly parallel rows: lost by a float32 sum, kept by a float64 one.

    The rows differ by 2^-12 in one of 4096 equal entries, so that N_00 - 2 N_01 + N_11 = 2^-24
    while N_00 = 4096: 36 bits apart.
    """
    rows = torch.ones(1, 2, 4096)
    rows[0, 1, 1234] += 2.0**-12
    direction = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def small(gram: Tensor) -> float:
        return (direction @ gram[0].double() @ direction).item()

    assert small(rows @ rows.mT) != 2.0**-24  # what this test is there to refuse
    assert small(ops.gram(rows)) == 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_any_layout(ops: Any, dtype: torch.dtype) -> None:
    rows = integers((4, 6, 30), 100, 4)
    want = (rows @ rows.mT).double()
    base = rows.to(dtype)
    layouts = {
        "transposed": base.transpose(1, 2).contiguous().transpose(1, 2),
        "classes first": base.transpose(0, 1).contiguous().transpose(0, 1),
        "every second column": torch.stack([base, base + 1], 3).flatten(2)[:, :, ::2],
        "a slice": torch.cat([base, base], 1)[:, :6],
    }
    for name, view in layouts.items():
        assert not view.is_contiguous(), name
        assert torch.equal(ops.gram(view), want), name
    shared = base[:, :1].expand(4, 6, 30)
    assert torch.equal(ops.gram(shared), want[:, :1, :1].expand(4, 6, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(ops: Any, dtype: torch.dtype) -> None:
    assert ops.gram(torch.empty(0, 3, 5, dtype=dtype)).shape == (0, 3, 3)
    assert torch.equal(ops.gram(torch.empty(2, 3, 0, dtype=dtype)), torch.zeros(2, 3, 3).double())
    assert ops.gram(torch.empty(2, 0, 5, dtype=dtype)).shape == (2, 0, 0)


def test_half_precision_extremes(ops: Any) -> None:
    """Products beyond float16's range, and of its subnormal numbers."""
    largest, least = 65504.0, 2.0**-24
    rows = torch.tensor([[[largest, 0.0], [0.0, least]]], dtype=torch.float16)
    want = torch.tensor([[[largest**2, 0.0], [0.0, least**2]]], dtype=torch.float64)
    assert torch.equal(ops.gram(rows), want)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_extremes(ops: Any, scale: float) -> None:
    """Squares that overflow or vanish in float32."""
    rows = torch.full((1, 2, 3), scale, dtype=torch.float32)
    want = 3 * rows[0, 0, 0].double() ** 2
    torch.testing.assert_close(ops.gram(rows), want.expand(1, 2, 2), rtol=4 * U, atol=0.0)


def test_not_a_number_is_not_hidden(ops: Any) -> None:
    rows = torch.ones(2, 3, 40)
    rows[0, 1, 33] = float("nan")
    out = ops.gram(rows)
    assert out[0, 1].isnan().all()
    assert out[0, :, 1].isnan().all()
    assert out[1].isfinite().all()
    assert out[0, 0, 2] == 40.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_do_not_meet(kernels: Any, dtype: torch.dtype, threads_restored: None) -> None:
    """A sample's matrix is the same alone, in any batch, and with any number of threads."""
    torch.manual_seed(5)
    rows = torch.randn(23, 9, 131).to(dtype)
    want = kernels.gram(rows)
    for size in (1, 2, 7, 16):
        assert torch.equal(kernels.gram(rows[:size]), want[:size])
        assert torch.equal(kernels.gram(rows[23 - size :]), want[23 - size :])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.gram(rows), want)


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:8]:
        rows = integers(shape, 200, 6)
        assert torch.equal(cpu.gram(rows.to(dtype), isa=isa), (rows @ rows.mT).double())
