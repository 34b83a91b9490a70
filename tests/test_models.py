"""Every kind of model that influence must take, against the full per-sample Jacobian in float64."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

B, K = 20, 6  # more samples than the first chunk


class ResidualNet(nn.Module):
    """BatchNorm, in-place ReLU, a residual connection, max pooling."""

    def __init__(self, classes: int = K) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        x = self.conv2(x) + x
        x = nn.functional.max_pool2d(self.relu(x), 2)
        return self.head(x.flatten(1))


@pytest.fixture
def net() -> ResidualNet:
    torch.manual_seed(0)
    net = ResidualNet()
    net(torch.randn(64, 2, 8, 8))  # running statistics
    with torch.no_grad():
        net.head.weight *= 4  # some confident samples
    return net.eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 2, 8, 8, generator=g), torch.randint(0, K, (B,), generator=g)


def damped_by_jacobian(model: nn.Module, x: Tensor, y: Tensor, alpha: float = 1e-2) -> Tensor:
    """h^T (G + tau I)^-1 h from the whole Jacobian, in float64. Damped, unlike Exact at full rank,
    depends on every entry of it."""
    model = model.double()
    x = x.double()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda a: model(a[None])[0]))(x).flatten(2)
    jacobian = jacobian.detach()  # [B, K, p]
    p = model(x).softmax(1).detach()
    dl = jacobian - (p[:, :, None] * jacobian).sum(1, keepdim=True)
    g = torch.einsum("bk,bkp,bkq->bpq", p, dl, dl)
    tau = alpha * g.diagonal(dim1=1, dim2=2).sum(1)
    h = -dl[torch.arange(len(y)), y]
    g = g + tau[:, None, None] * torch.eye(g.shape[1], dtype=g.dtype)
    return torch.einsum("bp,bp->b", h, torch.linalg.solve(g, h))


@pytest.fixture
def expected(net: ResidualNet, data: tuple[Tensor, Tensor]) -> Tensor:
    want = damped_by_jacobian(net, *data)
    net.float()
    return want


def check(model: object, data: tuple[Tensor, Tensor], expected: Tensor, **options: object) -> None:
    # float32 rows, alpha = 1e-2: rounding of 1e-7 magnified by at most 1 / alpha.
    fi = fastfi.influence(model, *data, inverse="damped", **options)
    torch.testing.assert_close(fi.double(), expected, rtol=1e-4, atol=1e-7)


def test_module(net, data, expected):
    check(net, data, expected)


def test_float64_is_exact(net, data, expected):
    fi = fastfi.influence(net.double(), data[0].double(), data[1], inverse="damped")
    assert fi.dtype == torch.float64
    torch.testing.assert_close(fi, expected, rtol=1e-9, atol=0)


def test_function(net, data, expected):
    check(lambda x: net(x), data, expected)
    check(net.forward, data, expected)


def test_frozen_parameters_and_gradients_are_left_alone(net, data, expected):
    net.requires_grad_(False)
    check(net, data, expected)
    net.requires_grad_(True)
    check(net, data, expected)
    assert all(p.grad is None for p in net.parameters())


def test_input_is_left_alone(net, data, expected):
    x = data[0].clone().requires_grad_()
    check(net, (x * 1.0, data[1]), expected)
    assert x.grad is None
    torch.testing.assert_close(x.detach(), data[0], rtol=0, atol=0)


def test_model_that_works_in_place_on_its_input(net, data, expected):
    # Damped does not change when the whole input is rescaled.
    half = data[0] / 2.0
    before = half.clone()
    check(lambda x: net(x.mul_(2.0)), (half, data[1]), expected)
    assert torch.equal(before, half)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_grad_mode(net, data, expected, mode):
    with mode():
        check(net, data, expected)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)


def test_inference_tensors(net, data, expected):
    with torch.inference_mode():
        data = data[0].clone(), data[1].clone()
    check(net, data, expected)


def test_channels_last(net, data, expected):
    x = data[0].contiguous(memory_format=torch.channels_last)
    check(net.to(memory_format=torch.channels_last), (x, data[1]), expected)


def test_autocast(net, data, expected):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fi = fastfi.influence(net, *data, inverse="damped")
    # bfloat16 resolves logits to 2^-8: a sanity bound, not an accuracy claim.
    ratio = fi.double() / expected
    assert float(ratio.log().abs().median()) < 0.1
    assert fi.dtype == torch.float32


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled(net, data, expected, compiled_before):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself
        model = torch.compile(net)
        if compiled_before:
            # For one backward pass, after which its graph gives its buffers away.
            model(data[0].clone().requires_grad_()).sum().backward()
        check(model, data, expected)
        check(model, data, expected)
    torch._dynamo.reset()


def test_object_with_logits(net, data, expected):
    check(lambda x: SimpleNamespace(logits=net(x)), data, expected)
    check(lambda x: {"logits": net(x)}, data, expected)


def test_log_probs_and_probs(net, data, expected):
    check(lambda x: net(x).log_softmax(1), data, expected, outputs="log_probs")
    check(lambda x: net(x).softmax(1), data, expected, outputs="probs")


@pytest.mark.parametrize("shape", ["[B, 1]", "[B]"])
def test_single_logit(data, shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 1))
    two = nn.Sequential(nn.Flatten(), nn.Linear(128, 2))
    with torch.no_grad():
        two[1].weight.copy_(torch.cat([torch.zeros(1, 128), net[1].weight]))
        two[1].bias.copy_(torch.cat([torch.zeros(1), net[1].bias]))
    y = data[1] % 2
    model = net if shape == "[B, 1]" else lambda x: net(x).squeeze(1)
    got = fastfi.influence(model, data[0], y, full_output=True)
    want = fastfi.influence(two, data[0], y, full_output=True)
    torch.testing.assert_close(got.fi, want.fi, rtol=1e-5, atol=0)
    assert torch.equal(got.rank, torch.ones(B, dtype=torch.int64))
    torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-5, atol=1e-7)


def test_vector_inputs_and_volumes():
    for shape in [(5,), (1, 5, 4), (2, 3, 4, 5)]:
        torch.manual_seed(0)
        x = torch.randn(3, *shape)
        net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4), nn.Tanh(), nn.Linear(4, 3))
        y = torch.tensor([0, 1, 2])
        want = damped_by_jacobian(net, x, y)
        net.float()
        check(net, (x, y), want)


def test_labels_of_any_integer_type_and_sequences(net, data):
    want = fastfi.influence(net, *data)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(fastfi.influence(net, data[0], data[1].to(dtype)), want)
    assert torch.equal(fastfi.influence(net, data[0], data[1].tolist()), want)
    assert torch.equal(fastfi.influence(net, data[0], data[1].numpy()), want)


def test_full_output(net, data):
    x, y = data
    log_prob = net(x).double().log_softmax(1).detach()
    r = fastfi.influence(net, x, y, full_output=True)
    assert torch.equal(r.label, y)
    torch.testing.assert_close(r.log_prob, log_prob.gather(1, y[:, None])[:, 0])
    assert r.rank.tolist() == [K - 1] * B
    assert r.names == ("input",)
    predicted = fastfi.influence(net, x, full_output=True)
    assert torch.equal(predicted.label, log_prob.argmax(1))
    assert fastfi.influence(net, x, y, inverse="damped", full_output=True).rank is None


def test_float32_results_saturate_and_float64_ones_do_not():
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[200.0, 0, 0], [0, 1, 0], [0, 0, 1]]))
    x, y = torch.tensor([[1.0, 0, 0]]), torch.tensor([1])
    fi = fastfi.influence(model, x, y)
    assert fi.dtype == torch.float32
    assert fi.item() == torch.finfo(torch.float32).max
    wide = fastfi.influence(model, x, y, dtype=torch.float64)
    # (1 - P_y) / P_y = exp(200) + 1
    torch.testing.assert_close(wide.log(), torch.tensor([200.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("activation", "depth", "classes", "bottleneck"),
    [(nn.Tanh, 10, 3, 1), (nn.Tanh, 10, 4, 2), (nn.ReLU, 10, 5, 2), (nn.Tanh, 30, 10, 1)],
)
def test_rank_of_deep_bottlenecks_in_float32(activation, depth, classes, bottleneck):
    """Rows of deep networks err by many epsilons; a dependent row must not count all the same."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(20, 32)]
    for _ in range(depth):
        layers += [activation(), nn.Linear(32, 32)]
        nn.init.orthogonal_(layers[-1].weight, gain=1.2)
    head = nn.Linear(bottleneck, classes)
    with torch.no_grad():
        head.weight *= 3
    model = nn.Sequential(*layers, activation(), nn.Linear(32, bottleneck), head)
    x, y = torch.randn(64, 20), torch.zeros(64, dtype=torch.int64)
    got = fastfi.influence(model, x, y, full_output=True)
    want = fastfi.influence(model.double(), x.double(), y, full_output=True)
    assert torch.equal(got.rank, want.rank)
    # The end-to-end contract for a clear rank: 1e-3.
    torch.testing.assert_close(got.fi.double(), want.fi, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("classes", [10, 100, 300])
def test_bfloat16_keeps_the_rank_of_many_classes(classes):
    torch.manual_seed(0)
    model = nn.Linear(500, classes)
    x, y = torch.randn(4, 500), torch.arange(4)
    want = fastfi.influence(model, x, y, full_output=True)
    got = fastfi.influence(model.bfloat16(), x.bfloat16(), y, full_output=True)
    assert torch.equal(got.rank, want.rank)
    torch.testing.assert_close(got.fi, want.fi, rtol=0.2, atol=0)


def test_labels_made_in_inference_mode_and_a_callable_objective():
    model, x = nn.Linear(5, 3), torch.randn(4, 5)

    def objective(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y, reduction="none")

    with torch.inference_mode():
        y = torch.tensor([0, 1, 2, 0])
        got = fastfi.influence(model, x, y, objective=objective)
    torch.testing.assert_close(got, fastfi.influence(model, x, y.tolist()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gap", [650.0, 720.0, 760.0, 2000.0])
@pytest.mark.parametrize("inverse", ["exact", "damped"])
def test_the_least_likely_class_beyond_float64(gap, inverse):
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[gap, 1.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    fi = fastfi.influence(model, x, torch.tensor([1]), inverse=inverse)
    assert bool(fi.isinf()) == (gap > 709)
    assert float(fi) > 1e200
    assert float(fastfi.influence(model, x, torch.tensor([0]), inverse=inverse)) < 1e-200
