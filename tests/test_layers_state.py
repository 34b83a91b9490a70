"""The influence of parameters neither trusts what earlier calls found out about a model, nor leaves
anything on it."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from typing import Any

import pytest
import torch
from layer_agreement import DAMPED, Written, agree, einsum, mlp, vectors
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def of_params(model: object, x: Tensor) -> fastfi.Influence:
    return fastfi.influence(model, x, wrt="params", full_output=True)


def first_two(z: Tensor) -> Tensor:
    """Logits of which the bias moves two alone: the rank is 2, not K - 1."""
    return torch.cat([z[:, :2], torch.zeros_like(z[:, 2:])], 1)


def test_the_closed_form_after_a_hook_was_added():
    net, x = mlp(), vectors()
    assert of_params(net, x).closed_form == ("params",)
    net.register_forward_hook(lambda module, args, out: first_two(out))
    out = of_params(net, x)
    assert out.closed_form == () and out.rank is not None and out.rank.tolist() == [2] * 6
    agree(net, x)


@pytest.mark.parametrize("by", ["flag", "values"])
def test_the_closed_form_where_the_model_branches(by):
    """The same layers in the same order, but the logits are another function of them."""

    def run(net: Any, x: Tensor) -> Tensor:
        z = net.head(net.first(x).tanh())
        cut = net.flag if by == "flag" else bool((x.abs() > 10).any(1).all())
        return first_two(z) if cut else z

    net, x = Written(run, first=nn.Linear(8, 3), head=nn.Linear(3, 6)), vectors()
    net.flag = False
    assert of_params(net, x).closed_form == ("params",)
    net.flag = True
    x *= 100
    assert of_params(net, x).closed_form == ()
    agree(net, x)
    net.flag = False
    assert of_params(net, x / 100).closed_form == ("params",)


def test_bound_methods_of_one_model_share_nothing():
    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(x)

    class Two(Written):
        def masked(self, x: Tensor) -> Tensor:
            return first_two(self(x))

    net, x = Two(run, head=nn.Linear(8, 5)), vectors()
    for _ in range(2):
        whole, masked = of_params(net, x), of_params(net.masked, x)
        assert whole.closed_form == ("params",) and whole.rank.tolist() == [4] * 6
        assert masked.closed_form == () and masked.rank.tolist() == [2] * 6


def test_unreached_in_any_chunk_of_any_batch():
    """An expert without samples in this batch, whatever batches there were before."""

    def run(net: Any, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 5, dtype=x.dtype)
        for expert, at in ((net.left, x[:, 0] < 0), (net.right, x[:, 0] >= 0)):
            if bool(at.any()):
                out = out.index_copy(0, at.nonzero()[:, 0], expert(x[at]))
        return out

    net, x = Written(run, left=nn.Linear(8, 5), right=nn.Linear(8, 5)), vectors()
    lost = {"left": ("right.weight", "right.bias"), "right": ("left.weight", "left.bias")}
    for side, sign in (("left", -1.0), ("right", 1.0), ("left", -1.0)):
        x[:, 0] = sign * x[:, 0].abs()
        assert of_params(net, x).unreached == lost[side]
        agree(net, x)
    x[::2, 0] *= -1
    for budget in (None, 1):  # in one chunk, and a sample at a time
        out = fastfi.influence(net, x, wrt="layers", full_output=True, memory_budget=budget)
        assert out.unreached == ()


class Meeting(nn.Module):
    """An einsum that, while torch.func runs it, lets another thread start something with the model
    and gives it a moment.

    Attributes:
        others: what threads are to do, once each.
        threads, found: those that have begun, and what came of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.others: list[Any] = []
        self.threads: list[threading.Thread] = []
        self.found: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.others and not isinstance(self.w, nn.Parameter):
            self.threads.append(threading.Thread(target=self._meet, args=(self.others.pop(),)))
            self.threads[-1].start()
            self.threads[-1].join(0.2)
        return einsum(self, x)

    def _meet(self, other: Any) -> None:
        torch.set_num_threads(1)
        try:
            self.found.append(other())
        except Exception as error:
            self.found.append(error)


