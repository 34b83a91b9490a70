"""Rows of the input's Jacobian: the two ways to them, memory formats, autocast."""

from __future__ import annotations

import architectures
import pytest
import torch
from networks import small_cnn
from torch import nn

import fastfi
from fastfi import rows
from fastfi.errors import OutputError

pytestmark = pytest.mark.usefixtures("one_thread")

_FLOATING = [n for n in architectures.BUILDERS if architectures.build(n)[1].is_floating_point()]


def rows_of(model, x, way, monkeypatch, objective="cross_entropy"):
    """Rows [B, n, p] computed in one of the two ways, and the ways that were gone."""
    gone = []
    with monkeypatch.context() as patch:
        for name in ("_loop", "_vmap"):
            real = getattr(rows, name)

            def noted(*arguments, name=name, real=real):
                gone.append(name)
                real(*arguments)

            patch.setattr(rows, name, noted)
        patch.setattr(rows, "way_of", lambda device: way)
        recorded = rows.record(model, x, "logits")
        data = rows.pull_back_rows(recorded, None, objective=objective, lump=None)
    return data.rows, gone


def check_close(got, want):
    """The same sums in another order, of at most 1,000 terms in a chain of a few layers: within
    1,000 roundings of the row's length."""
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    length = want.double().norm(dim=2)  # [B, n]
    error = (got.double() - want.double()).abs().amax(2)
    assert bool((error <= 1000 * torch.finfo(want.dtype).eps * length).all())


@pytest.mark.parametrize("name", _FLOATING)
def test_both_ways_agree(poisoned, name, monkeypatch):
    """For every network of the layers' tests, and none needs the fallback."""
    model, x = architectures.build(name)
    want, gone = rows_of(model, x, "loop", monkeypatch)
    assert gone == ["_loop"]
    got, gone = rows_of(model, x, "vmap", monkeypatch)
    assert gone == ["_vmap"]
    check_close(got, want)


@pytest.mark.parametrize("objective", ["cross_entropy", "logit"])  # "logit" has a row of its own
@pytest.mark.parametrize("classes", [2, 16, 17, 18, 40])
def test_rows_are_taken_in_groups(poisoned, classes, objective, monkeypatch):
    net, x = small_cnn(classes, 1), torch.randn(3, 1, 12, 12)
    want, _ = rows_of(net, x, "loop", monkeypatch, objective)
    got, gone = rows_of(net, x, "vmap", monkeypatch, objective)
    assert gone == ["_vmap"]
    assert want.shape == (3, classes - (objective == "cross_entropy"), 144)
    check_close(got, want)


class LooksAtValues(torch.autograd.Function):
    """exp, with a backward pass that vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y if float(g.abs().max()) >= 0 else y


def test_the_loop_serves_where_vmap_cannot(poisoned, monkeypatch):
    model, x = architectures.build("mlp")
    net = nn.Sequential(model, nn.Tanh())
    want, _ = rows_of(lambda t: LooksAtValues.apply(net(t)), x, "loop", monkeypatch)
    got, gone = rows_of(lambda t: LooksAtValues.apply(net(t)), x, "vmap", monkeypatch)
    assert gone == ["_vmap", "_loop"]
    assert torch.equal(got, want)


def test_running_out_of_memory_is_no_reason_for_the_loop(monkeypatch):
    """It halves the chunk instead; and the chunks then are right."""
    net, x = small_cnn(5, 2), torch.randn(8, 1, 12, 12)
    want = fastfi.influence(net, x, inverse="damped")
    real, sizes = torch.autograd.grad, []

    def grad(z, *arguments, is_grads_batched=False, **options):
        assert is_grads_batched
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("full")
        return real(z, *arguments, is_grads_batched=True, **options)

    monkeypatch.setattr(rows, "way_of", lambda device: "vmap")
    monkeypatch.setattr(torch.autograd, "grad", grad)
    got = fastfi.influence(net, x, inverse="damped")
    assert sizes[0] > 2 and min(sizes) <= 2
    # float32 rows: FI's error is at most their relative one times a condition below 1e3
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_logits_that_do_not_depend_on_x(way, monkeypatch):
    weight = torch.randn(6, 4, requires_grad=True)
    with pytest.raises(OutputError, match="cannot trace back"):
        rows_of(lambda t: t.detach() @ weight, torch.randn(3, 6), way, monkeypatch)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_channels_last(poisoned, way, monkeypatch):
    """Gradients come back in x's memory format; rows are in its order of numbers, whatever the
    format, as regions and maps expect."""
    net, x = small_cnn(5, 3), torch.randn(4, 1, 12, 12)
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), net).eval()
    x = torch.randn(4, 3, 12, 12)
    want, _ = rows_of(net, x, way, monkeypatch)
    net = net.to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    assert last.stride() != x.stride()
    got, _ = rows_of(net, last, way, monkeypatch)
    check_close(got, want)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_autocast_around_the_call(poisoned, way, monkeypatch):
    """The forward pass is the caller's, in bfloat16; so are the rows, which are autograd's own."""
    net, x = small_cnn(5, 4), torch.randn(4, 1, 12, 12)
    seen = []
    net[0].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = rows_of(net, x, way, monkeypatch)
        leaf = x.clone().requires_grad_()
        z = net(leaf)
    assert seen == [torch.bfloat16] * 2 and z.dtype == torch.bfloat16
    order = z.float().sort(dim=1, descending=True, stable=True).indices  # [B, K]
    cotangent = torch.zeros(4, 5, dtype=torch.bfloat16)
    cotangent.scatter_(1, order[:, 1:2], 1.0).scatter_(1, order[:, :1], -1.0)
    (first,) = torch.autograd.grad(z, leaf, cotangent)
    assert got.dtype == torch.float32
    if way == "loop":
        assert torch.equal(got[:, 0], first.flatten(1))
    else:  # products in bfloat16, summed in another order, in three layers
        error = (got[:, 0] - first.flatten(1)).norm(dim=1)
        assert bool((error <= 8 * 2.0**-8 * first.flatten(1).norm(dim=1)).all())


def test_the_loop_is_the_default():
    for device in ("cpu", "cuda"):
        assert rows.way_of(torch.device(device)) == "loop"
