"""What the theory says of the influence of parameters, through the public function alone."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_jacobian import layer_jacobian
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastfi

EPS = 2.0**-52

pytestmark = pytest.mark.usefixtures("one_thread")


def bottleneck(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network whose first two layers act through two numbers only, so that their rank is 2
    among 6 contrasts and their Exact FI is not the closed form."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 7))
    net = net.double().eval()
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight.normal_(0.0, 1.5 / layer.in_features**0.5)
            layer.bias.normal_(0.0, 0.7)
    return net, torch.randn(4, 5, dtype=torch.float64), torch.arange(4) + 1


def resolution(net: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """The relative uncertainty [B, L] of the projections that FI measures: 1000 eps64 kappa^2."""
    jacobian = layer_jacobian(net, x)
    rows = [[jacobian.selected(i, n).condition() ** 2 for n in names] for i in range(len(x))]
    return 1000 * EPS * torch.tensor(rows, dtype=torch.float64)


def assert_same_length(got: Tensor, want: Tensor, top: Tensor, delta: Tensor) -> None:
    """sqrt(FI) is the length of a projection of a vector of length sqrt(top); the projection is
    known to delta."""
    got, want, top = got.sqrt(), want.sqrt(), top.sqrt()[:, None]
    assert bool(((got - want).abs() <= delta * top).all())


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), log_scale=st.floats(-3.0, 3.0))
def test_scaling_one_layer_and_the_next_back(seed: int, log_scale: float) -> None:
    """Theorem 1: c W_1 and W_2 / c with a ReLU between are the same network in other coordinates,
    and each layer's Exact FI is unchanged. (Sharpness measures that change by this are why the
    paper asks for invariance.)"""
    net, x, y = bottleneck(seed)
    other = copy.deepcopy(net)
    c = torch.tensor(log_scale, dtype=torch.float64).exp()
    with torch.no_grad():
        other[0].weight *= c
        other[0].bias *= c
        other[2].weight /= c
    # A layer's weight and bias scale alike in every layer but the second, whose bias does not: its
    # rows grow more ill-conditioned by up to c or 1 / c.
    names = ["0", "2", "4"]
    delta = torch.maximum(resolution(net, x, names), resolution(other, x, names))
    clear = delta.amax(1) < 1e-6  # else a tanh is saturated, and float64 cannot tell the rank
    if not bool(clear.any()):
        return
    x, y, delta = x[clear], y[clear], delta[clear]
    want = fastfi.influence(net, x, y, wrt="layers", full_output=True)
    got = fastfi.influence(other, x, y, wrt="layers", full_output=True)
    assert torch.equal(got.rank, want.rank)
    assert bool((want.rank[:, :2] <= 2).all()) and bool((want.rank[:, 2] == 6).all())
    top = torch.expm1(-want.log_prob)
    assert_same_length(got.fi, want.fi, top, delta)
    for wrt in ("params", "all"):
        a = fastfi.influence(net, x, y, wrt=wrt)
        b = fastfi.influence(other, x, y, wrt=wrt)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0.0)


def test_scaling_does_change_the_other_rules() -> None:
    """Had the test above been blind, it would pass for them too."""
    net, x, y = bottleneck(1)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight *= 5.0
        other[0].bias *= 5.0
        other[2].weight /= 5.0
    torch.testing.assert_close(net(x), other(x), rtol=1e-12, atol=1e-12)
    for rule in (fastfi.Damped(), fastfi.Truncated(0.3)):
        before = fastfi.influence(net, x, y, wrt="layers", inverse=rule)
        after = fastfi.influence(other, x, y, wrt="layers", inverse=rule)
        assert bool(((before - after).abs() > 1e-3 * before).any())


def test_weight_normalisation_is_a_change_of_coordinates() -> None:
    """W = g v / |v| has one coordinate too many for each row, and a surjective derivative: the same
    changes of W, so the same Exact FI."""
    net, x, y = bottleneck(2)
    want = fastfi.influence(net, x, y, wrt="layers", full_output=True)
    other = copy.deepcopy(net)
    parametrizations.weight_norm(other[0])
    parametrizations.weight_norm(other[2])
    got = fastfi.influence(other, x, y, wrt="layers", full_output=True)
    assert got.names == want.names == ("0", "2", "4")
    assert torch.equal(got.rank, want.rank)
    delta = torch.maximum(
        resolution(net, x, ["0", "2", "4"]), resolution(other, x, ["0", "2", "4"])
    )
    assert_same_length(got.fi, want.fi, torch.expm1(-want.log_prob), delta)
    assert parametrize.is_parametrized(other[0])


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_more_coordinates_have_more_influence(seed: int) -> None:
    """A weight, its layer, all parameters, and the input with them, for Exact and for Damped with
    one tau: FI = u^T f(M) u with f increasing, and M grows by each block that joins."""
    net, x, y = bottleneck(seed)
    weights, names = ["0.weight", "2.weight", "4.weight"], ["0", "2", "4"]
    delta = resolution(net, x, weights) + resolution(net, x, names)
    clear = delta.amax(1) < 1e-6
    if not bool(clear.any()):
        return
    x, y, delta = x[clear], y[clear], delta[clear]
    parts = fastfi.influence(net, x, y, wrt=weights)
    layers = fastfi.influence(net, x, y, wrt="layers")
    params = fastfi.influence(net, x, y, wrt="params", full_output=True)
    closed = torch.expm1(-params.log_prob)
    slack = 2 * delta * closed[:, None]
    assert bool((parts <= layers + slack).all())
    assert bool((layers <= params.fi[:, None] + slack).all())
    torch.testing.assert_close(params.fi, closed, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(fastfi.influence(net, x, y, wrt="all"), closed, rtol=1e-12, atol=0.0)
    rule = fastfi.Damped(1e-2)
    one = fastfi.influence(net, x, y, wrt=["0.weight", "0", "0.bias", "4"], inverse=rule)
    whole = fastfi.influence(net, x, y, wrt="params", inverse=rule)
    assert bool((one[:, 0] <= one[:, 1] * (1 + 1e-9)).all())
    assert bool((one[:, 2] <= one[:, 1] * (1 + 1e-9)).all())
    assert bool((one <= whole[:, None] * (1 + 1e-9)).all())
    assert bool((whole <= closed * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder", "lstm", "conv3d"])
def test_full_rank_is_the_closed_form_with_and_without_rows(name: str) -> None:
    """All parameters by their proof; the same blocks without the head's bias by their Gram
    matrices; and the oracle's."""
    net, x = build(name)
    jacobian = layer_jacobian(net, x)
    y = torch.arange(len(x)) % jacobian.logits.shape[1]
    closed = [jacobian.params(i).closed_form(k) for i, k in enumerate(y.tolist())]
    want = torch.tensor(closed, dtype=torch.float64)
    torch.testing.assert_close(
        fastfi.influence(net, x, y, wrt="params"), want, rtol=1e-12, atol=0.0
    )
    every = list(jacobian.index)
    weight = next(n for n in reversed(every) if n.endswith("weight"))
    out = fastfi.influence(net, x, y, wrt=[every[0], weight], full_output=True)
    assert out.closed_form == ()
    for column, chosen in enumerate((every[0], weight)):
        full = [jacobian.selected(i, chosen).rank() == len(jacobian.logits[0]) - 1
                for i in range(len(x))]  # fmt: skip
        assert any(full)
        torch.testing.assert_close(out.fi[full, column], want[full], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("name", ["cnn", "vit", "norms", "swin", "embedding_bag_mean"])
def test_the_layers_metrics_add_up_to_that_of_all_parameters(name: str) -> None:
    """For large alpha, alpha trace(G) FI -> |h|^2, which is the sum of the layers'. Shared weights
    are the exception: they count in each layer that owns them."""
    net, x = build(name)
    rule = fastfi.Damped(1e9)
    layers = fastfi.influence(net, x, wrt="layers", inverse=rule)
    params = fastfi.influence(net, x, wrt="params", inverse=rule)
    # FI = |h|^2 / tau times 1 - O(1 / alpha)
    torch.testing.assert_close(layers.sum(1), params, rtol=1e-8, atol=0.0)
    net, x = build("tied_embedding")
    layers = fastfi.influence(net, x, wrt="layers", inverse=rule)
    params = fastfi.influence(net, x, wrt="params", inverse=rule)
    once = fastfi.influence(net, x, wrt=["embed.weight"], inverse=rule)[:, 0]
    torch.testing.assert_close(layers.sum(1), params + once, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("wrt", ["layers", "params", "all"])
def test_little_damping_is_exact(wrt: str) -> None:
    """FI_tau -> FI from below, with an error of tau over the metric's smallest eigenvalue."""
    net, x = build("cnn")
    exact = fastfi.influence(net, x, wrt=wrt)
    last = torch.zeros_like(exact)
    for alpha in (1e-1, 1e-3, 1e-5, 1e-8):
        damped = fastfi.influence(net, x, wrt=wrt, inverse=fastfi.Damped(alpha))
        assert bool((damped >= last).all()) and bool((damped <= exact * (1 + 1e-9)).all())
        last = damped
    torch.testing.assert_close(last, exact, rtol=1e-3, atol=0.0)


def test_damping_ignores_a_uniform_scale_of_all_parameters() -> None:
    """tau follows the trace of all parameters' metric, for a layer as for all of them."""

    class Scaled(nn.Module):
        """The same network, with coordinates in other units."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(5)
            weights = [torch.randn(6, 8), torch.randn(8), torch.randn(8, 5) / 2]
            self.factor = factor
            self.weights = nn.ParameterList([w.double() / factor for w in weights])

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = (self.factor * w for w in self.weights)
            return torch.tanh(x @ a + b) @ c

    x = torch.randn(4, 6, dtype=torch.float64)
    for wrt in ("params", ["weights.0", "weights.2"]):
        before = fastfi.influence(Scaled(1.0).eval(), x, wrt=wrt, inverse="damped")
        after = fastfi.influence(Scaled(64.0).eval(), x, wrt=wrt, inverse="damped")
        torch.testing.assert_close(after, before, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("rule", ["exact", "damped", "truncated"])
@pytest.mark.parametrize("gain", [20.0, 200.0])
def test_confident_networks_stay_finite(rule: str, gain: float) -> None:
    """Never negative, never NaN, below the closed form, whatever the confidence."""
    net, x, y = bottleneck(3)
    with torch.no_grad():
        net[4].weight *= gain
    for labels in (None, y):
        for wrt in ("layers", "params", ["0.bias", "2.weight"]):
            out = fastfi.influence(net, x, labels, wrt=wrt, inverse=rule, full_output=True)
            assert bool((out.fi >= 0).all()) and bool(out.fi.isfinite().all())
            if rule != "truncated":
                closed = torch.expm1(-out.log_prob)
                fi = out.fi.reshape(4, -1)
                assert bool((fi <= closed[:, None] * (1 + 1e-6) + 1e-15).all())
