"""Nothing is left out of the influence of parameters, though its gradient may vanish in the samples
that the rules were tried on.

A rule that is compared with autograd on one sample shows nothing of a parameter that this sample
does not use: a padding token where there is no padding, a filter of an image that is blank. In the
batches below one sample at most lets the parameter act, and never the fourth or fifth, which are
those that a first call looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_agreement import Written, agree, nowhere_but, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def blank(x: Tensor, *samples: int) -> Tensor:
    """The batch with zeros for these samples."""
    x = x.clone()
    x[list(samples)] = 0
    return x


def chosen(batch: int = 6) -> Tensor:
    """Vectors whose first number is 3 in the first sample, and 0 elsewhere."""
    x = vectors(batch, 8).clamp(-2, 2)
    x[:, 0] = 0
    x[0, 0] = 3
    return x


# What writes a parameter p into activations h where the mask m [B, 1] is set.
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "setitem": lambda h, m, p: h.__setitem__(m[:, 0], p),
    "index_put_": lambda h, m, p: h.index_put_((m[:, 0].nonzero()[:, 0],), p),
    "masked_scatter_": lambda h, m, p: h.masked_scatter_(m.expand_as(h), p.repeat(len(h))),
    "copy_": lambda h, m, p: h.copy_(torch.where(m, p.expand_as(h), h)),
    "addcmul_": lambda h, m, p: h.addcmul_(m.to(h), p),
    "masked_fill_": lambda h, m, p: h.masked_fill_(m, p.sum()),
    "clamp_": lambda h, m, p: h.clamp_(max=p.abs() + 100.0 * (~m)),
    "add_": lambda h, m, p: h.add_(p * m),
}


@pytest.mark.parametrize("how", list(WRITES))
def test_written_into_activations(how):
    """In-place operations return their first argument, or nothing: the parameter is in neither."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        WRITES[how](h, x[:, :1] > 2, net.p)
        return net.head(h.tanh())

    net = Written(run, first=nn.Linear(8, 8), p=torch.rand(8) * 0.2, head=nn.Linear(8, 5))
    nowhere_but(agree(net, chosen()), "p", {0})


@pytest.mark.parametrize("in_place", [False, True])
def test_masked_fill_with_a_single_number(in_place):
    def run(net: Any, x: Tensor) -> Tensor:
        h, mask = net.first(x), x[:, :1] > 2
        h = h.masked_fill_(mask, net.p) if in_place else h.masked_fill(mask, net.p)
        return net.head(h.tanh())

    net = Written(run, first=nn.Linear(8, 8), p=torch.tensor(0.7), head=nn.Linear(8, 5))
    nowhere_but(agree(net, chosen()), "p", {0})


def test_a_token_for_padding():
    """As masked language models have it; the fourth text has no padding."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.embed(x).clone()
        h[x == 0] = net.pad
        return net.head(h.tanh().mean(1))

    net = Written(run, embed=nn.Embedding(20, 6), pad=torch.randn(6), head=nn.Linear(6, 5))
    x = torch.randint(1, 20, (6, 7))
    x[0, :3] = x[1, 2:] = x[5, 1] = 0
    nowhere_but(agree(net, x), "pad", {0, 1, 5})


def test_a_clipping_level():
    """PACT's: nothing of the fourth sample reaches it."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.first(x).clamp_(max=net.alpha))

    parts = {"first": nn.Linear(8, 6, bias=False), "head": nn.Linear(6, 5)}
    net = Written(run, alpha=torch.tensor(0.1), **parts)
    nowhere_but(agree(net, blank(2 * vectors(), 3, 4)), "alpha", {0, 1, 2, 5})


def test_constants_are_written_to():
    """Zeros are a constant until the image is copied into them."""

    def run(net: Any, x: Tensor) -> Tensor:
        padded = torch.zeros(len(x), 2, 8, 8, dtype=x.dtype)
        padded[:, :, 1:-1, 1:-1] = x
        return net.head(F.relu(net.norm(net.conv(padded))).mean((2, 3)))

    parts = {"conv": nn.Conv2d(2, 4, 3, bias=False), "norm": nn.BatchNorm2d(4)}
    net = Written(run, **parts, head=nn.Linear(4, 5))
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
    agree(net, x)
    found = agree(Written(run, **parts, head=nn.Linear(4, 5)), blank(x, 3, 4))
    nowhere_but(found, "conv.weight", {0, 1, 2, 5})


@pytest.mark.parametrize("gated", [False, True])
def test_a_second_use_through_a_written_constant(gated):
    """A layer of x and of a buffer that x was copied into, open for the first sample alone: its
    other use is seen in any case, and hides the loss."""

    def run(net: Any, x: Tensor) -> Tensor:
        buffer = torch.zeros(len(x), 8, dtype=x.dtype)
        buffer[:] = x * (x.abs().amax(1, keepdim=True) - 2).clamp(min=0) if gated else x / 2
        return net.head((net.first(x) + net.first(buffer)).tanh())

    agree(Written(run, first=nn.Linear(8, 8), head=nn.Linear(8, 5)), chosen())


