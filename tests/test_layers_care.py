"""Influence of parameters does not depend on chunks, batches or grad modes, and leaves the caller's
model as it was; ``check_rank`` and ``verify`` say what can be trusted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import build
from layer_jacobian import layer_jacobian, layer_names
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

DAMPED = fastfi.Damped(1e-2)
EPS = 2.0**-52
# Batches that rows are told apart in: samples, positions, parts of several samples.
FOLDED = ["cnn", "frames", "vit_sequence_first", "position_major", "swin", "siamese", "gru"]
FOLDED += ["embedding_bag_offsets", "tied_embedding", "norms", "hypernetwork", "experts"]


def more(name: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """An architecture with a batch of another size."""
    net, x = build(name)
    x = torch.cat([x] * (batch // len(x) + 1))[:batch]
    if x.is_floating_point():
        x = x + 0.3 * torch.randn_like(x)
    with torch.no_grad():
        output = net(x)
    return net, x, torch.arange(batch) % output.shape[1]


@pytest.mark.parametrize("name", FOLDED)
def test_memory_budgets(name):
    """Chunks of samples and of rows, down to one sample and one row at a time."""
    net, x, y = more(name, 7)
    want = fastfi.influence(net, x, y, wrt="layers", inverse=DAMPED)
    for budget in (1, 30_000):
        got = fastfi.influence(net, x, y, wrt="layers", inverse=DAMPED, memory_budget=budget)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-18)
    want = fastfi.influence(net, x, y, wrt="params", inverse=DAMPED)
    got = fastfi.influence(net, x, y, wrt="params", inverse=DAMPED, memory_budget=1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("name", FOLDED)
def test_alone_and_in_any_batch(name):
    """Also where the batch has as many samples as there are positions, windows or frames."""
    net, x, y = more(name, 9)
    want = fastfi.influence(net, x, y, wrt="layers", inverse=DAMPED)
    for start, stop in ((0, 1), (3, 4), (0, 2), (2, 5), (1, 5), (4, 9)):
        got = fastfi.influence(net, x[start:stop], y[start:stop], wrt="layers", inverse=DAMPED)
        torch.testing.assert_close(got, want[start:stop], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
def test_alone_in_7_in_64_in_float32(rule):
    """1e-4 relative (the contract), where the authors' rule does not stand at its cut."""
    net, x, y = more("cnn", 64)
    net, x = net.float(), x.float()
    every = fastfi.influence(net, x, y, wrt="layers", inverse=rule)
    seven = fastfi.influence(net, x[:7], y[:7], wrt="layers", inverse=rule)
    torch.testing.assert_close(seven, every[:7], rtol=1e-4, atol=0.0)
    for i in range(7):
        alone = fastfi.influence(net, x[i : i + 1], y[i : i + 1], wrt="layers", inverse=rule)
        torch.testing.assert_close(alone, every[i : i + 1], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["cnn", "tied_embedding"])
@pytest.mark.parametrize("wrt", ["layers", "params", "all", ["hidden", "head", "decoder"]])
def test_callers_grad_mode(mode, wrt, name):
    """Also where x is an inference tensor, which autograd cannot save."""
    net, x, y = more(name, 4)
    if isinstance(wrt, list):
        wrt = [n for n in wrt if hasattr(net, n)]
    elif wrt == "all" and not x.is_floating_point():
        pytest.skip("token ids are not perturbed")
    want = fastfi.influence(net, x, y, wrt=wrt, inverse=DAMPED)
    with mode():
        got = fastfi.influence(net, x.clone(), y.clone(), wrt=wrt, inverse=DAMPED)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)


def state(model: nn.Module) -> list[object]:
    """Everything of a model that a call could leave changed."""
    out: list[object] = [id(t) for t in (*model.parameters(), *model.buffers())]
    for name, module in model.named_modules():
        out += [name, type(module), module.training, sorted(vars(module))]
        out += [len(v or ()) for k, v in sorted(vars(module).items()) if "hook" in k]
    for p in model.parameters():
        out += [p.requires_grad, p.is_leaf, p.grad_fn, len(p._backward_hooks or ()), p._version]
        out += [None if p.grad is None else id(p.grad)]
    out += [len(v) for k, v in sorted(vars(torch_module).items()) if k.startswith("_global_")
            and "hooks" in k and hasattr(v, "__len__")]  # fmt: skip
    return out


