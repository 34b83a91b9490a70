"""Networks written in one line, and whether the package agrees with the Jacobian about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_jacobian import LayerJacobian, layer_jacobian
from torch import Tensor, nn

import fastfi

__all__ = ["DAMPED", "Agreement", "Written", "agree", "einsum", "mlp", "nowhere_but", "spied"]
__all__ += ["texts", "unpadding", "vectors"]

ALPHA = 1e-2
DAMPED = fastfi.Damped(ALPHA)
EPS = 2.0**-52


class Written(nn.Module):
    """A network whose forward pass is a function of it and x.

    Args:
        run: the function.
        parts: modules, and tensors that become parameters.
    """

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            plain = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            setattr(self, name, nn.Parameter(part) if plain else part)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Agreement:
    """What the package said, and the Jacobian.

    Attributes:
        out: FI of every parameter tensor, Damped.
        jacobian: the oracle.
    """

    def __init__(self, out: fastfi.Influence, jacobian: LayerJacobian) -> None:
        self.out, self.jacobian = out, jacobian


def agree(model: nn.Module, x: Tensor, **options: object) -> Agreement:
    """Asserts that FI of every parameter tensor (Damped) and of all together (Exact) are those of
    the Jacobian."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    out = fastfi.influence(model, x, wrt=names, inverse=DAMPED, full_output=True, **options)
    whole = fastfi.influence(model, x, wrt="params", full_output=True, **options)
    assert whole.rank is not None
    jacobian = layer_jacobian(model, x)
    for i, y in enumerate(out.label.tolist()):
        block = jacobian.params(i)
        tau, top = ALPHA * block.trace(), block.closed_form(y)
        blocks = [jacobian.selected(i, n) for n in names]
        want = torch.tensor([b.damped(y, tau) for b in blocks], dtype=torch.float64)
        torch.testing.assert_close(out.fi[i], want, rtol=1e-8, atol=1e-12 * top)
        exact, rank = block.exact(y)
        if rank is not None:
            assert whole.rank[i] == rank
            delta = 1000 * EPS * block.condition() ** 2
            assert abs(float(whole.fi[i]) ** 0.5 - exact**0.5) <= delta * top**0.5
    return Agreement(out, jacobian)


def nowhere_but(found: Agreement, name: str, samples: set[int]) -> None:
    """Asserts that a parameter's gradient is not 0 in these samples, and 0 in the others."""
    traces = [found.jacobian.selected(i, name).trace() for i in range(len(found.out.fi))]
    assert {i for i, t in enumerate(traces) if t > 0} == samples


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The calls of a function from now on: the exception that each raised, or None."""
    calls: list[Any] = []
    real = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        try:
            out = real(*args, **kwargs)
        except Exception as error:
            calls.append(error)
            raise
        calls.append(None)
        return out

    monkeypatch.setattr(owner, name, spy)
    return calls


def vectors(*shape: int) -> Tensor:
    """Random numbers: six samples of eight where no shape is given."""
    return torch.randn(*(shape or (6, 8)), dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 5)).double().eval()


def einsum(net: Any, x: Tensor) -> Tensor:
    """No rule covers it: the module's call is differentiated as a whole."""
    return torch.einsum("bi,ij->bj", x, net.w)


def texts(*lengths: int, most: int = 8) -> Tensor:
    """Token ids from 2, padded with 0."""
    x = torch.zeros(len(lengths), most, dtype=torch.int64)
    for i, length in enumerate(lengths):
        x[i, :length] = torch.randint(2, 20, (length,))
    return x


def unpadded(net: Any, x: Tensor) -> Tensor:
    """A layer of the tokens that are there, in one line."""
    h, there = net.embed(x), x != 0
    rows = net.act(net.each(h[there]))
    return net.head(h.new_zeros(h.shape).index_put(torch.where(there), rows).mean(1))


def unpadding(act: Any = torch.tanh) -> Written:
    parts = {"embed": nn.Embedding(20, 6, padding_idx=0), "each": nn.Linear(6, 6)}
    net = Written(unpadded, **parts, head=nn.Linear(6, 5))
    net.act = act
    return net