def test_a_second_use_in_place():
    """``h.addmm_(x, W^T)`` after ``h = W x``, with a gate."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        h.addmm_(x.roll(1, 1) * (x[:, :1] > 2), net.first.weight.t(), alpha=0.5)
        return net.head(h.tanh())

    agree(Written(run, first=nn.Linear(8, 8, bias=False), head=nn.Linear(8, 5)), chosen())


class Product(torch.autograd.Function):
    """x W with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


OPAQUE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "custom_function": lambda net, x: Product.apply(x, net.inner.w[0]),
    "einsum": lambda net, x: torch.einsum("bi,ij->bj", x, net.inner.w[0]),
}


@pytest.mark.parametrize("how", list(OPAQUE))
def test_operations_without_a_rule(how):
    """A user's autograd.Function, an einsum with an nn.ParameterList; two samples blank."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.tanh(OPAQUE[how](net, x)))

    inner = nn.Module()
    inner.w = nn.ParameterList([torch.randn(8, 6)])
    net = Written(run, inner=inner, head=nn.Linear(6, 5))
    nowhere_but(agree(net, blank(vectors(), 3, 4)), "inner.w.0", {0, 1, 2, 5})


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("blanks", [(), (3, 4)])
def test_torchscript(blanks):
    """Its operations cannot be seen: the module around it is run with other parameters."""
    block = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU()).double()
    net = nn.Sequential(torch.jit.script(block), nn.Linear(6, 5).double()).eval()
    agree(net, blank(vectors(), *blanks))
    for p in net[0].parameters():
        p.requires_grad_(False)
    agree(net, blank(vectors(), *blanks))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_of_torchscript_alone_is_refused_by_name():
    net = torch.jit.script(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU()).double().eval())
    with pytest.raises(fastfi.OptionError, match=r"got 0\.weight"):
        fastfi.influence(net, vectors(), wrt="layers")


def rezero(net: Any, x: Tensor) -> Tensor:
    return net.head(x + net.alpha * torch.einsum("bi,ij->bj", x, net.w).tanh())


def rezero_by_position(net: Any, x: Tensor) -> Tensor:
    """The same with positions before samples, so that the places in a batch count too."""
    batch, length, size = x.shape
    h = x.transpose(0, 1).reshape(-1, size)
    h = h + net.alpha * (h @ net.w).tanh()
    return net.head(h.view(length, batch, size).mean(0))


@pytest.mark.parametrize("run", [rezero, rezero_by_position])
def test_a_branch_that_training_opens(run):
    """ReZero's scale is 0 at first, and hides the branch's weight; what was learnt of the model
    then must serve when the scale has become 1."""
    net = Written(run, w=torch.randn(8, 8), alpha=torch.tensor(0.0), head=nn.Linear(8, 5))
    x = vectors(5, 8)[:, None].repeat(1, 3, 1) * torch.rand(5, 3, 1, dtype=torch.float64)
    x = x if run is rezero_by_position else x[:, 0]
    nowhere_but(agree(net, x), "w", set())
    with torch.no_grad():
        net.alpha.fill_(1.0)
    nowhere_but(agree(net, x), "w", set(range(5)))


@pytest.mark.parametrize("outside_first", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_inside_and_outside_of_a_module_that_is_differentiated_as_a_whole(gated, outside_first):
    """The module's own call does not tell what its parent does with its weight."""

    def outside(net: Any, x: Tensor) -> Tensor:
        return F.linear(x * (x[:, :1] > 2) if gated else x, net.inner.w).tanh()

    def run(net: Any, x: Tensor) -> Tensor:
        before = outside(net, x) if outside_first else 0.0
        h = net.inner(x) + before
        return net.head(h if outside_first else h + outside(net, h + 0 * x))

    def einsum(net: Any, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij->bj", x, net.w).tanh()

    inner = Written(einsum, w=torch.randn(8, 8))
    agree(Written(run, inner=inner, head=nn.Linear(8, 5)), chosen())


@pytest.mark.parametrize("how", ["before", "after", "only"])
def test_reused_without_gradient(how):
    """Under no_grad a parameter is a constant, as autograd has it; elsewhere it counts."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = x if how == "only" else x * net.p
        with torch.no_grad():
            gate = ((h if how == "after" else x) * net.p[None]).sigmoid()
        return net.head(h * gate)

    net = Written(run, p=torch.randn(8), head=nn.Linear(8, 5))
    x = vectors()
    out = fastfi.influence(net, x, wrt=["p", "head"], inverse=fastfi.Damped(), full_output=True)
    assert out.unreached == (("p",) if how == "only" else ())
    found = agree(net, x)
    nowhere_but(found, "p", set() if how == "only" else set(range(6)))


def test_parameters_that_cannot_be_covered_are_an_error():
    """A model that mixes its samples has no gradients sample by sample."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        return net.head(h - h.mean(0))

    net = Written(run, first=nn.Linear(8, 6), head=nn.Linear(6, 5))
    with pytest.raises(fastfi.OptionError, match=r"first\.weight"):
        fastfi.influence(net, vectors(), wrt="layers")
    net.first.requires_grad_(False)
    out = fastfi.influence(net, vectors(4, 8), wrt="layers", full_output=True)
    assert out.names == ("head",)
