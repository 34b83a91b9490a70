"""region_influence: labelled regions of pixels."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from networks import jacobian, metric, mlp
from torch import Tensor, nn

import fastfi
from fastfi import regions as module

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = ("exact", "truncated", "damped")


def network(shape: tuple[int, ...], classes: int = 6, seed: int = 0) -> nn.Module:
    """Float64 and smooth."""
    return nn.Sequential(nn.Flatten(), mlp(int(np.prod(shape)), classes, seed)).eval()


def samples(batch: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).double()


def pinned(model: nn.Module, x: Tensor, y: Tensor, inside: Tensor, alpha: float) -> Tensor:
    """FI_tau of one region by its definition, p x p: inside is a bool mask like one sample of x."""
    z, jac = jacobian(model, x)
    g, h = metric(z, jac, y)
    tau = alpha * g.diagonal(dim1=1, dim2=2).sum(1)
    at = inside.flatten().nonzero().flatten()
    g, h = g[:, at][:, :, at], h[:, at]
    damped = g + tau[:, None, None] * torch.eye(len(at)).double()
    return (h * torch.linalg.solve(damped, h)).sum(1)


@pytest.mark.parametrize("shape", [(12,), (2, 7), (2, 3, 4), (1, 2, 3, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_one_region_of_everything_is_influence(shape: tuple[int, ...], rule: str) -> None:
    model, x = network(shape), samples(4, shape)
    spatial = shape[1:] or shape
    got = fastfi.region_influence(
        model, x, None, torch.zeros(spatial, dtype=torch.int64), inverse=rule, full_output=True
    )
    want = fastfi.influence(model, x, inverse=rule, full_output=True)
    assert isinstance(got, fastfi.RegionInfluence)
    assert got.fi.shape == (4, 1)
    assert got.fi.dtype == torch.float64
    # sums of the same products in another order; p > K - 1, rows of condition below 100
    torch.testing.assert_close(got.fi[:, 0], want.fi, rtol=1e-11, atol=0.0)
    assert torch.equal(got.label, want.label)
    assert torch.equal(got.log_prob, want.log_prob)
    if rule == "damped":
        assert got.rank is None
    else:
        assert got.rank.dtype == torch.int64
        assert torch.equal(got.rank[:, 0], want.rank)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 7), (1, 2, 3, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_regions_of_one_pixel_are_a_joint_map(shape: tuple[int, ...], rule: str) -> None:
    model, x = network(shape), samples(3, shape)
    count = int(np.prod(shape[1:]))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    got = fastfi.region_influence(model, x, None, order.reshape(shape[1:]), inverse=rule,
                                  full_output=True)  # fmt: skip
    want = fastfi.influence_map(model, x, scales=(1,), channels="joint", inverse=rule,
                                full_output=True)  # fmt: skip
    assert got.fi.shape == (3, count)
    torch.testing.assert_close(got.fi[:, order], want.fi.flatten(1), rtol=1e-9, atol=0.0)
    if rule != "damped":
        assert torch.equal(got.rank[:, order], want.rank.flatten(1))


def test_regions_by_their_definition() -> None:
    """Unconnected regions, background, and a region without pixels, in every channel."""
    shape = (2, 3, 4)
    model, x = network(shape), samples(4, shape)
    y = torch.tensor([0, 5, 2, 3])
    regions = torch.tensor([[0, -1, 3, 0], [1, 1, -1, 3], [0, -1, 1, 3]])  # no pixel has 2
    got = fastfi.region_influence(model, x, y, regions, inverse=fastfi.Damped(0.05))
    assert got.shape == (4, 4)
    for r in range(4):
        inside = (regions == r).expand(shape)
        if r == 2:
            assert torch.equal(got[:, r], torch.zeros(4).double())
            continue
        want = pinned(model, x, y, inside, 0.05)
        torch.testing.assert_close(got[:, r], want, rtol=1e-11, atol=0.0)
    exact = fastfi.region_influence(model, x, y, regions, inverse="exact", full_output=True)
    # 2 channels of 3, 3, 0, 3 pixels, and K - 1 = 5
    assert exact.rank.tolist() == [[5, 5, 0, 5]] * 4
    assert bool((exact.fi[:, 2] == 0).all())
    truncated = fastfi.region_influence(model, x, y, regions, inverse="truncated", full_output=True)
    assert bool((truncated.fi[:, 2] == 0).all()) and bool((truncated.rank[:, 2] == 0).all())
    assert exact.label.tolist() == y.tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lump", [None, 0.3])
@pytest.mark.parametrize("budget", [None, 1, 20_000])
def test_a_map_for_each_sample(rule: str, lump: float | None, budget: int | None) -> None:
    """Each sample keeps its own regions, in chunks and sorted by lumped classes too."""
    shape = (2, 4, 5)
    model = network(shape)
    x = samples(21, shape) * torch.linspace(0.1, 3, 21).double().view(-1, 1, 1, 1)
    y = torch.arange(21) % 6
    regions = torch.from_numpy(np.random.default_rng(3).integers(-1, 4, (21, 4, 5)))
    regions[0] = regions[0].clamp(max=1)
    options: dict[str, Any] = {"inverse": rule, "lump": lump, "full_output": True}
    got = fastfi.region_influence(model, x, y, regions, memory_budget=budget, **options)
    assert got.fi.shape == (21, 4)
    assert torch.equal(got.label, y)
    for b in range(21):
        own = fastfi.region_influence(model, x[b : b + 1], y[b : b + 1], regions[b], **options)
        count = own.fi.shape[1]
        assert count == (2 if b == 0 else 4)
        torch.testing.assert_close(got.fi[b, :count], own.fi[0], rtol=1e-8, atol=0.0)
        assert bool((got.fi[b, count:] == 0).all())
        if rule != "damped":
            assert torch.equal(got.rank[b, :count], own.rank[0])
        torch.testing.assert_close(got.log_prob[b], own.log_prob[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_many_regions_are_solved_in_blocks(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 4, 5)
    model, x = network(shape), samples(3, shape)
    regions = torch.arange(20).reshape(4, 5)
    shared = fastfi.region_influence(model, x, None, regions, inverse=rule, full_output=True)
    each = regions.expand(3, 4, 5)
    for numbers in (1, 7 * 3 * 25):  # one region at a time; seven
        monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * numbers)
        for maps in (regions, each):
            got = fastfi.region_influence(model, x, None, maps, inverse=rule, full_output=True)
            torch.testing.assert_close(got.fi, shared.fi, rtol=1e-11, atol=0.0)
            if rule != "damped":
                assert torch.equal(got.rank, shared.rank)


def test_flat_inputs() -> None:
    model, x = mlp(12, 6, 4), samples(3, (12,))
    y = torch.tensor([1, 2, 3])
    regions = torch.tensor([0, 0, 1, -1, 1, 1, 2, 2, -1, 0, 2, 2])
    got = fastfi.region_influence(model, x, y, regions)
    for r in range(3):
        want = pinned(model, x, y, regions == r, 1e-2)
        torch.testing.assert_close(got[:, r], want, rtol=1e-11, atol=0.0)
    rows = fastfi.region_influence(model, x, y, regions.expand(3, 12))
    torch.testing.assert_close(rows, got, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_regions_of_windows_are_windows(rule: str) -> None:
    shape = (1, 6, 6)
    model, x = network(shape), samples(2, shape)
    regions = (torch.arange(6) // 3)[:, None] * 2 + torch.arange(6) // 3  # four 3 x 3 patches
    got = fastfi.region_influence(model, x, None, regions, inverse=rule)
    maps = fastfi.influence_map(model, x, scales=(3,), inverse=rule)
    centres = maps[:, 0, 0, 1::3, 1::3].flatten(1)
    torch.testing.assert_close(got, centres, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_integers_of_any_width(dtype: torch.dtype) -> None:
    model, x = network((2, 3, 4)), samples(2, (2, 3, 4))
    regions = torch.arange(12).reshape(3, 4) // 5
    want = fastfi.region_influence(model, x, None, regions)
    assert torch.equal(fastfi.region_influence(model, x, None, regions.to(dtype)), want)
    assert torch.equal(fastfi.region_influence(model, x, None, regions.numpy()), want)
    assert torch.equal(fastfi.region_influence(model, x, None, regions.tolist()), want)


def test_results_and_their_dtype() -> None:
    model, x = network((2, 3, 4)).float(), samples(2, (2, 3, 4)).float()
    regions = torch.arange(12).reshape(3, 4) // 5
    single = fastfi.region_influence(model, x, None, regions)
    double = fastfi.region_influence(model, x, None, regions, dtype=torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(single, double.float())


def test_infinite_where_the_label_underflows() -> None:
    """P_y = exp(-800): infinite in the region that moves class y, 0 in the other."""
    bias = torch.tensor([0.0, -800.0, -900.0]).double()
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 3.0]]).double()

    def model(x: Tensor) -> Tensor:
        return x @ weight.T + bias

    x = torch.zeros(2, 2, dtype=torch.float64)
    got = fastfi.region_influence(model, x, torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert got.tolist() == [[torch.inf, 0.0], [0.0, 0.0]]


NET, X = network((2, 3, 4)), samples(2, (2, 3, 4))
GOOD = torch.zeros(3, 4, dtype=torch.int64)


def raises(kind: type[Exception], *parts: str) -> Any:
    return pytest.raises(kind, match=".*".join(map(re.escape, parts)))


@pytest.mark.parametrize(
    ("regions", "expected", "came"),
    [
        (torch.zeros(4, 3).long(), "of shape [3, 4], or [2, 3, 4]", "[4, 3]"),
        (torch.zeros(2, 3, 4, 1).long(), "of shape [3, 4], or [2, 3, 4]", "[2, 3, 4, 1]"),
        (torch.zeros(1, 3, 4).long(), "of shape [3, 4], or [2, 3, 4]", "[1, 3, 4]"),
        (torch.zeros(12).long(), "of shape [3, 4]", "[12]"),
        (torch.zeros(()).long(), "of shape [3, 4]", "[]"),
        (torch.zeros(3, 4), "integers", "torch.float32"),
        (torch.zeros(3, 4).bool(), "integers", "torch.bool"),
        (GOOD - 2, "values from -1 (background) up", "from -2 to -2"),
        (GOOD - 1, "at least one region", "from -1 to -1"),
        (GOOD.index_fill(0, torch.tensor([1]), -7), "values from -1", "from -7 to 0"),
        (None, "expected integers", "got None"),
        ("patches", "expected integers", "str"),
    ],
)
def test_regions_are_refused(regions: Any, expected: str, came: str) -> None:
    with raises(fastfi.InputError, "regions: ", expected, came):
        fastfi.region_influence(NET, X, None, regions)


def test_other_errors_are_those_of_influence() -> None:
    with raises(fastfi.OptionError, "dtype"):
        fastfi.region_influence(NET, X, None, GOOD, dtype=torch.float16)
    with raises(fastfi.OptionError, "inverse"):
        fastfi.region_influence(NET, X, None, GOOD, inverse="pinv")
    with raises(fastfi.LabelError, "samples 0"):
        fastfi.region_influence(NET, X, torch.tensor([6, 0]), GOOD)

    def slope(x: Tensor) -> Tensor:
        return x.sqrt().flatten(1)[:, :4]

    x = torch.rand(3, 2, 3, 4) + 0.1
    x[2, 0, 0, 1] = 0
    for rule in RULES:
        with raises(fastfi.NonFiniteError, "gradients of the logits", "samples 2"):
            fastfi.region_influence(slope, x, None, GOOD, inverse=rule)
