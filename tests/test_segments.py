"""segment_gram: Gram matrices of runs of columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfi.backends import cpu, reference_windows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# (B, R, p): single entries, odd sizes, more rows than a tile, more columns than a block
SHAPES = [(1, 1, 1), (3, 2, 7), (2, 9, 65), (1, 17, 33), (2, 40, 21), (1, 3, 2500)]

pytestmark = pytest.mark.usefixtures("one_thread")


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-200, 201, shape)


def cuts(rng: np.random.Generator, columns: int, groups: int, samples: int) -> np.ndarray:
    """Offsets that leave out columns at both ends and hold empty segments."""
    return np.sort(rng.integers(0, columns + 1, (samples, groups + 1)), 1)


def by_definition(rows: np.ndarray, offsets: np.ndarray) -> Tensor:
    batch, n, _ = rows.shape
    out = np.zeros((batch, offsets.shape[1] - 1, n, n))
    for b in range(batch):
        bounds = offsets[b % len(offsets)]
        for g in range(len(bounds) - 1):
            part = rows[b, :, bounds[g] : bounds[g + 1]]
            out[b, g] = part @ part.T
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(
    window_ops: Any, poisoned: None, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Products of integers below 2^8 and all sums are exact, in any order."""
    rows = integers(shape, 1)
    for samples in {1, shape[0]}:
        for groups in (1, 2, 9):
            offsets = cuts(np.random.default_rng(groups), shape[2], groups, samples)
            got = window_ops.segment_gram(
                torch.from_numpy(rows).to(dtype), torch.from_numpy(offsets)
            )
            assert got.dtype == torch.float64
            assert torch.equal(got, by_definition(rows, offsets))