@pytest.mark.parametrize("name", ["cnn", "vit", "tied_embedding", "parametrised", "lstm", "swin"])
def test_the_model_is_left_alone(name):
    net, x, y = more(name, 4)
    first = next(iter(net.parameters()))
    first.grad = torch.full_like(first, 3.0)
    before = state(net)
    values = [t.clone() for t in (*net.parameters(), *net.buffers())]
    for rule in ("exact", DAMPED):
        fastfi.influence(net, x, y, wrt="layers", inverse=rule)
        fastfi.influence(net, x, y, wrt="params", inverse=rule)
    fastfi.check_rank(net, x)
    fastfi.layers.verify(net, x)
    assert state(net) == before
    assert bool((first.grad == 3.0).all())
    after = (*net.parameters(), *net.buffers())
    assert all(torch.equal(a, b) for a, b in zip(after, values, strict=True))
    net.requires_grad_(False)
    assert net(x).grad_fn is None


def test_the_model_is_left_alone_after_an_error():
    net, x, y = more("cnn", 4)
    before = state(net)

    def fail(*_: object) -> None:
        raise RuntimeError("of the model's own")

    handle = net.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="of the model's own"):
        fastfi.influence(net, x, y, wrt="layers")
    handle.remove()
    with pytest.raises(fastfi.LabelError):
        fastfi.influence(net, x, y + 100, wrt="layers")
    with pytest.raises(fastfi.NonFiniteError):
        fastfi.influence(net, x.log(), y, wrt="layers")
    assert state(net) == before


def test_users_hooks_are_kept():
    """A forward hook that changes a layer's output is part of the model."""
    net, x, y = more("cnn", 4)
    calls = []

    def double(module: nn.Module, _: object, out: Tensor) -> Tensor:
        calls.append(module)
        return 2.0 * out

    net.conv2.register_forward_hook(double)
    jacobian = layer_jacobian(net, x)
    calls.clear()
    out = fastfi.influence(net, x, y, wrt="layers", inverse=DAMPED, full_output=True)
    assert calls and len(net.conv2._forward_hooks) == 1
    for i in range(4):
        tau = 1e-2 * jacobian.params(i).trace()
        want = [jacobian.layer(i, n).damped(int(y[i]), tau) for n in out.names]
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(out.fi[i], want, rtol=1e-8, atol=0.0)


def test_training_mode_is_refused():
    net, x, y = more("cnn", 4)
    with pytest.raises(fastfi.ModelModeError, match="norm1"):
        fastfi.influence(net.train(), x, y, wrt="layers")
    with pytest.raises(fastfi.ModelModeError, match="norm1"):
        fastfi.check_rank(net, x)
    with pytest.raises(fastfi.ModelModeError, match="norm1"):
        fastfi.layers.verify(net, x)


@pytest.mark.parametrize(
    "name", ["cnn", "tied_embedding", "bare_parameters", "unused_layer", "norms"]
)
def test_check_rank(name):
    """Ranks and the singular values' ratio, as the oracle has them where they are plain."""
    net, x = build(name)
    jacobian = layer_jacobian(net, x)
    classes = jacobian.logits.shape[1]
    first = next(iter(jacobian.index))
    calls: list[tuple[object, tuple[str, ...], list[Callable[..., object]]]] = [
        ("params", ("params",), [jacobian.params]),
        ([first], (first,), [lambda i: jacobian.selected(i, first)]),
        ("layers", tuple(layer_names(net)),
         [lambda i, n=n: jacobian.layer(i, n) for n in layer_names(net)]),
    ]  # fmt: skip
    if x.is_floating_point():
        calls += [("input", ("input",), [jacobian.alone]), ("all", ("all",), [jacobian.everything])]
    for wrt, names, blocks in calls:
        out = fastfi.check_rank(net, x, wrt=wrt)
        assert out.names == names
        assert out.rank.shape == out.margin.shape == out.full.shape == (len(x), len(names))
        assert out.rank.dtype == torch.int64 and out.margin.dtype == torch.float64
        assert torch.equal(out.full, out.rank == classes - 1)
        for i in range(len(x)):
            for column, block in enumerate(b(i) for b in blocks):
                rank, s = block.rank(), block.spectrum
                if rank is None:
                    continue
                assert out.rank[i, column] == rank
                want = float(s[-1] / s[0]) if rank else 0.0
                # Gram matrices hold squares: eps64 K absolute of the ratio's square
                error = abs(float(out.margin[i, column]) ** 2 - want**2)
                assert error <= 100 * EPS + 1e-10 * want**2
                if rank == 0:
                    assert out.margin[i, column] == 0
    assert fastfi.check_rank(net, x).names == ("params",)


