"""fastfi.baselines: batches, chunks, modes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_derivatives import B, K, build, check
from networks import mlp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastfi
from fastfi.baselines import cook_influence, jacobian_norm, max_cook_influence

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


@pytest.mark.parametrize("name", ["tanh", "relu", "attentive"])
def test_a_score_does_not_depend_on_the_batch(name: str) -> None:
    model, x, y = build(name)
    v = torch.randn_like(x)
    measures = [
        lambda at, **options: jacobian_norm(model, x[at], y[at], **options),
        lambda at, **options: cook_influence(model, x[at], y[at], v[at], **options),
        lambda at, **options: max_cook_influence(model, x[at], y[at], **options),
    ]
    for measure in measures:
        together = measure(slice(None))
        check(torch.cat([measure([i]) for i in range(B)]), together, rtol=1e-9)
        check(measure(slice(None), memory_budget=1), together, rtol=1e-9)


class Watched(nn.Module):
    """Notes the batches that a network is called with."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.net(x)


def test_samples_that_stopped_cost_no_products() -> None:
    tanh, x, y = build("tanh")

    def net(x: Tensor) -> Tensor:
        return tanh(nn.functional.relu(x - 1))

    x[:4], x[4:] = 0.0, x[4:].abs() + 1.1  # no derivatives in the first
    watched = Watched(net)
    found = max_cook_influence(watched, x, y, full_output=True)
    assert (found.iterations[:4] == 1).all() and (found.iterations[4:] > 1).all()
    assert watched.sizes[:2] == [7, 3]
    alone = max_cook_influence(net, x[4:], y[4:], full_output=True)
    for mine, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(mine[4:], theirs, rtol=1e-6, atol=1e-6)


def test_memory_is_measured_and_bounds_the_chunks() -> None:
    net, x, y = build("relu")
    x, y = x.repeat(20, 1, 1, 1), y.repeat(20)  # 140 samples
    watched = Watched(net)
    want = max_cook_influence(watched, x, y)
    assert watched.sizes[:2] == [2, 140]
    watched.sizes.clear()
    # The basis and 6 vectors of 36 float64 numbers, besides activations.
    each = (36 + 6) * 36 * 8
    check(max_cook_influence(watched, x, y, memory_budget=20 * each), want, rtol=1e-9)
    assert max(watched.sizes) < 20
    fewer = max_cook_influence(watched, x, y, memory_budget=20 * each, max_iterations=6)
    check(fewer, want, rtol=1e-6)


def test_attention_is_as_before_afterwards() -> None:
    model, x, y = build("attentive")

    def flags() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    inside: list[tuple[bool, ...]] = []

    def noting(x: Tensor) -> Tensor:
        inside.append(flags())
        return model(x)

    before = flags()
    max_cook_influence(noting, x, y)
    assert inside[0] == (False, False, True) and flags() == before
    with pytest.raises(fastfi.NonFiniteError):
        max_cook_influence(lambda x: model(x) / 0, x, y)
    assert flags() == before


