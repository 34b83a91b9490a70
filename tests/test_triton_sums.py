"""channel_sums in Triton: on a GPU where there is one, in the interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from test_gram import U, integers
from torch import Tensor

pytest.importorskip("triton", "3.5")

from fastfi.backends import triton_sums
from fastfi.backends.triton_sums import channel_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64)
# T of every width and of several turns, whole vectors and others; C past a block and single
SIZES = [(70, 1), (5, 2), (3, 4), (3, 5), (33, 16), (2, 49), (9, 64), (2, 100), (3, 300), (1, 1030)]
SIZES += [(0, 7), (3, 0), (1, 3)]

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


def by_definition(d: list[Tensor], factor: list[Tensor]) -> Tensor:
    """In float64."""
    pairs = [(t.double().cpu(), f.double().cpu()) for t, f in zip(d, factor, strict=True)]
    return torch.cat([s for t, f in pairs for s in ((t * f).sum(2), t.sum(2))], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Sums below 2^24 are exact, in any order."""
    d, factor = (
        [integers((2, *size), 60, seed + i).to(DEVICE, dtype) for i, size in enumerate(SIZES)]
        for seed in (1, 100)
    )
    got = channel_sums(d, factor)
    assert got.dtype == dtype
    assert torch.equal(got.double().cpu(), by_definition(d, factor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers(dtype: torch.dtype) -> None:
    """Two orders of summation in float64, each within (T + 2) u sum |d f|, and one rounding."""
    torch.manual_seed(7)
    sizes = [(3, 1), (2, 7), (2, 16), (1, 300)]
    d, factor = ([torch.randn(2, *size).to(DEVICE, dtype) for size in sizes] for _ in range(2))
    got, want = channel_sums(d, factor).double().cpu(), by_definition(d, factor)
    size = by_definition([t.abs() for t in d], [f.abs() for f in factor])
    bound = 2 * 302 * U * size + torch.finfo(dtype).eps / 2 * want.abs()
    assert bool(((got - want).abs() <= bound).all())


def test_float32_is_summed_in_float64() -> None:
    """1 + 300 * 2^-25 - 1: a float32 sum loses every one of them."""
    d = torch.full((1, 1, 302), 2.0**-25, device=DEVICE)
    d[0, 0, 0], d[0, 0, -1] = 1.0, -1.0
    got = channel_sums([d], [torch.ones_like(d)])
    assert got.tolist() == [[300 * 2.0**-25] * 2]


def test_programs_of_several_blocks_and_pairs_of_several_programs() -> None:
    layout, programs = triton_sums._layout(3, ((1000, 1), (40, 64), (2, 5000), (0, 4)), 4)
    first, *_, kind, blocks = layout.tolist()
    # 512, 8, 2 rows a block; the last two by vectors
    assert kind == [0, 3 + triton_sums._KINDS, 4 + triton_sums._KINDS, 1 + triton_sums._KINDS]
    assert blocks == [4, 4, 1, 4]
    assert first == [0, 2, 6, 9] and programs == 9
    sizes = [(1000, 1), (40, 64), (2, 5000), (0, 4)]
    d, factor = ([integers((3, *size), 9, 2).float().to(DEVICE) for size in sizes] for _ in "df")
    assert torch.equal(channel_sums(d, factor).double().cpu(), by_definition(d, factor))


def test_pairs_in_any_layout() -> None:
    d = [integers((2, 5, 8), 60, 1).float().to(DEVICE) for _ in range(3)]
    factor = [integers((2, 5, 8), 60, 2).float().to(DEVICE) for _ in range(3)]
    want = by_definition(d, factor)
    d[0] = d[0].mT.contiguous().mT
    factor[1] = torch.stack([factor[1], factor[1] + 1], 3)[..., 0]
    # Contiguous, from an address that no load of 16 bytes may begin at.
    d[2] = torch.cat([d[2].flatten()[:1], d[2].flatten()])[1:].view(2, 5, 8)
    assert not d[0].is_contiguous() and not factor[1].is_contiguous()
    assert d[2].is_contiguous() and d[2].data_ptr() % 16 != 0
    assert torch.equal(channel_sums(d, factor).double().cpu(), want)
    shared = [torch.ones(1, 1, 8, device=DEVICE).expand(2, 5, 8)] * 3
    assert torch.equal(channel_sums(d, shared)[:, :5], channel_sums(d, shared)[:, 5:10])


def test_samples_and_pairs_do_not_meet() -> None:
    """The same bits alone and in any batch; what is not a number stays in its row."""
    torch.manual_seed(8)
    sizes = [(3, 5), (2, 64), (1, 300)]
    d, factor = ([torch.randn(4, *size).to(DEVICE) for size in sizes] for _ in range(2))
    want = channel_sums(d, factor)
    for b in (0, 3):
        alone = channel_sums([t[b : b + 1] for t in d], [f[b : b + 1] for f in factor])
        assert torch.equal(alone[0], want[b])
    d[1][2, 1, 40] = torch.nan
    factor[0][1, 0, 4] = torch.inf
    got = channel_sums(d, factor)
    lost = torch.zeros_like(got, dtype=torch.bool)
    lost[2, [7, 9]] = True  # 2 * 3 of the first pair, then products and sums of two channels
    lost[1, 0] = True
    assert torch.equal(~got.isfinite(), lost)
    assert torch.equal(got[~lost], want[~lost])


def test_empty() -> None:
    def sums(*shapes: tuple[int, ...]) -> Tensor:
        d = [torch.ones(shape, device=DEVICE) for shape in shapes]
        return channel_sums(d, d).cpu()

    assert sums((0, 3, 7), (0, 4, 1)).shape == (0, 14)
    assert sums((2, 0, 7)).shape == (2, 0)
    assert torch.equal(sums((2, 3, 0)), torch.zeros(2, 6))


def test_refusals() -> None:
    d = [torch.ones(2, 3, 7, device=DEVICE)]
    with pytest.raises(ValueError, match=r"channel_sums: expected its factor .*\[2, 3, 7\]"):
        channel_sums(d, [d[0][..., 1:]])
    with pytest.raises(ValueError, match="channel_sums: expected as many"):
        channel_sums(d, [])