@pytest.mark.parametrize("what", ["influence", "forward"])
def test_two_threads_with_one_model(what):
    """While one thread's chunk lends a module other parameters, another one scores the same model,
    or evaluates it: both get what they would alone."""
    net, x, other = nn.Sequential(Meeting(), mlp()).double().eval(), vectors(), vectors(4, 8)
    layers = {"wrt": "layers", "inverse": DAMPED}
    want = fastfi.influence(net, x, **layers)
    results = {
        "influence": lambda: fastfi.influence(net, other, **layers),
        "forward": lambda: net(other).detach(),
    }
    alone = results[what]()
    net[0].others.append(results[what])
    got = fastfi.influence(net, x, **layers)
    (thread,) = net[0].threads
    thread.join()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    (found,) = net[0].found
    assert isinstance(found, Tensor), repr(found)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(found)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=0.0)


def test_many_threads_with_one_recurrent_model():
    class Last(nn.Module):
        def forward(self, out: Any) -> Tensor:
            return out[0][:, -1]

    net = nn.Sequential(nn.LSTM(8, 6, batch_first=True), Last(), nn.Linear(6, 5)).double().eval()
    batches = [vectors(b, 3, 8) for b in (4, 6, 3)]
    want = [fastfi.influence(net, x, wrt="layers", inverse=DAMPED) for x in batches]
    wrong: list[Any] = []

    def run(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(8):
            try:
                got = fastfi.influence(net, batches[i], wrt="layers", inverse=DAMPED)
                torch.testing.assert_close(got, want[i], rtol=1e-9, atol=0.0)
            except (Exception, AssertionError) as error:
                wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    for module in net.modules():
        assert not any(len(v) for k, v in vars(module).items() if "hook" in k and v is not None)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes(norm):
    """The older way of torch.nn.utils: the weight is a plain attribute that each call renews."""
    net, x = nn.Sequential(norm(nn.Linear(8, 10)), nn.ReLU(), nn.Linear(10, 5)), vectors()
    net = net.double().eval()
    agree(net, x)
    fastfi.influence(net, x, wrt="layers")  # last, for a plain call would renew the weight
    assert not torch._C._functorch.is_functorch_wrapped_tensor(net[0].weight)
    torch.save(net, io.BytesIO())
    torch.save(net.state_dict(), io.BytesIO())


def test_activations_that_a_module_keeps():
    """In an attribute, in a new one, in a buffer, and in a list of a hook's: real tensors."""

    def run(net: Any, x: Tensor) -> Tensor:
        net.last = einsum(net, x)
        if not hasattr(net, "scale"):
            net.scale = torch.ones_like(x[0])
        net.mean = 0.9 * net.mean + 0.1 * x.detach().mean(0)
        return net.last * net.scale

    inner = Written(run, w=torch.randn(8, 8))
    inner.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
    net, x = nn.Sequential(inner, nn.Linear(8, 5)).double().eval(), vectors()
    kept: list[Tensor] = []
    inner.register_forward_hook(lambda module, args, out: kept.append(out))
    fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    values = [t for t in (inner.last, inner.mean, getattr(inner, "scale", x)) if t is not None]
    for t in values:
        assert not torch._C._functorch.is_functorch_wrapped_tensor(t)
        assert bool(t.isfinite().all()) and isinstance(t.sum().item(), float)
    kept.clear()
    agree(net, x)
    assert net(x).shape == (6, 5)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("wrt", ["layers", "params", ["0"]])
@pytest.mark.parametrize("fallback", [False, True])
def test_nothing_is_held(wrt, fallback):
    """Neither models and their parameters after the user has let go of them, nor graphs."""

    def once() -> list[Any]:
        inner = Written(einsum, w=torch.randn(8, 8)) if fallback else nn.Linear(8, 8).double()
        net = nn.Sequential(inner, mlp()).eval()
        fastfi.influence(net, x, wrt=wrt)
        return [weakref.ref(net), *map(weakref.ref, net.parameters())]

    x = vectors()
    once()
    before = live_tensors()
    references = [r for _ in range(3) for r in once()]
    assert live_tensors() == before
    assert all(r() is None for r in references)


def test_plans_of_one_model_hold_no_graph():
    """Shapes and places of each kind of input, but none of its tensors."""
    net = mlp()
    counts = []
    for length in range(3, 8):
        fastfi.influence(net, vectors(4, length, 8).mean(1), wrt="layers")
        sequence = nn.Sequential(net, nn.AdaptiveAvgPool1d(5)).eval()
        fastfi.influence(sequence, vectors(4, 8), wrt="layers", inverse=DAMPED)
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1
