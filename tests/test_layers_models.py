"""Influence of parameters for models in other layouts, precisions and wrappers, and what is refused
in words instead of by a wrong number."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import build
from layer_jacobian import layer_jacobian
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

DAMPED = fastfi.Damped(1e-2)


def expected(net: nn.Module, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """The oracle's [B, L], predicted classes."""
    jacobian, rows = layer_jacobian(net, x), []
    for i, y in enumerate(jacobian.logits.argmax(1).tolist()):
        tau = 1e-2 * jacobian.params(i).trace()
        rows.append([jacobian.layer(i, n).damped(y, tau) for n in names])
    return torch.tensor(rows, dtype=torch.float64)


LAYERS = ("conv1", "norm1", "conv2", "norm2", "head")


def test_channels_last():
    net, x = build("cnn")
    want = expected(net, x, LAYERS)
    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    got = fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


def test_autocast_and_short_types():
    """bfloat16 resolves 2^-8: sanity bounds, not claims of accuracy."""
    net, x = build("cnn")
    want = expected(net, x, LAYERS)
    net, x = net.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    short = fastfi.influence(net.bfloat16(), x.bfloat16(), wrt="layers", inverse=DAMPED)
    for got in (cast, short):
        assert got.dtype == torch.float32
        assert float((got.double() / want).log().abs().median()) < 0.2


def test_a_compiled_model():
    net, x = build("cnn")
    want = expected(net, x, LAYERS)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself
        model = torch.compile(net, backend="aot_eager")
        out = fastfi.influence(model, x, wrt="layers", inverse=DAMPED, full_output=True)
    torch._dynamo.reset()
    assert tuple(n.removeprefix("_orig_mod.") for n in out.names) == LAYERS
    torch.testing.assert_close(out.fi, want, rtol=1e-9, atol=0.0)


def test_one_sample_and_one_class_more_than_none():
    """B = 1, and K = 2 by a single logit."""
    net, x = build("single_logit")
    want = expected(net, x[:1], ("first", "head"))
    got = fastfi.influence(net, x[:1], wrt="layers", inverse=DAMPED)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


class Odd(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(6, 6), nn.Linear(6, 5)
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "vmap":
            return torch.func.vmap(lambda v: self.head(torch.tanh(self.first(v))))(x)
        if self.how == "loop":
            return torch.stack([self.head(torch.tanh(self.first(v))) for v in x])
        return self.head((self.first(x) * self.phase).abs())


@pytest.mark.parametrize("how", ["vmap", "loop", "complex"])
def test_what_no_rule_covers_is_right_or_refused(how):
    """An error of this package's own, which says what came; never another number."""
    net = Odd(how).double().eval()
    if how != "complex":
        del net.phase
    x = torch.randn(3, 6, dtype=torch.float64)
    try:
        got = fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    except fastfi.FastfiError as error:
        message = str(error)
    else:
        torch.testing.assert_close(got, expected(net, x, ("first", "head")), rtol=1e-9, atol=0.0)
        return
    assert "expected" in message and "got" in message


@pytest.mark.parametrize("wrt", ["layers", "params", "all"])
def test_closed_form_that_the_caller_vouches_for(wrt):
    net, x = build("cnn")
    if wrt == "layers":
        with pytest.raises(fastfi.OptionError, match="assume_full_rank"):
            fastfi.influence(net, x, wrt=wrt, assume_full_rank=True)
        return
    got = fastfi.influence(net, x, wrt=wrt, assume_full_rank=True)
    want = fastfi.influence(net, x, wrt="input", assume_full_rank=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
