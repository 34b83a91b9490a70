"""fastfi.baselines against dense derivatives in float64, finite differences and mpmath."""

from __future__ import annotations

from typing import Any

import architectures
import mpmath
import pytest
import torch
from dense_derivatives import B, K, build, check, curvature, dense, eigenvalues
from networks import jacobian, metric
from torch import Tensor, nn
from torch.nn.functional import log_softmax

import fastfi
from fastfi.baselines import cook_influence, jacobian_norm, max_cook_influence
from fastfi.model import logits_of

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


@pytest.mark.parametrize("outputs", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("name", ["tanh", "relu", "attentive"])
def test_against_dense_derivatives(name: str, outputs: str) -> None:
    """All three, and the direction attains the maximum, which no other direction exceeds."""
    net, x, y = build(name)
    model = {
        "logits": net,
        "log_probs": lambda x: net(x).log_softmax(1),
        "probs": lambda x: net(x).softmax(1),
    }[outputs]
    g, h = dense(net, x, y)
    check(jacobian_norm(model, x, y, outputs=outputs), g.norm(dim=1))
    v = torch.randn_like(x)
    check(cook_influence(model, x, y, 1e200 * v, outputs=outputs), curvature(g, h, v.flatten(1)))
    check(cook_influence(model, x, y, v[0], outputs=outputs), curvature(g, h, v[:1].flatten(1)))
    values = eigenvalues(g, h)
    found = max_cook_influence(model, x, y, outputs=outputs, full_output=True)
    check(found.influence, values.abs().amax(1), rtol=1e-6)
    assert (
        found.converged.all() and found.influence.shape == (B,) and (found.residual <= 1e-6).all()
    )
    if name == "tanh":
        largest = values.gather(1, values.abs().argmax(1, keepdim=True))
        assert (largest > 0).any() and (largest < 0).any()  # both ends of the spectrum
    assert found.direction.shape == x.shape and found.direction.dtype == x.dtype
    check(found.direction.flatten(1).norm(dim=1), torch.ones(B).double())
    attained = cook_influence(model, x, y, found.direction, outputs=outputs)
    check(attained, found.influence, rtol=1e-6)
    others = curvature(g, h, torch.randn(500, *g.shape, dtype=torch.float64))
    near = found.direction.flatten(1) + 1e-2 * torch.randn(100, *g.shape, dtype=torch.float64)
    top = found.influence * (1 + 1e-6)
    assert (others <= top).all() and (curvature(g, h, near) <= top).all()


def test_piecewise_linear_networks_bend_as_the_fisher_metric_says() -> None:
    """H = G, whose rank is K - 1: no more than K iterations, to working precision."""
    model, x, y = build("relu")
    z, jac = jacobian(model, x)
    g, h = metric(z, jac, y)
    found = max_cook_influence(model, x, y, tol=1e-12, full_output=True)
    check(found.influence, eigenvalues(h, g).amax(1))
    assert (found.iterations <= K).all() and found.converged.all()
    v = torch.randn_like(x)
    check(cook_influence(model, x, y, v), curvature(h, g, v.flatten(1)))


OBJECTIVES = {
    "logit": lambda z, y: z[y],
    "margin": lambda z, y: z[y] - torch.cat([z[:y], z[y + 1 :]]).max(),
    "entropy": lambda z, y: -(z.softmax(0) * log_softmax(z, 0)).sum(),
    "nll_of_others": lambda z, y: -torch.log1p(-z.softmax(0)[y]),
}


@pytest.mark.parametrize("name", [*OBJECTIVES, "linear callable", "callable"])
def test_objectives(name: str) -> None:
    model, x, _ = build("tanh")
    y = torch.tensor([0, 2, 3, 4, 1, 2, 0])
    objective: Any = name
    f = OBJECTIVES.get(name)
    if f is None:
        power = 1 if name.startswith("linear") else 3

        def f(z: Tensor, y: Tensor) -> Tensor:
            return (z**power).sum()

        def objective(z: Tensor, y: Tensor) -> Tensor:
            return (z**power).sum(1)

    g, h = dense(model, x, [int(c) for c in y], f)
    check(jacobian_norm(model, x, y, objective=objective), g.norm(dim=1))
    want = eigenvalues(g, h).abs().amax(1)
    check(max_cook_influence(model, x, y, objective=objective), want, rtol=1e-6)


def test_without_labels_the_predicted_class_counts() -> None:
    model, x, _ = build("tanh")
    y, v = model(x).argmax(1), torch.randn_like(x)
    for measure in (jacobian_norm, max_cook_influence):
        assert torch.equal(measure(model, x), measure(model, x, y))
    assert torch.equal(cook_influence(model, x, None, v), cook_influence(model, x, y, v))


@pytest.mark.parametrize("name", ["tanh", "relu", "attentive"])
def test_float32_is_close(name: str) -> None:
    """Rounding of 6e-8 in some hundred operations, magnified by 1 + g.g at most."""
    model, x, y = build(name)
    g, _ = dense(model, x, y)
    slack = 100 * 2.0**-23 * float(1 + g.square().sum(1).max())
    assert slack < 1e-2
    v = torch.randn_like(x)
    want = (
        jacobian_norm(model, x, y),
        cook_influence(model, x, y, v),
        max_cook_influence(model, x, y),
    )
    model, x = model.float(), x.float()
    got = (
        jacobian_norm(model, x, y),
        cook_influence(model, x, y, v),
        max_cook_influence(model, x, y),
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=slack, atol=slack * float(b.max()))
    assert jacobian_norm(model, x, y, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_samples_keep_their_digits(dtype: torch.dtype) -> None:
    """Logits 40 to 700 apart, where 1 - P_y is 0 in float64 and exp(-z) in no float32."""
    mpmath.mp.dps = 400
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(6, K, dtype=dtype).eval()
    spread = torch.tensor([0.0, 40.0, 120.0, 700.0], dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-8, 9, (K, 6), generator=generator) / 8)
        layer.weight[:, 0] = -torch.arange(K) / (K - 1)  # class 0 is on top
        layer.bias.zero_()
    x = torch.zeros(4, 6, dtype=dtype)
    x[:, 0] = spread
    y = torch.zeros(4, dtype=torch.int64)
    w = mpmath.matrix(layer.weight.double().tolist())
    norm, largest = [], []
    for s in spread.tolist():
        p = [mpmath.exp(-mpmath.mpf(s) * k / (K - 1)) for k in range(K)]
        p = [q / mpmath.fsum(p) for q in p]
        r = mpmath.matrix([mpmath.fsum(p[1:]) * -1, *p[1:]])  # P - e_y
        g = w.T * r
        norm.append(mpmath.norm(g))
        fisher = w.T * (mpmath.diag(p) - mpmath.matrix(p) * mpmath.matrix(p).T) * w
        n = (g.T * g)[0]
        e = (1 / mpmath.sqrt(1 + n) - 1) / n
        root = mpmath.eye(6) + e * g * g.T
        a = root * fisher * root
        values = mpmath.eigsy(a / p[1], eigvals_only=True)
        largest.append(max(abs(v) for v in values) * p[1] / mpmath.sqrt(1 + n))
    rtol = 1e3 * torch.finfo(dtype).eps
    got = jacobian_norm(layer, x, y, dtype=torch.float64)
    torch.testing.assert_close(
        got, torch.tensor([float(v) for v in norm], dtype=torch.float64), rtol=rtol, atol=0
    )
    found = max_cook_influence(layer, x, y, dtype=torch.float64, full_output=True)
    want = torch.tensor([float(v) for v in largest], dtype=torch.float64)
    torch.testing.assert_close(found.influence, want, rtol=rtol, atol=0)
    attained = cook_influence(layer, x, y, found.direction, dtype=torch.float64)
    torch.testing.assert_close(attained, want, rtol=rtol, atol=0)
    assert float(want[-1]) < 1e-70


class _Cube(torch.autograd.Function):
    """x^3 without a rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_functions_without_a_forward_mode_rule() -> None:
    net, x, y = build("tanh")
    g, h = dense(lambda x: net(x**3), x, y)
    found = max_cook_influence(lambda x: net(_Cube.apply(x)), x, y)
    check(found, eigenvalues(g, h).abs().amax(1), rtol=1e-6)


@pytest.mark.parametrize("name", ["vit", "encoder", "lstm", "packed_gru", "checkpointed", "norms"])
def test_architectures_against_differences_of_gradients(name: str) -> None:
    """The gradients are those of the networks' usual kernels, fused ones too."""
    model, x = architectures.build(name)
    x = x[:3]
    y = torch.arange(len(x)) % 2

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        loss = nn.functional.cross_entropy(logits_of(model(x)), y, reduction="sum")
        return torch.autograd.grad(loss, x)[0].flatten(1)

    v = torch.randn_like(x)
    v /= v.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
    step = 1e-4
    a, b, c, d = (gradient(x + k * step * v) for k in (-2, -1, 1, 2))
    product = (8 * (c - b) - (d - a)) / (12 * step)  # error step^4 and eps / step
    bend = (product * v.flatten(1)).sum(1).abs()
    g = gradient(x)
    want = bend / (1 + (g * v.flatten(1)).sum(1) ** 2) / (1 + g.square().sum(1)).sqrt()
    got = cook_influence(model, x, y, v)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    if name == "lstm":  # oneDNN's layer
        single = cook_influence(model.float(), x.float(), y, v)
        torch.testing.assert_close(single.double(), got, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("p", [1, 6])
@pytest.mark.parametrize("objective", ["cross_entropy", "logit"])
def test_where_nothing_bends(objective: str, p: int) -> None:
    """No gradient, or one that does not depend on x: 0, converged, with some unit direction."""
    layer = nn.Linear(p, 4).double().eval()
    if objective == "cross_entropy":
        nn.init.zeros_(layer.weight)
    x = torch.randn(3, p, dtype=torch.float64)
    found = max_cook_influence(layer, x, objective=objective, full_output=True)
    assert torch.equal(found.influence, torch.zeros(3).double())
    assert torch.equal(found.residual, torch.zeros(3).double()) and found.converged.all()
    check(found.direction.norm(dim=1), torch.ones(3).double())
    assert torch.equal(cook_influence(layer, x, None, x, objective=objective), found.influence)
    norm = jacobian_norm(layer, x, objective=objective)
    assert (norm == 0).all() if objective == "cross_entropy" else (norm > 0).all()


def test_names_and_two_classes() -> None:
    """A single logit is a two-class model; fastfi.baselines needs no import of its own."""
    assert set(fastfi.baselines.__all__) <= set(dir(fastfi.baselines))
    torch.manual_seed(8)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.arange(B) % 2

    def two(x: Tensor) -> Tensor:
        z = net(x)
        return torch.cat([torch.zeros_like(z), z], 1)

    g, h = dense(two, x, y)
    check(fastfi.baselines.jacobian_norm(net, x, y), g.norm(dim=1))
    check(
        fastfi.baselines.max_cook_influence(net, x, y), eigenvalues(g, h).abs().amax(1), rtol=1e-6
    )
