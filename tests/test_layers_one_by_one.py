"""Samples taken one by one, where their places in a batch cannot be told: objectives, lumping, and
which samples an error names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_agreement import DAMPED, Written, spied, texts, unpadding, vectors
from layer_jacobian import layer_jacobian
from torch import Tensor, nn

import fastfi
from fastfi.layers.sweeper import Sweeper

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def alone(monkeypatch) -> list[Any]:
    """Chunks whose samples were taken one by one."""
    return spied(monkeypatch, Sweeper, "_one_by_one")


# 4 tokens a text on average, so that 32 rows look like 4 for each of 8 samples
RAGGED = (4, 4, 4, 4, 4, 6, 2, 4)


@pytest.mark.parametrize("rule", ["exact", "damped"])
def test_objectives_one_by_one(rule, alone):
    """ "logit" has a row more than there are contrasts."""
    net, x = unpadding(), texts(*RAGGED)
    y = torch.arange(8) % 5
    out = fastfi.influence(
        net, x, y, wrt="layers", objective="logit", inverse=rule, full_output=True
    )
    assert len(alone) == 1
    jacobian = layer_jacobian(net, x)
    for i in range(8):
        grad, label = nn.functional.one_hot(y[i], 5).double(), int(y[i])
        blocks = [jacobian.layer(i, n) for n in out.names]
        tau = 1e-2 * jacobian.params(i).trace()
        if rule == "damped":
            want = [b.damped(label, tau, grad) for b in blocks]
        else:
            want = [b.exact(label, grad)[0] for b in blocks]
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(out.fi[i], want, rtol=1e-7, atol=1e-12)


def test_lumping_one_by_one(alone):
    net, x = unpadding(), texts(*RAGGED)
    net.head.weight.data *= 6  # probabilities far from equal
    out = fastfi.influence(net, x, wrt="layers", lump=0.3, inverse=DAMPED, full_output=True)
    assert len(alone) == 1
    jacobian, merged = layer_jacobian(net, x), 0
    for i, y in enumerate(out.label.tolist()):
        whole, at = jacobian.params(i).merged(0.3, y)
        merged += len(whole.logits) < 5
        tau = 1e-2 * whole.trace()
        blocks = [jacobian.layer(i, n).merged(0.3, y)[0] for n in out.names]
        want = torch.tensor([b.damped(at, tau) for b in blocks], dtype=torch.float64)
        torch.testing.assert_close(out.fi[i], want, rtol=1e-8, atol=0.0)
    assert merged > 0


def smaller_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    chunks = Sweeper.chunks

    def smaller(self: Sweeper) -> Any:
        plan = chunks(self)
        plan.size = size
        return plan

    monkeypatch.setattr(Sweeper, "chunks", smaller)


def rough(x: Tensor, sample: int, position: int) -> Written:
    """The network with sqrt|.|, which has no derivative at 0; puts the token that leads there into
    x."""
    net = unpadding(lambda t: t.abs().sqrt())
    with torch.no_grad():
        net.embed.weight[1] = 0.0
        net.each.bias.zero_()
    x[sample, position] = 1
    return net


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize("lump", [None, 1e-9])
def test_errors_name_the_samples_one_by_one(monkeypatch, size, lump):
    """Also in a second chunk, and where lumping has put the samples into another order."""
    smaller_chunks(monkeypatch, size)
    x = texts(4, 4, 4, 4, 4, 6, 3, 4)
    net = rough(x, 6, 0)
    with pytest.raises(fastfi.NonFiniteError, match=r"samples 6$") as error:
        fastfi.influence(net, x, wrt="layers", lump=lump, inverse=DAMPED)
    assert error.value.indices == (6,)


@pytest.mark.parametrize("size", [8, 4])
def test_errors_name_the_samples_where_lengths_are_equal_on_average(monkeypatch, size):
    """The last token of the sixth text stands where the seventh's would, were they of one length; a
    gradient that is not finite must not hide that."""
    smaller_chunks(monkeypatch, size)
    x = texts(*RAGGED)
    net = rough(x, 5, 5)
    with pytest.raises(fastfi.NonFiniteError) as error:
        fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    assert error.value.indices == (5,)


@pytest.mark.parametrize("bad", range(6))
def test_errors_name_the_samples_that_a_first_call_looks_at(bad):
    """A gradient that is not finite says nothing against a rule."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.first(x).abs().sqrt())

    net = Written(run, first=nn.Linear(8, 6, bias=False), head=nn.Linear(6, 5))
    x = vectors()
    x[bad] = 0
    with pytest.raises(fastfi.NonFiniteError) as error:
        fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    assert error.value.indices == (bad,)
