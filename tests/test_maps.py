"""influence_map as a public call: shapes, options, chunks, corners, errors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")


def network(shape: tuple[int, ...], classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    size = int(np.prod(shape))
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, classes))
    with torch.no_grad():
        net[3].weight.mul_(4)
    return net.eval()


def samples(batch: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(2, 7), (1, 4, 5), (3, 4, 4), (2, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("channels", ["separate", "joint", "mean"])
def test_shapes(shape: tuple[int, ...], rule: str, channels: str) -> None:
    model, x = network(shape), samples(3, shape)
    got = fastfi.influence_map(
        model, x, scales=(1, 3), channels=channels, inverse=rule, full_output=True
    )
    assert isinstance(got, fastfi.InfluenceMap)
    apart, merged = (3, 2, *shape), (3, 2, *shape[1:])
    assert got.fi.shape == (apart if channels == "separate" else merged)
    assert got.fi.dtype == torch.float32
    assert bool((got.fi >= 0).all()) and bool((got.fi > 0).any())
    if rule == "damped":
        assert got.rank is None
    else:
        assert got.rank.shape == (merged if channels == "joint" else apart)
        assert got.rank.dtype == torch.int64
        pixels = 1 if channels != "joint" else shape[0]
        assert int(got.rank[:, 0].max()) == min(4, pixels)
    log_p = model(x).double().log_softmax(1)
    assert torch.equal(got.label, log_p.argmax(1))
    assert got.log_prob.dtype == torch.float64
    torch.testing.assert_close(got.log_prob, log_p.amax(1), rtol=1e-6, atol=1e-6)
    assert got.scales == (1, 3)
    alone = fastfi.influence_map(model, x, scales=(1, 3), channels=channels, inverse=rule)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, got.fi)


def test_defaults() -> None:
    """Damped, four scales, each channel by itself, the predicted class."""
    model, x = network((2, 9, 8)), samples(2, (2, 9, 8))
    got = fastfi.influence_map(model, x)
    assert got.shape == (2, 4, 2, 9, 8)
    want = fastfi.influence_map(
        model, x, model(x).argmax(1), scales=[1, 3, 5, 7], channels="separate",
        inverse=fastfi.Damped(1e-2), objective="cross_entropy",
    )  # fmt: skip
    assert torch.equal(got, want)
    assert not torch.equal(got, fastfi.influence_map(model, x, inverse=fastfi.Damped(1e-3)))


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
def test_labels(rule: str) -> None:
    model, x = network((1, 4, 5)), samples(5, (1, 4, 5))
    y = torch.arange(5)
    got = fastfi.influence_map(model, x, y, inverse=rule, full_output=True)
    assert torch.equal(got.label, y)
    log_p = model(x).detach().double().log_softmax(1)
    torch.testing.assert_close(got.log_prob, log_p.diagonal(), rtol=1e-5, atol=1e-6)
    predicted = fastfi.influence_map(model, x, inverse=rule)
    same = log_p.argmax(1) == y
    assert 0 < int(same.sum()) < 5
    assert torch.equal(got.fi[same], predicted[same])
    for b in range(5):
        assert same[b] or not torch.equal(got.fi[b], predicted[b])


def test_dtype() -> None:
    model, x = network((1, 4, 5)), samples(2, (1, 4, 5))
    single = fastfi.influence_map(model, x)
    double = fastfi.influence_map(model, x, dtype=torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(single, double.float())
    got = fastfi.influence_map(model.double(), x.double())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, double, rtol=1e-4, atol=0.0)  # rows in float32
    assert fastfi.influence_map(model, x.double(), dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("lump", [None, 0.3])
def test_chunks_change_nothing(rule: str, lump: float | None) -> None:
    """In one chunk, one by one, and alone. float64: 1e-8 is beyond what rounding moves here."""
    model, x = network((2, 4, 5)).double(), samples(23, (2, 4, 5)).double()
    x = x * torch.linspace(0.1, 3, 23).view(-1, 1, 1, 1).double()
    y = torch.arange(23) % 5
    calls = []
    model.register_forward_hook(
        lambda m, args, out: calls.append(len(args[0])) if out.requires_grad else None
    )
    options: dict[str, Any] = {"scales": (1, 3), "inverse": rule, "lump": lump, "full_output": True}
    whole = fastfi.influence_map(model, x, y, **options)
    assert max(calls) == 23
    for budget, most in [(1, 2), (40_000, 16)]:
        calls.clear()
        got = fastfi.influence_map(model, x, y, memory_budget=budget, **options)
        assert len(calls) >= 3 and max(calls) <= most  # the first is a measurement of two
        for a, b in zip(got[:1] + got[2:4], whole[:1] + whole[2:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=0.0)
        if rule != "damped":
            assert torch.equal(got.rank, whole.rank)
    for b in (0, 11, 22):
        alone = fastfi.influence_map(model, x[b : b + 1], y[b : b + 1], **options)
        torch.testing.assert_close(alone.fi[0], whole.fi[b], rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
def test_the_same_sample_alone_and_in_a_batch(rule: str) -> None:
    """float32: 1e-4 (the contract)."""
    model, x = network((1, 6, 6)), samples(7, (1, 6, 6))
    every = fastfi.influence_map(model, x, inverse=rule)
    alone = torch.cat([fastfi.influence_map(model, x[b : b + 1], inverse=rule) for b in range(7)])
    torch.testing.assert_close(alone, every, rtol=1e-4, atol=0.0)


def test_lumping_can_only_raise_exact_maps() -> None:
    model, x = network((1, 6, 6), 12).double(), samples(4, (1, 6, 6)).double()
    full = fastfi.influence_map(model, x, inverse="exact", scales=(1, 3, 7))
    lumped = fastfi.influence_map(model, x, inverse="exact", scales=(1, 3, 7), lump=0.1)
    assert bool((lumped >= full * (1 - 1e-8)).all())
    assert bool((lumped[:, 0] > full[:, 0] * 1.01).any())
    torch.testing.assert_close(lumped[:, 2], full[:, 2], rtol=1e-8, atol=0.0)  # at full rank


def test_signals_and_volumes_are_images_of_another_shape() -> None:
    """Axes of one pixel, and axes exchanged, change nothing."""
    model, x = network((2, 4, 5)).double(), samples(3, (2, 4, 5)).double()
    image = fastfi.influence_map(model, x, scales=(1, 3))
    volume = fastfi.influence_map(model, x[:, :, None], scales=(1, 3))
    torch.testing.assert_close(volume.squeeze(3), image, rtol=1e-12, atol=0.0)

    def turned(v: Tensor) -> Tensor:
        return model(v.transpose(2, 3))

    other = fastfi.influence_map(turned, x.transpose(2, 3), scales=(1, 3))
    torch.testing.assert_close(other.transpose(3, 4), image, rtol=1e-12, atol=0.0)
    model, x = network((2, 7)).double(), samples(3, (2, 7)).double()
    signal = fastfi.influence_map(model, x, scales=(1, 3))
    row = fastfi.influence_map(model, x[:, :, None], scales=(1, 3))
    torch.testing.assert_close(row.squeeze(3), signal, rtol=1e-12, atol=0.0)


def test_outputs_and_a_single_logit() -> None:
    model, x = network((1, 4, 5)).double(), samples(3, (1, 4, 5)).double()
    want = fastfi.influence_map(model, x)
    got = fastfi.influence_map(lambda v: model(v).softmax(1), x, outputs="probs")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)
    one = network((1, 4, 5), 1).double()
    two = fastfi.influence_map(lambda v: torch.cat([0 * one(v), one(v)], 1), x)
    torch.testing.assert_close(fastfi.influence_map(one, x), two, rtol=1e-10, atol=0.0)


class Fixed(nn.Module):
    """Logits with a given Jacobian: bias + x . rows."""

    def __init__(self, bias: list[float], rows: Tensor) -> None:
        super().__init__()
        self.bias, self.rows = nn.Parameter(torch.tensor(bias).to(rows.dtype)), rows

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + (x[:, None] * self.rows).flatten(2).sum(2)


def test_values_beyond_float32_saturate() -> None:
    """1 / P_y = exp(100) is finite in float64: so is FI, in float32 its largest number."""
    rows = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model, x, y = Fixed([0.0, -1.0, -100.0], rows), torch.zeros(1, 1, 4, 4), torch.tensor([2])
    got = fastfi.influence_map(model, x, y, inverse="exact", scales=(3,))
    assert torch.equal(got, torch.full_like(got, torch.finfo(torch.float32).max))
    got = fastfi.influence_map(model, x, y, inverse="exact", scales=(3,), dtype=torch.float64)
    want = torch.tensor(100.0).double().exp() * (1 + torch.tensor(-1.0).double().exp())
    torch.testing.assert_close(got, want.expand_as(got), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("spatial", [(7,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("channels", ["separate", "joint", "mean"])
def test_infinite_where_the_label_underflows(spatial: tuple[int, ...], channels: str) -> None:
    """P_1 = exp(-800) is 0 in float64, and so is the metric: FI is infinite in windows with a pixel
    that moves class 1, and 0 elsewhere. A sample whose label is the top class has FI 0."""
    rows = torch.zeros(3, 2, *spatial, dtype=torch.float64)
    last = tuple(n - 1 for n in spatial)
    rows[(1, 0, *last)] = 1.0  # class 1 moves with one corner of channel 0
    rows[2] = 0.5
    model = Fixed([0.0, -800.0, -900.0], rows)
    x = torch.zeros(2, 2, *spatial, dtype=torch.float64)
    y = torch.tensor([1, 0])
    got = fastfi.influence_map(model, x, y, scales=(3, 1, 11), channels=channels)
    inside = torch.zeros(3, 2, *spatial, dtype=torch.bool)
    for s, radius in enumerate((1, 0, 5)):
        corner = (s, 0, *(slice(max(0, n - 1 - radius), n) for n in spatial))
        inside[corner] = True
    if channels != "separate":
        inside = inside.any(1)
    want = torch.zeros(inside.shape, dtype=torch.float64).masked_fill(inside, torch.inf)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], torch.zeros_like(want))
    assert fastfi.influence(model, x, y, inverse="damped").tolist() == [torch.inf, 0.0]


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
def test_gradients_that_are_not_finite(rule: str) -> None:
    def model(x: Tensor) -> Tensor:
        return x.sqrt().flatten(1)[:, :4]  # an infinite slope at 0

    x = torch.rand(5, 1, 3, 3) + 0.1
    x[3, 0, 0, 1] = 0
    message = "gradients of the logits.*samples 3"
    for call in (fastfi.influence_map, fastfi.influence):
        with pytest.raises(fastfi.NonFiniteError, match=message) as error:
            call(model, x, inverse=rule)
        assert error.value.indices == (3,)


NET, X = network((1, 4, 5)), samples(2, (1, 4, 5))


def raises(kind: type[Exception], *parts: str) -> Any:
    return pytest.raises(kind, match=".*".join(map(re.escape, parts)))


@pytest.mark.parametrize(
    "scales",
    [(), (2,), (1, 4), (0,), (-1,), (3, 3), (1.0,), ("1",), "13", 3, None, (None,), (1.5, 3)],
)
def test_scales_are_refused(scales: Any) -> None:
    with raises(fastfi.OptionError, "scales: expected distinct odd numbers", repr(scales)):
        fastfi.influence_map(NET, X, scales=scales)


@pytest.mark.parametrize("scales", [[1, 3], np.array([1, 3]), range(1, 4, 2), torch.tensor([1, 3])])
def test_scales_of_any_sequence(scales: Any) -> None:
    want = fastfi.influence_map(NET, X, scales=(1, 3), full_output=True)
    if isinstance(scales, Tensor):
        scales = scales.tolist()
    got = fastfi.influence_map(NET, X, scales=scales, full_output=True)
    assert torch.equal(got.fi, want.fi)
    assert got.scales == (1, 3)
    assert all(type(s) is int for s in got.scales)


@pytest.mark.parametrize("channels", ["rgb", None, 3, "Joint"])
def test_channels_are_refused(channels: Any) -> None:
    with raises(fastfi.OptionError, "channels: expected one of 'separate'", repr(channels)):
        fastfi.influence_map(NET, X, channels=channels)


@pytest.mark.parametrize("shape", [(2, 20), (2, 1, 1, 1, 4, 5)])
def test_inputs_without_neighbourhoods_are_refused(shape: tuple[int, ...]) -> None:
    with raises(fastfi.InputError, "x: expected signals [B, C, T]", str(list(shape)), "region"):
        fastfi.influence_map(NET, X.reshape(shape))


def test_other_errors_are_those_of_influence() -> None:
    with raises(fastfi.OptionError, "dtype", "float16"):
        fastfi.influence_map(NET, X, dtype=torch.float16)
    with raises(fastfi.OptionError, "inverse", "pinv"):
        fastfi.influence_map(NET, X, inverse="pinv")
    with raises(fastfi.OptionError, "objective"):
        fastfi.influence_map(NET, X, objective="loss")
    with raises(fastfi.OptionError, "lump"):
        fastfi.influence_map(NET, X, lump=2.0)
    with raises(fastfi.OptionError, "memory_budget"):
        fastfi.influence_map(NET, X, memory_budget=0)
    with raises(fastfi.LabelError, "samples 1"):
        fastfi.influence_map(NET, X, torch.tensor([0, 5]))
    with raises(fastfi.InputError, "floating-point"):
        fastfi.influence_map(NET, X.to(torch.uint8))
    with raises(fastfi.NonFiniteError, "samples 1"):
        fastfi.influence_map(NET, torch.cat([X[:1], X[1:] * torch.nan]))
    training = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(20, 3)).train()
    with raises(fastfi.ModelModeError, "Dropout"):
        fastfi.influence_map(training, X)