def test_one_segment_of_everything_is_the_gram(window_ops: Any) -> None:
    rows = torch.from_numpy(integers((3, 5, 70), 2)).float()
    got = window_ops.segment_gram(rows, torch.tensor([[0, 70]]))
    assert torch.equal(got[:, 0], torch.ops.fastfi.gram(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_offsets_in_any_layout(window_ops: Any, dtype: torch.dtype) -> None:
    rows = integers((4, 6, 30), 3)
    offsets = cuts(np.random.default_rng(3), 30, 5, 4)
    want = by_definition(rows, offsets)
    base, at = torch.from_numpy(rows).to(dtype), torch.from_numpy(offsets)
    layouts = {
        "transposed": base.transpose(1, 2).contiguous().transpose(1, 2),
        "classes first": base.transpose(0, 1).contiguous().transpose(0, 1),
        "every second column": torch.stack([base, base + 1], 3).flatten(2)[:, :, ::2],
        "a slice": torch.cat([base, base], 1)[:, :6],
    }
    for name, view in layouts.items():
        assert not view.is_contiguous(), name
        assert torch.equal(window_ops.segment_gram(view, at), want), name
    strided = torch.stack([at, at], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(window_ops.segment_gram(base, strided), want)


def test_empty(window_ops: Any) -> None:
    def shape(rows: tuple[int, ...], offsets: Tensor) -> tuple[int, ...]:
        out = window_ops.segment_gram(torch.ones(rows), offsets)
        assert bool((out == 0).all())
        return tuple(out.shape)

    one = torch.zeros(1, 1, dtype=torch.int64)
    assert shape((2, 3, 5), one) == (2, 0, 3, 3)
    assert shape((0, 3, 5), torch.tensor([[0, 2, 5]])) == (0, 2, 3, 3)
    assert shape((2, 3, 0), torch.zeros(1, 4, dtype=torch.int64)) == (2, 3, 3, 3)
    assert shape((2, 0, 5), torch.tensor([[0, 5]])) == (2, 1, 0, 0)
    assert shape((2, 3, 5), torch.tensor([[2, 2, 2]])) == (2, 2, 3, 3)


def test_columns_outside_every_segment_are_not_read(window_ops: Any) -> None:
    rows = torch.ones(2, 3, 20)
    rows[:, :, [0, 1, 11, 19]] = torch.nan
    out = window_ops.segment_gram(rows, torch.tensor([[2, 8, 11], [12, 12, 19]]))
    want = torch.tensor([[6.0, 3.0], [0.0, 7.0]]).double()
    assert torch.equal(out, want[:, :, None, None].expand(2, 2, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_and_segments_do_not_meet(
    window_kernels: Any, dtype: torch.dtype, threads_restored: None
) -> None:
    """A segment's matrix is the same alone, in any batch, with any number of threads."""
    torch.manual_seed(5)
    rows = torch.randn(7, 9, 131).to(dtype)
    offsets = torch.tensor([[3, 20, 20, 77, 130]])
    want = window_kernels.segment_gram(rows, offsets)
    for b in (0, 3, 6):
        assert torch.equal(window_kernels.segment_gram(rows[b : b + 1], offsets)[0], want[b])
    for g in range(4):
        alone = window_kernels.segment_gram(rows, offsets[:, g : g + 2])
        assert torch.equal(alone[:, 0], want[:, g])
    every = window_kernels.segment_gram(rows, offsets.expand(7, -1))
    assert torch.equal(every, want)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(window_kernels.segment_gram(rows, offsets), want)


@given(
    batch=st.sampled_from([1, 2, 5]),
    rows=st.sampled_from([1, 2, 9, 16]),
    columns=st.sampled_from([1, 2, 31, 200]),
    groups=st.integers(1, 6),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_real_numbers(
    batch: int, rows: int, columns: int, groups: int, shared: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(6)
    x = torch.randn(batch, rows, columns).to(dtype)
    offsets = torch.from_numpy(
        cuts(np.random.default_rng(columns), columns, groups, 1 if shared else batch)
    )
    want = reference_windows.segment_gram(x, offsets)
    # two orders of summation, each within (p + 2) 2^-53 of a sum of |a b| <= p max^2
    bound = 2 * (columns + 2) * 2.0**-53 * columns * float(x.double().abs().max() ** 2)
    for isa in cpu.instruction_sets():
        got = cpu.segment_gram(x, offsets, isa=isa)
        torch.testing.assert_close(got, want, rtol=0.0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 3])
def test_opcheck(dtype: torch.dtype, samples: int) -> None:
    offsets = torch.tensor([[0, 2, 5]]).repeat(samples, 1)
    op = torch.ops.fastfi.segment_gram.default
    torch.library.opcheck(op, (torch.ones(3, 2, 5, dtype=dtype), offsets))
    torch.library.opcheck(op, (torch.ones(0, 2, 5, dtype=dtype), offsets[:1]))


def test_shapes_of_the_fake_kernel() -> None:
    with FakeTensorMode():
        out = torch.ops.fastfi.segment_gram(torch.ones(3, 2, 5), torch.zeros(1, 5).long())
    assert out.shape == (3, 4, 2, 2)
    assert out.dtype == torch.float64
    out = torch.ops.fastfi.segment_gram(
        torch.ones(3, 2, 5, device="meta"), torch.zeros(3, 5, device="meta").long()
    )
    assert out.shape == (3, 4, 2, 2)


@pytest.mark.parametrize(
    ("rows", "offsets", "message"),
    [
        (torch.ones(3, 4), torch.zeros(1, 3).long(), r"\[B, R, p\].*\[3, 4\]"),
        (torch.ones(3, 4, 5).long(), torch.zeros(1, 3).long(), "int64"),
        (torch.ones(3, 4, 5), torch.zeros(3).long(), r"offsets int64 \[3 or 1, G \+ 1\].*\[3\]"),
        (torch.ones(3, 4, 5), torch.zeros(2, 3).long(), r"offsets.*\[2, 3\]"),
        (torch.ones(3, 4, 5), torch.zeros(1, 0).long(), r"offsets.*\[1, 0\]"),
        (torch.ones(3, 4, 5), torch.zeros(1, 3).int(), "offsets.*int32"),
        (torch.ones(3, 4, 5), torch.zeros(1, 3), "offsets.*float32"),
        (torch.ones(3, 4, 5), torch.zeros(1, 3, device="meta").long(), "offsets.*meta|meta.*cpu"),
    ],
)
def test_refusals(window_ops: Any, rows: Tensor, offsets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_ops.segment_gram(rows, offsets)
