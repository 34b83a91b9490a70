"""Parameters and models of unusual kinds: parts of larger tensors, single numbers of another
precision, tied, spread out; and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_agreement import DAMPED, Written, agree, einsum, mlp, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import fastfi
from fastfi.layers import formed, products
from fastfi.layers.cotangents import Cotangents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sliced(kind: str) -> tuple[nn.Module, Tensor]:
    """A network whose parameter is part of a larger tensor."""
    net, x = mlp(), vectors()
    big = vectors(10, 20)
    if kind == "every second number":
        net[0].bias = nn.Parameter(big[0, ::2])
    elif kind == "columns":
        net[0].weight = nn.Parameter(big[:, 3:11])
    elif kind == "one number":
        net[0].bias = nn.Parameter(torch.zeros(1, dtype=torch.float64).expand(10))
    elif kind == "channels":
        net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 5)).double().eval()
        net[0].weight, x = nn.Parameter(vectors(4, 2, 3)[:, :1]), x[:, None]
    else:  # tied, transposed columns

        def run(net: Any, x: Tensor) -> Tensor:
            return net.head(F.linear(F.linear(x, net.w).tanh(), net.w.t()))

        net = Written(run, head=nn.Linear(8, 5))
        net.w = nn.Parameter(vectors(8, 20)[:, :8])
    return net, x


@pytest.mark.parametrize(
    "kind", ["every second number", "columns", "one number", "channels", "tied"]
)
def test_parameters_that_are_parts_of_larger_tensors(kind):
    agree(*sliced(kind))


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32])
def test_a_single_number_of_another_precision(model, precision):
    """A parameter without dimensions takes no part in type promotion; 5 % in bfloat16, whose eps is
    0.8 %, against the same network in float64."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.first(x).tanh() * net.scale)

    net = Written(run, scale=torch.tensor(1.5), first=nn.Linear(8, 8), head=nn.Linear(8, 5))
    x = vectors().to(model)
    net.to(model)
    net.scale.data = net.scale.data.to(precision)
    out = fastfi.influence(net, x, wrt="layers", inverse=DAMPED, full_output=True)
    assert net(x).dtype == model
    net.double()
    want = fastfi.influence(net, x.double(), out.label, wrt="layers", inverse=DAMPED)
    rtol = 0.05 if model == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.fi.double(), want, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("derived", [False, True])
def test_the_budget_holds_for_parameters_that_are_spread_out(monkeypatch, derived):
    """A position embedding [1, T, D] has a gradient for each sample and row, though autograd saves
    nothing for it."""
    held = []
    place = Cotangents._place

    def spy(self: Cotangents, grads: Any) -> None:
        place(self, grads)
        held.append(self.batch * self.rows)

    def run(net: Any, x: Tensor) -> Tensor:
        position = net.position.tanh() if derived else net.position
        return net.head((x + position).mean(1))

    net = Written(run, position=torch.randn(1, 50, 16), head=nn.Linear(16, 40))
    x = vectors(8, 50, 16)
    want = fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    row, budget = 8 * 50 * 16, 1 << 18
    monkeypatch.setattr(Cotangents, "_place", spy)
    got = fastfi.influence(net, x, wrt="layers", inverse=DAMPED, memory_budget=budget)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)
    assert len(held) > 1 and max(held) < 8 * 39
    assert max(held) * row <= budget


def test_parameters_that_cannot_be_used():
    x = vectors()
    lazy = nn.Sequential(nn.Linear(8, 8).double(), nn.LazyLinear(5)).eval()
    with pytest.raises(fastfi.OptionError, match=r"1\.weight"):
        fastfi.influence(lazy, x, wrt="layers")
    with torch.inference_mode():
        net = mlp()
    with pytest.raises(fastfi.OptionError, match=r"0\.weight.*inference_mode"):
        fastfi.influence(net, x, wrt="layers")


def test_the_words_for_wrt_are_not_names():
    for word in ("params", "layers", "all", "input"):
        with pytest.raises(fastfi.OptionError, match=f"did you mean wrt='{word}'"):
            fastfi.influence(mlp(), vectors(), wrt=[word])
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5)).eval()
    with pytest.raises(fastfi.InputError, match=r"'all'.*int64"):
        fastfi.influence(net, torch.randint(0, 9, (3, 3)), wrt="all")


class Equal(nn.Linear):
    """A module that says it is equal to its like."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 1


class Unhashable(nn.Module):
    """A model without a hash. torch asks for one to list modules; this one lists its own."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.inner = Written(einsum, w=torch.randn(8, 8))
        self.head = nn.Linear(8, 5).double()

    def named_modules(self, *args: Any, **options: Any) -> Any:
        yield "", self
        for name in ("inner", "head"):
            yield name, getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def test_models_without_a_hash():
    net, x = Unhashable().eval(), vectors()
    for _ in range(2):
        agree(net, x)


def test_models_that_are_equal():
    """What is known of one model is not believed of another that claims to be the same."""
    for bias in (True, False, True):
        agree(Equal(8, 5, bias=bias).double().eval(), vectors())


def test_tied_embeddings_need_no_gradients(monkeypatch):
    """nn.Embedding and F.linear on the same weight: their products follow from the cotangents,
    though not where the table is used in a third way."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.embed(x).mean(1).tanh()
        z = F.linear(h, net.embed.weight, net.shift)
        return z * net.embed.weight.sum(1) if net.third else z

    net = Written(run, embed=nn.Embedding(9, 6), shift=torch.randn(9))
    net.third = False
    x = torch.randint(0, 9, (4, 5))
    formed_of = []
    real = formed.formed_grams

    def spy(*args: Any) -> Any:
        formed_of.append(args)
        return real(*args)

    monkeypatch.setattr(products, "formed_grams", spy)
    agree(net, x)
    assert formed_of == []
    net.third = True
    agree(net, x)
    assert formed_of
