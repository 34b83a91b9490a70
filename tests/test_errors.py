"""Each error a user can provoke: its class, and that it says what was expected and what came."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn

import fastfi
from fastfi.errors import SampleError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()


X = torch.linspace(-1, 1, 40 * 12).reshape(40, 3, 4)
Y = torch.arange(40) % 5


def raises(kind: type[Exception], *parts: str) -> object:
    return pytest.raises(kind, match=".*".join(map(re.escape, parts)))


BAD_INPUT = [
    ([[1.0]], "expected a torch.Tensor", "got list"),
    (torch.rand(5), "expected a batch", "got shape [5]"),
    (torch.zeros(2, 3, dtype=torch.uint8), "expected a floating-point tensor", "torch.uint8"),
    (torch.zeros(2, 3, dtype=torch.int64), "expected a floating-point tensor", "torch.int64"),
    (torch.zeros(0, 3), "expected at least one sample", "got shape [0, 3]"),
    (torch.zeros(3, 0), "at least one sample and one pixel", "got shape [3, 0]"),
]


@pytest.mark.parametrize(("x", "expected", "came"), BAD_INPUT)
@pytest.mark.parametrize("call", [fastfi.influence, fastfi.direction])
def test_input(net, call, x, expected, came):
    with raises(fastfi.InputError, "x: ", expected, came):
        call(net, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"assume_full_rank": True}, {"lump": 0.1}])
def test_pixels_not_finite(net, value, options):
    x = X.clone()
    x[3, 0, 0] = x[38, 2, 3] = value
    with raises(fastfi.NonFiniteError, "x: expected finite pixels", "samples 3, 38") as caught:
        fastfi.influence(net, x, Y, **options)
    assert caught.value.indices == (3, 38)


@pytest.mark.parametrize("options", [{}, {"assume_full_rank": True}, {"lump": 0.1}])
def test_logits_not_finite_are_named_by_their_place_in_the_whole_batch(net, options):
    def model(x: torch.Tensor) -> torch.Tensor:
        z = net(x)
        return torch.where(x.flatten(1)[:, :1] == X[37, 0, 0], torch.nan, z)

    with raises(fastfi.NonFiniteError, "model: expected finite logits", "samples 37") as caught:
        fastfi.influence(model, X, Y, **options)
    assert caught.value.indices == (37,)


def test_finite_pixels_whose_sum_overflows_are_accepted():
    x = torch.full((2, 4), 1e308, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    nn.init.constant_(model.weight, 0.0)
    assert fastfi.influence(model, x).tolist() == pytest.approx([0.0, 0.0], abs=10)


BAD_LABELS = [
    (torch.zeros(40), "expected integer class indices", "torch.float32"),
    (torch.zeros(40, dtype=torch.bool), "expected integer class indices", "torch.bool"),
    (torch.eye(40, 5), "one-hot labels: pass y.argmax(1)", ""),
    (torch.zeros(39, dtype=torch.int64), "one label per sample, [40]", "got shape [39]"),
    (torch.zeros(40, 5, dtype=torch.int64), "one label per sample, [40]", "got shape [40, 5]"),
]


@pytest.mark.parametrize(("y", "expected", "came"), BAD_LABELS)
@pytest.mark.parametrize("call", [fastfi.influence, fastfi.direction])
def test_labels(net, call, y, expected, came):
    with raises(fastfi.LabelError, "y: ", expected, came):
        call(net, X, y)


@pytest.mark.parametrize("options", [{}, {"assume_full_rank": True}, {"lump": 0.1}])
def test_labels_out_of_range(net, options):
    y = Y.clone()
    y[2], y[33] = 5, 7
    with raises(fastfi.LabelError, "from 0 to 4, got 5, 7 in samples 2, 33") as caught:
        fastfi.influence(net, X, y, **options)
    assert caught.value.indices == (2, 33)
    y[2], y[33] = 0, -1
    with raises(fastfi.LabelError, "got -1 in samples 33"):
        fastfi.influence(net, X, y, **options)


RANDOM = [
    nn.BatchNorm1d(12),
    nn.Dropout(0.2),
    nn.AlphaDropout(0.1),
    nn.RReLU(),
]


@pytest.mark.parametrize("module", RANDOM, ids=lambda m: type(m).__name__)
def test_training_mode(module):
    model = nn.Sequential(nn.Flatten(), module, nn.Linear(12, 5)).train()
    with raises(fastfi.ModelModeError, "expected evaluation mode, got training mode", "1 (",
                type(module).__name__, "call model.eval()"):  # fmt: skip
        fastfi.influence(model, X)
    with raises(fastfi.ModelModeError, "training mode"):
        fastfi.direction(model.forward, X)
    assert fastfi.influence(model.eval(), X).shape == (40,)


def test_training_mode_without_random_modules_is_fine(net):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(12, 5)).train()
    assert fastfi.influence(model, X).shape == (40,)


def test_batch_norm_without_running_statistics():
    norm = nn.BatchNorm1d(12, track_running_stats=False)
    model = nn.Sequential(nn.Flatten(), norm, nn.Linear(12, 5)).eval()
    with raises(fastfi.ModelModeError, "depend on that sample alone", "track_running_stats=False",
                "in 1"):  # fmt: skip
        fastfi.influence(model, X)


def linear(x: torch.Tensor, k: int = 5) -> torch.Tensor:
    return x.flatten(1)[:, :k] * 1.0


BAD_OUTPUT = [
    (lambda x: (linear(x), 1), {}, "expected a tensor of logits", "got tuple"),
    (lambda x: linear(x).argmax(1), {}, "expected floating-point logits", "torch.int64"),
    (lambda x: linear(x)[:, :, None], {}, "logits [16, K] for 16 samples", "[16, 5, 1]"),
    (lambda x: linear(x).sum(0), {}, "logits [16, K] for 16 samples", "[5]"),
    (lambda x: linear(x, 0), {}, "at least one class", "[16, 0]"),
    (lambda x: linear(x, 1).sigmoid(), {"outputs": "probs"}, "at least two classes", "[16, 1]"),
    (lambda x: linear(x, 1) * 0, {"outputs": "log_probs"}, "at least two classes", "[16, 1]"),
    (lambda x: linear(x).exp(), {"outputs": "probs"}, "expected probabilities", "samples 0"),
    (lambda x: linear(x), {"outputs": "log_probs"}, "expected log-probabilities", "samples 0"),
    (lambda x: linear(x).detach(), {}, "autograd can differentiate", "without a gradient"),
    (lambda x: torch.ones(16, 5, requires_grad=True) * 1.0, {}, "depend on x", "cannot trace"),
]


@pytest.mark.parametrize(("model", "options", "expected", "came"), BAD_OUTPUT)
def test_outputs(model, options, expected, came):
    with raises(fastfi.OutputError, "model: ", expected, came):
        fastfi.influence(model, X[:16], **options)


def test_probabilities_of_zero():
    def model(x: torch.Tensor) -> torch.Tensor:
        p = (x.flatten(1)[:, :3] * 400).softmax(1)
        return p

    x = X.clone()
    x[5, 0, 0] = 900.0
    x[:5] = 0.0
    with raises(fastfi.NonFiniteError, "expected probabilities above 0", "got 0 in samples",
                "let the model return logits"):  # fmt: skip
        fastfi.influence(model, x[:6], outputs="probs")


BAD_OPTIONS = [
    ({"wrt": "pixels"}, "wrt: expected one of 'input', 'params'", "got 'pixels'"),
    ({"objective": "accuracy"}, "objective: expected one of 'cross_entropy'", "got 'accuracy'"),
    ({"objective": ["a"]}, "objective: expected one of", "got ['a']"),
    ({"lump": "a"}, "lump: expected a probability mass", "got 'a'"),
    ({"objective": 3}, "objective: expected one of", "got 3"),
    ({"inverse": "pinv"}, "inverse: expected 'exact', 'truncated', 'damped'", "got 'pinv'"),
    ({"outputs": "scores"}, "outputs: expected one of 'logits'", "got 'scores'"),
    ({"lump": 0.0}, "lump: expected a probability mass between 0 and 1", "got 0.0"),
    ({"lump": 1.5}, "lump: expected a probability mass between 0 and 1", "got 1.5"),
    ({"memory_budget": 0}, "memory_budget: expected a positive number of bytes", "got 0"),
    ({"memory_budget": 1.5}, "memory_budget: expected a positive number of bytes", "got 1.5"),
    ({"dtype": torch.float16}, "dtype: expected torch.float32", "torch.float16"),
    ({"assume_full_rank": True, "inverse": "damped"}, "expected inverse='exact'", "Damped"),
    ({"assume_full_rank": True, "lump": 0.1}, "lump: expected None", "got 0.1"),
    ({"assume_full_rank": True, "objective": "logit"}, "does not change when", "got 'logit'"),
]


@pytest.mark.parametrize(("options", "expected", "came"), BAD_OPTIONS)
def test_options(net, options, expected, came):
    with raises(fastfi.OptionError, expected, came):
        fastfi.influence(net, X, Y, **options)


def test_assume_full_rank_with_too_few_pixels():
    model = nn.Linear(3, 5)
    with raises(fastfi.OptionError, "at least K - 1 = 4 values to perturb", "got 3"):
        fastfi.influence(model, torch.rand(2, 3), assume_full_rank=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastfi.Exact(rtol=-1.0), "0 <= rtol < 1"),
        (lambda: fastfi.Exact(rtol=1.0), "0 <= rtol < 1"),
        (lambda: fastfi.Exact(rtol=float("nan")), "0 <= rtol < 1"),
        (lambda: fastfi.Truncated(True), "above 0"),
        (lambda: fastfi.Truncated(0.0), "above 0"),
        (lambda: fastfi.Truncated(float("inf")), "above 0"),
        (lambda: fastfi.Damped(-1e-3), "above 0"),
        (lambda: fastfi.Damped("1"), "above 0"),
    ],
)
def test_inverse_parameters(make, message):
    with raises(fastfi.OptionError, "expected", message, "got"):
        make()


BAD_OBJECTIVES = [
    (lambda z, y: z.sum(), "one value per sample, [16]", "got []"),
    (lambda z, y: 1.0, "one value per sample, [16]", "got float"),
    (lambda z, y: z.detach()[:, 0], "differentiable function", "without a gradient"),
]


@pytest.mark.parametrize(("objective", "expected", "came"), BAD_OBJECTIVES)
def test_objectives(net, objective, expected, came):
    with raises(fastfi.OptionError, "objective <lambda>: ", expected, came):
        fastfi.influence(net, X[:16], Y[:16], objective=objective)


def test_objective_with_infinite_gradients_names_the_callers_samples(net):
    def objective(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (z[:, 0] * (y != 3)).abs().sqrt()

    y = torch.zeros(40, dtype=torch.int64)
    y[37] = 3
    with raises(fastfi.NonFiniteError, "objective objective: expected finite gradients", "37"):
        fastfi.influence(net, X, y, objective=objective)


@pytest.mark.parametrize("inverse", ["exact", "truncated", "damped"])
def test_gradients_not_finite(inverse):
    def model(x: torch.Tensor) -> torch.Tensor:
        root = (x * x).sum(1, keepdim=True).sqrt()  # its gradient at 0 is NaN
        return root * torch.arange(3.0) + x @ torch.ones(4, 3)

    x = torch.randn(30, 4)
    x[21] = 0
    for call in (fastfi.influence, fastfi.direction):
        with raises(fastfi.NonFiniteError, "model: expected finite gradients", "samples 21"):
            call(model, x, inverse=inverse)


@pytest.mark.parametrize("outputs", ["probs", "log_probs"])
def test_outputs_that_do_not_sum_to_one_name_the_callers_samples(net, outputs):
    def model(x: torch.Tensor) -> torch.Tensor:
        p = net(x).softmax(1) if outputs == "probs" else net(x).log_softmax(1)
        return torch.where(x.flatten(1)[:, :1] == X[38, 0, 0], p * 0.5, p)

    with raises(fastfi.OutputError, "model: expected", "samples 38") as caught:
        fastfi.influence(model, X, outputs=outputs)
    assert caught.value.indices == (38,)


@pytest.mark.parametrize("y", [["a"] * 40, [None] * 40, object()])
def test_labels_that_are_no_numbers(net, y):
    with raises(fastfi.LabelError, "expected a tensor, array or list of integers", "got "):
        fastfi.influence(net, X, y)


def test_sparse_input(net):
    with raises(fastfi.InputError, "expected a dense tensor", "sparse"):
        fastfi.influence(net, torch.eye(4).to_sparse())


def test_not_a_model():
    with raises(fastfi.OptionError, "model: expected a callable, got int"):
        fastfi.influence(3, X)


def test_every_error_is_a_fastfi_error_and_pickles():
    for name in fastfi.__all__:
        kind = getattr(fastfi, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert issubclass(kind, fastfi.FastfiError)
    error = fastfi.NonFiniteError("samples {samples} are {odd}", [4, 2])
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(error, SampleError)
    assert str(again) == "samples 2, 4 are {odd}"
    assert again.indices == (2, 4)