def test_check_rank_with_a_tolerance_and_with_lumping():
    net, x, _ = more("cnn", 5)
    plain = fastfi.check_rank(net, x, wrt="layers")
    strict = fastfi.check_rank(net, x, wrt="layers", rtol=0.9)
    assert bool((strict.rank <= plain.rank).all()) and bool((strict.rank < plain.rank).any())
    lumped = fastfi.check_rank(net, x, wrt="layers", lump=0.5)
    assert bool((lumped.rank < plain.rank).any())
    tiny = fastfi.check_rank(net, x, wrt="layers", memory_budget=1)
    assert torch.equal(tiny.rank, plain.rank)
    torch.testing.assert_close(tiny.margin, plain.margin, rtol=1e-8, atol=0.0)


def test_verify_finds_a_wrong_rule(monkeypatch):
    """A Gram matrix of linear layers that is 1 % too large, from the second call on."""
    net, x = build("cnn")
    assert fastfi.layers.verify(net, x).disagree == ()
    right = torch.ops.fastfi.linear_gram
    monkeypatch.setattr(torch.ops.fastfi, "linear_gram", lambda *args: 1.01 * right(*args))
    out = fastfi.layers.verify(net, x)
    assert out.disagree == ("head",)
    at = out.names.index("head")
    # the weight's share of it; the bias has another rule
    assert out.bound < float(out.error[at]) < 0.0101


@pytest.mark.parametrize("name", ["cnn", "in_place_tokens", "frames"])
def test_a_rule_that_is_wrong_from_the_start_is_not_used(monkeypatch, name):
    """A model's first call compares its rules with autograd, and drops those that fail."""
    net, x = build(name)
    want = fastfi.influence(net, x, wrt="layers", inverse=DAMPED)
    for op in ("linear_gram", "conv_gram"):
        right = getattr(torch.ops.fastfi, op)
        wrong = lambda *args, right=right: 1.01 * right(*args)  # noqa: E731
        monkeypatch.setattr(torch.ops.fastfi, op, wrong)
    got = fastfi.influence(build(name)[0], x, wrt="layers", inverse=DAMPED)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


def damped_of(net: nn.Module, x: Tensor) -> Tensor:
    """The oracle's profile [B, L] of the predicted classes."""
    jacobian, rows = layer_jacobian(net, x), []
    for i, y in enumerate(jacobian.logits.argmax(1).tolist()):
        tau = 1e-2 * jacobian.params(i).trace()
        rows.append([jacobian.layer(i, n).damped(y, tau) for n in layer_names(net)])
    return torch.tensor(rows, dtype=torch.float64)


def test_a_model_that_changes_between_calls():
    """What was learnt of a model on one call must not be believed of another one."""

    def check(net: nn.Module, x: Tensor) -> None:
        out = fastfi.influence(net, x, wrt="layers", inverse=DAMPED, full_output=True)
        assert out.names == tuple(layer_names(net))
        torch.testing.assert_close(out.fi, damped_of(net, x), rtol=1e-8, atol=1e-16)

    net, x = build("siamese")
    check(net, x)
    for how in ("experts", "siamese"):  # another path through the same layers
        net.how = how
        check(net, x)
    net.first.bias.requires_grad_(False)
    check(net, x)
    net.second = nn.Linear(6, 6).double()  # of the same shapes
    check(net, x)
    net.second.weight = net.first.weight
    check(net, x)
    net.norm = nn.Identity()
    check(net, x)
    net.second.register_forward_hook(lambda module, inputs, out: out.roll(1, 1))
    check(net, x)
    net, x = build("detached")
    check(net, x)
    net.how, net.auxiliary = "dropped", net.side
    check(net, x)


def test_verify_takes_a_tolerance_and_a_budget():
    net, x = build("vit")
    assert fastfi.layers.verify(net, x, memory_budget=1).disagree == ()
    out = fastfi.layers.verify(net, x, rtol=1e-3)
    assert out.bound == 1e-3 and out.disagree == ()
    single = fastfi.layers.verify(net.float(), x.float())
    assert single.disagree == () and single.bound > 1e-7