class _Once(torch.autograd.Function):
    """x^3, to be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("name", ["once_differentiable", "beside", "flash_attention"])
def test_operations_that_cannot_be_differentiated_twice(name: str) -> None:
    """Even where only a part of the gradient passes through them."""
    net, x, y = build("attentive")

    def odd(x: Tensor) -> Tensor:
        if name == "flash_attention":
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return net(x)
        return net(_Once.apply(x)) + (net(x) if name == "beside" else 0)

    assert jacobian_norm(odd, x, y).isfinite().all()
    match = "differentiate twice.*" + (name if name != "beside" else "once_differentiable")
    for measure in (lambda: max_cook_influence(odd, x, y), lambda: cook_influence(odd, x, y, x)):
        with pytest.raises(fastfi.OutputError, match=match):
            measure()


def test_other_errors_of_the_model_are_its_own() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("derivative of nothing")

    with pytest.raises(RuntimeError, match="derivative of nothing") as caught:
        max_cook_influence(broken, torch.randn(2, 3))
    assert not isinstance(caught.value, fastfi.FastfiError)


def test_too_few_iterations_are_reported() -> None:
    model, x, y = build("attentive")
    want = max_cook_influence(model, x, y)
    found = max_cook_influence(model, x, y, max_iterations=1, full_output=True)
    assert not found.converged.any() and (found.iterations == 1).all()
    assert (found.residual > 1e-6).all() and (found.influence <= want).all()
    with pytest.warns(
        RuntimeWarning, match="7 of 7 samples did not converge to tol=1e-06 in 1 iter"
    ):
        got = max_cook_influence(model, x, y, max_iterations=1)
    assert torch.equal(got, found.influence)
    loose = max_cook_influence(model, x, y, tol=0.5, full_output=True)
    assert (loose.iterations < max_cook_influence(model, x, y, full_output=True).iterations).all()


@pytest.mark.parametrize("where", ["inference", "no_grad", "autocast"])
def test_the_callers_modes_do_not_matter(where: str) -> None:
    net, x, y = build("tanh")
    if where == "autocast":
        net, x = net.float(), x.float()
    v = torch.randn_like(x)
    want = max_cook_influence(net, x, y), cook_influence(net, x, y, v), jacobian_norm(net, x, y)
    modes = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    with modes[where]:
        here, h = x.clone(), v.clone()
        got = max_cook_influence(net, here, y), cook_influence(net, here, y, h)
        got = (*got, jacobian_norm(net, here, y))
    for a, b in zip(got, want, strict=True):
        rtol = 0.2 if where == "autocast" else 0.0  # bfloat16 has 8 bits
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.max()))
        assert not a.requires_grad
    x.requires_grad_()
    assert not max_cook_influence(net, x, y).requires_grad and x.grad is None
    assert all(p.grad is None for p in net.parameters())


def _root(x: Tensor) -> Tensor:
    """Its second derivative is infinite at 0."""
    return torch.cat([x.abs() ** 1.5 * x.sign(), x], 1)


def test_bad_arguments() -> None:
    net, x, y = build("tanh")
    v = torch.randn_like(x)
    calls = {
        "norm": lambda *a, **k: jacobian_norm(*a, **k),
        "cook": lambda m, x, y=None, **k: cook_influence(m, x, y, torch.ones(x.shape[1:]), **k),
        "max": lambda *a, **k: max_cook_influence(*a, **k),
    }
    noisy = nn.Sequential(net, nn.Dropout(0.5))
    for call in calls.values():
        with pytest.raises(fastfi.ModelModeError, match=r"call model.eval"):
            call(noisy.train(), x, y)
        with pytest.raises(fastfi.LabelError, match="from 0 to 4, got 9 in samples 1, 3"):
            call(net, x, torch.tensor([0, 9, 0, 9, 0, 0, 0]), memory_budget=1)
        with pytest.raises(fastfi.NonFiniteError, match=r"logits, got NaN .* in samples 5"):
            poison = torch.arange(B)[:, None].double() == 5
            both = torch.cat([x, poison], 1)
            call(lambda a: net(a[:, :12]) + a[:, 12:] / (1 - a[:, 12:]), both, y, memory_budget=1)
        with pytest.raises(fastfi.OutputError, match="got a tensor without a gradient"):
            call(lambda x: net(x).detach(), x, y)
        with pytest.raises(fastfi.OutputError, match="logits that depend on x"):
            call(lambda x: net(torch.zeros_like(x)), x, y)
        with pytest.raises(fastfi.InputError, match="floating-point"):
            call(net, x.long(), y)
        with pytest.raises(fastfi.OptionError, match="objective"):
            call(net, x, y, objective="loss")
        with pytest.raises(fastfi.OptionError, match=r"objective .*one value per sample"):
            call(net, x, y, objective=lambda z, y: z.sum())
        with pytest.raises(fastfi.OptionError, match="dtype"):
            call(net, x, y, dtype=torch.float16)
    odd = x.clone()
    odd[[2, 6], 3] = 0.0
    twice = mlp(24, K, 4)
    for measure in (calls["cook"], calls["max"]):
        with pytest.raises(fastfi.NonFiniteError, match=r"second derivatives .* in samples 6"):
            measure(lambda x: twice(_root(x)), odd[[0, 1, 3, 4, 5, 0, 2]], y)
        with pytest.raises(fastfi.NonFiniteError, match=r"second derivatives .* in samples 2"):
            measure(lambda x: twice(_root(x)), odd, y, memory_budget=1)
    assert jacobian_norm(lambda x: twice(_root(x)), odd, y).isfinite().all()
    wrong = {
        "shape": v[:3],
        "got list": v.tolist(),
        "complex": v.to(torch.complex64),
        "zeros alone in directions 1, 4": v * torch.tensor([1, 0, 1, 1, 0, 1, 1])[:, None],
    }
    for match, direction in wrong.items():
        with pytest.raises(fastfi.InputError, match=f"direction: .*{match}"):
            cook_influence(net, x, y, direction)
    with pytest.raises(fastfi.NonFiniteError, match=r"direction: .* in samples 3"):
        cook_influence(net, x, y, v / torch.tensor([1, 1, 1, 0, 1, 1, 1])[:, None])
    for tol in (0, 1.0, -1, float("nan"), "1e-4", None, True):
        with pytest.raises(fastfi.OptionError, match="tol: expected a number between 0 and 1"):
            max_cook_influence(net, x, y, tol=tol)
    for steps in (0, -1, 2.0, None, True):
        with pytest.raises(fastfi.OptionError, match="max_iterations: expected a whole number"):
            max_cook_influence(net, x, y, max_iterations=steps)
