"""gram and segment_gram in Triton: on a GPU where there is one, in the interpreter elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_gram import DTYPES, U, integers
from test_segments import by_definition, cuts
from torch import Tensor

pytest.importorskip("triton", "3.5")

from fastfi.backends import reference_windows, triton_gram
from fastfi.backends.triton_gram import MOST_ROWS, gram, segment_gram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CHUNK = 200  # columns of a part: as many as the interpreter can be waited for

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned", "short_parts")


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gram, "CHUNK", CHUNK)


# (B, R, p): both kernels, each of their tile sizes and loads, tails in every dimension, columns
# that fill 16 bytes and others, one part and several.
SHAPES = [
    (1, 1, 1),
    (2, 2, 5),
    (2, 2, 2 * CHUNK + 1),
    (1, 9, 136),
    (1, 10, 33),
    (1, 12, 36),
    (2, 13, 64),
    (1, 16, 33),
    (2, 17, 100),
    (1, 33, 20),
    (1, 99, 33),
    (1, 13, 2 * CHUNK + 4),
]
EMPTY = [(0, 3, 5), (2, 3, 0), (2, 0, 5), (2, 20, 0), (0, 20, 3)]


def product(rows: Tensor) -> Tensor:
    """Of integers."""
    return (rows @ rows.mT).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Products of integers below 2^8 and all sums are exact, in any order."""
    rows = integers(shape, 200, 1)
    out = gram(rows.to(DEVICE, dtype))
    assert out.dtype == torch.float64
    assert torch.equal(out.cpu(), product(rows))


@pytest.mark.parametrize("count", [6, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_integers_are_exact(dtype: torch.dtype, count: int) -> None:
    """2^20 in size: a float32 or TF32 product or sum would round, a float64 one does not."""
    rows = integers((2, count, 101), 2**20, 2)
    assert torch.equal(gram(rows.to(DEVICE, dtype)).cpu(), product(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 4, 196), (1, 14, 130), (1, 2, 2 * CHUNK + 2)])
def test_real_numbers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Two orders of summation, each within (p + 2) u sum |a b| of the exact sum."""
    torch.manual_seed(3)
    scale = torch.tensor(2.0).pow(torch.randint(-6, 7, shape))
    rows = (torch.randn(shape) * scale).to(dtype)
    out = gram(rows.to(DEVICE)).cpu()
    exact = rows.double()
    bound = 2 * (shape[2] + 2) * U * (exact.abs() @ exact.abs().mT)
    assert bool(((out - exact @ exact.mT).abs() <= bound).all())
    assert torch.equal(out, out.mT)


def test_extremes() -> None:
    """Products beyond float16's range and below it; squares that overflow or vanish in float32."""
    largest, least = 65504.0, 2.0**-24
    for few in (2, 14):
        half = torch.zeros(1, few, few, dtype=torch.float16)
        half[0, 0, 0], half[0, 1, 1] = largest, least
        want = torch.zeros(1, few, few, dtype=torch.float64)
        want[0, 0, 0], want[0, 1, 1] = largest**2, least**2
        assert torch.equal(gram(half.to(DEVICE)).cpu(), want)
        for scale in (2.0**-100, 2.0**100):
            rows = torch.full((1, few, 3), scale, device=DEVICE)
            assert bool((gram(rows) == 3 * scale**2).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 4, 41), (2, 11, 20), (2, 14, 40), (2, 33, 5)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's 0 * inf
def test_not_a_number_stays_in_its_row(shape: tuple[int, int, int], value: float) -> None:
    """Padding, of rows and of columns, must not make 0 * inf out of it."""
    rows = torch.ones(shape)
    rows[0, 1, shape[2] - 2] = value
    out = gram(rows.to(DEVICE)).cpu()
    want = torch.full((shape[1], shape[1]), float(shape[2]), dtype=torch.float64)
    assert torch.equal(out[1], want)
    want[1], want[:, 1] = value, value
    assert torch.equal(out[0].nan_to_num(-1.0), want.nan_to_num(-1.0))


@pytest.mark.parametrize("count", [3, 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_any_layout(dtype: torch.dtype, count: int) -> None:
    rows = integers((2, count, 32), 100, 4)
    base = rows.to(DEVICE, dtype)
    layouts = {
        "transposed": base.transpose(1, 2).contiguous().transpose(1, 2),
        "classes first": base.transpose(0, 1).contiguous().transpose(0, 1),
        "every second column": torch.stack([base, base + 1], 3).flatten(2)[:, :, ::2],
        "a slice": torch.cat([base, base], 1)[:, :count],
    }
    for name, view in layouts.items():
        assert not view.is_contiguous(), name
        assert torch.equal(gram(view).cpu(), product(rows)), name
    # Contiguous, from an address that no load of 16 bytes may begin at.
    shifted = torch.cat([base.flatten()[:1], base.flatten()])[1:].view(base.shape)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 != 0
    assert torch.equal(gram(shifted).cpu(), product(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 3, 131), (3, 2, CHUNK + 4), (3, 14, 66)])
def test_samples_do_not_meet(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A sample's matrix has the same bits alone and in any batch."""
    torch.manual_seed(5)
    rows = torch.randn(shape).to(DEVICE, dtype)
    want = gram(rows)
    for size in (1, 2):
        assert torch.equal(gram(rows[:size]), want[:size])
        assert torch.equal(gram(rows[shape[0] - size :]), want[shape[0] - size :])


@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape: tuple[int, int, int]) -> None:
    out = gram(torch.empty(shape, device=DEVICE))
    assert torch.equal(out.cpu(), torch.zeros(shape[0], shape[1], shape[1]).double())
    offsets = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    out = segment_gram(torch.empty(shape, device=DEVICE), offsets)
    assert torch.equal(out.cpu(), torch.zeros(shape[0], 2, shape[1], shape[1]).double())
    assert segment_gram(torch.ones(2, 3, 5, device=DEVICE), offsets[:, :1]).shape == (2, 0, 3, 3)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [(2, 2, 7), (2, 3, 68), (2, 3, 65), (1, 11, 40), (2, 17, 36)])
def test_segments_of_integers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Offsets shared and not, that begin anywhere, leave out columns, and hold empty segments."""
    rows = integers(shape, 200, 1).numpy()
    for samples, groups in ((1, 1), (shape[0], 4)):
        offsets = cuts(np.random.default_rng(groups), shape[2], groups, samples)
        at = torch.from_numpy(offsets).to(DEVICE)
        got = segment_gram(torch.from_numpy(rows).to(DEVICE, dtype), at)
        assert got.dtype == torch.float64
        assert torch.equal(got.cpu(), by_definition(rows, offsets))


@pytest.mark.parametrize("count", [2, 14])
def test_parts_of_segments(count: int) -> None:
    """Few long segments are cut into parts: some of them whole, some shorter than a turn."""
    rows = integers((2, count, 1000), 200, 2).numpy()
    offsets = np.array([[3, 700, 701], [0, 0, 999]])
    assert 2 * CHUNK < 1000  # two segments of more than one part
    got = segment_gram(torch.from_numpy(rows).float().to(DEVICE), torch.tensor(offsets).to(DEVICE))
    assert torch.equal(got.cpu(), by_definition(rows, offsets))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("count", [3, 14])
def test_columns_outside_a_segment_do_not_count(count: int, value: float) -> None:
    """Not those beside it that share its first or last vector either."""
    rows = torch.ones(2, count, 20)
    rows[:, :, [0, 1, 11, 19]] = value
    offsets = torch.tensor([[2, 8, 11], [12, 12, 19]])
    out = segment_gram(rows.to(DEVICE), offsets.to(DEVICE))
    want = torch.tensor([[6.0, 3.0], [0.0, 7.0]]).double()
    assert torch.equal(out.cpu(), want[:, :, None, None].expand(2, 2, count, count))


def test_offsets_in_any_layout() -> None:
    rows = integers((3, 4, 30), 200, 3).numpy()
    at = torch.from_numpy(cuts(np.random.default_rng(3), 30, 5, 3)).to(DEVICE)
    strided = torch.stack([at, at], 2)[:, :, 0]
    assert not strided.is_contiguous()
    got = segment_gram(torch.from_numpy(rows).float().to(DEVICE), strided)
    assert torch.equal(got.cpu(), by_definition(rows, at.cpu().numpy()))


@pytest.mark.parametrize("count", [3, 14])
def test_offsets_are_clamped(count: int) -> None:
    """Values that no caller should pass read nothing outside of the rows: as if clamped to 0..p,
    and empty where they fall."""
    rows = integers((2, count, 20), 200, 4).numpy()
    bad = torch.tensor([[-(2**62), 5, 2**62], [7, 3, 30]])
    got = segment_gram(torch.from_numpy(rows).float().to(DEVICE), bad.to(DEVICE)).cpu()
    assert torch.equal(got[0], by_definition(rows, np.array([[0, 5, 20]]))[0])
    assert torch.equal(got[1, 0], torch.zeros(count, count).double())
    assert torch.equal(got[1, 1:], by_definition(rows, np.array([[3, 20]]))[1])


def test_segments_of_real_numbers() -> None:
    torch.manual_seed(6)
    rows, offsets = torch.randn(3, 4, 200), torch.tensor([[1, 30, 30, 157, 200]])
    got = segment_gram(rows.to(DEVICE), offsets.to(DEVICE)).cpu()
    bound = 2 * 202 * U * 200 * float(rows.double().abs().max() ** 2)
    want = reference_windows.segment_gram(rows, offsets)
    torch.testing.assert_close(got, want, rtol=0.0, atol=bound)
    alone = segment_gram(rows[1:2].to(DEVICE), offsets.to(DEVICE)).cpu()
    assert torch.equal(alone[0], got[1])


def test_both_kernels_are_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gram, "CHUNK", 4096)
    launched = []

    def spy(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *args, **kwargs: launched.append((name, grid[0], kwargs))

        return Kernel()

    for name in ("_few_rows", "_many_rows"):
        monkeypatch.setattr(triton_gram, name, spy(name))
    monkeypatch.setattr(triton_gram, "add_parts", lambda *_: launched.append(("add_parts",)))

    def launch(count: int, columns: int, dtype: torch.dtype) -> list[Any]:
        launched.clear()
        gram(torch.ones(1, count, columns, dtype=dtype, device=DEVICE))
        return list(launched)

    f32, f64, f16 = torch.float32, torch.float64, torch.float16
    # Loads of 16 bytes (8 for half types), of half as many where registers are short, of one.
    for count, columns, dtype, unit in [
        (9, 784, f32, 4), (9, 785, f32, 1), (12, 784, f32, 2), (9, 784, f64, 2), (12, 784, f64, 1),
        (9, 784, f16, 4),
    ]:  # fmt: skip
        ((name, programs, options),) = launch(count, columns, dtype)
        assert (name, programs, options["UNIT"]) == ("_few_rows", 1, unit)
    assert [name for name, *_ in launch(9, 5000, f32)] == ["_few_rows", "add_parts"]
    for count, side, tiles in ((MOST_ROWS + 1, 16, 1), (17, 32, 1), (64, 32, 4), (65, 64, 4)):
        ((name, programs, options),) = launch(count, 784, f32)
        assert (name, programs, options["SIDE"]) == ("_many_rows", tiles, side)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"gram: expected rows \[B, R, p\].*\[3, 4\]"):
        gram(torch.ones(3, 4, device=DEVICE))
    with pytest.raises(ValueError, match="int64"):
        gram(torch.ones(3, 4, 5, device=DEVICE).long())
    with pytest.raises(ValueError, match=r"segment_gram: expected offsets int64.*float32"):
        segment_gram(torch.ones(3, 4, 5, device=DEVICE), torch.zeros(1, 3, device=DEVICE))
