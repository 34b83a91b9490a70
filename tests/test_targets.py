"""Several targets from one sweep: the same numbers as one by one, for the passes of one."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import mlp, small_cnn
from torch import Tensor, nn

import fastfi
from fastfi.errors import LabelError, NonFiniteError, OptionError
from fastfi.evaluate import Evaluation, Target, evaluate, evaluate_targets
from fastfi.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = ["cross_entropy", "margin", "entropy", "nll_of_others"]


def first_minus_second(z: Tensor, y: Tensor) -> Tensor:
    return z[:, 0] - z[:, 1]


def largest(z: Tensor, y: Tensor) -> Tensor:
    return z.amax(1)


class Counted(nn.Module):
    """Counts the forward passes of a model, and the backward passes through its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        self.forwards += 1
        if z.requires_grad:
            z.register_hook(self._backward)
        return z

    def _backward(self, grad: Tensor) -> None:
        self.backwards += 1

    def taken(self, run) -> tuple[int, int]:
        """(forward, backward) passes of run()."""
        self.forwards = self.backwards = 0
        run()
        return self.forwards, self.backwards


def assert_same(got: Evaluation, want: Evaluation) -> None:
    for name, a, b in zip(Evaluation._fields, got, want, strict=True):
        assert type(a) is type(b), name
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), (name, a, b)
        else:
            assert a == b, name


def check(model, x, targets, **options) -> list[Evaluation]:
    together = evaluate_targets(model, x, targets, **options)
    assert len(together) == len(targets)
    for (objective, y), got in zip(targets, together, strict=True):
        assert_same(got, evaluate(model, x, y, objective=objective, **options))
    return together


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 3, 4, 0, 4])
Z = torch.tensor([4, 4, 0, 1, 2, 3, 1])
ALL = [Target(f, y) for f in [*OBJECTIVES, first_minus_second, largest] for y in (Y, None, Z)]
WRT = ["input", "params", "all", "layers", ["2", "0.weight", "0"]]


@pytest.mark.parametrize("wrt", WRT, ids=str)
@pytest.mark.parametrize("inverse", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("lump", [None, 0.1])
def test_together_as_one_by_one(wrt, inverse, lump):
    model = mlp(6, 5, seed=0)
    found = check(model, X, ALL, wrt=wrt, inverse=inverse, lump=lump)
    values = torch.stack([e.fi.flatten() for e in found])
    assert len(values.unique(dim=0)) > len(ALL) // 2  # they are different questions
    assert all((e.rank is None) == (inverse == "damped") for e in found)


@pytest.mark.parametrize("wrt", ["input", "params", "all"])
def test_closed_forms(wrt):
    model = Counted(mlp(6, 5, seed=0))
    targets = [t for t in ALL if t.objective not in ("logit", largest)]
    found = check(model, X, targets, wrt=wrt, assume_full_rank=True)
    assert all(e.closed_form == e.names and e.rank.eq(4).all() for e in found)
    taken = model.taken(lambda: evaluate_targets(model, X, targets, wrt=wrt, assume_full_rank=True))
    assert taken == (1, 0)
    for bad in ("logit", largest):
        with pytest.raises(OptionError, match="assume_full_rank: expected an objective that does"):
            evaluate_targets(model, X, [*targets, Target(bad, Y)], wrt=wrt, assume_full_rank=True)


@pytest.mark.parametrize("wrt", ["input", "params", "layers"])
@pytest.mark.parametrize("lump", [None, 0.1])
def test_float32_with_a_network_of_images(wrt, lump):
    model = small_cnn(4, seed=0)
    x = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 3, 0])
    targets = [Target(f, labels) for f in OBJECTIVES for labels in (y, None)]
    for inverse in ("exact", fastfi.Damped(0.1)):
        check(model, x, targets, wrt=wrt, lump=lump, inverse=inverse)


@pytest.mark.parametrize("wrt", ["input", "params", "layers"])
@pytest.mark.parametrize("lump", [None, 0.1])
def test_in_chunks(wrt, lump):
    """Several chunks, with lumping in another order than the caller's."""
    model = mlp(6, 5, seed=0)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(90, 6, generator=generator).double() * 2
    y, z = torch.randint(0, 5, (2, 90), generator=generator)
    targets = [Target(f, labels) for f in ("cross_entropy", "margin") for labels in (y, None, z)]
    sizes = []
    handle = model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    options = {"wrt": wrt, "lump": lump, "memory_budget": 40_000}
    check(model, x, targets, **options)
    handle.remove()
    assert sum(2 < s < 90 for s in sizes) > 8
    whole = evaluate_targets(model, x, targets, **options | {"memory_budget": None})
    cut = evaluate_targets(model, x, targets, **options)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a.fi, b.fi, rtol=1e-9, atol=0)


@pytest.mark.parametrize("inverse", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("wrt", WRT, ids=str)
def test_one_sweep(wrt, inverse):
    model = Counted(mlp(6, 5, seed=0))
    wrt = wrt if isinstance(wrt, str) else [f"model.{name}" for name in wrt]

    def passes(targets):
        run = lambda: evaluate_targets(model, X, targets, wrt=wrt, inverse=inverse)  # noqa: E731
        run()  # the model's plan is made once
        return model.taken(run)

    shared = [Target(f, y) for f in SHARED for y in (Y, None, Z)]
    # Every block holds the head's bias: proved full rank, no backward pass.
    closed = inverse == "exact" and wrt in ("params", "all")
    assert passes(shared[:1]) == passes(shared) == (1, 0 if closed else 4)
    assert passes([Target("logit", Y)]) == (1, 5)
    assert passes([*shared, Target("logit", Y), Target(largest, None)]) == (
        (3, 10) if closed else (3, 14)
    )


def test_targets_that_share_with_lumping():
    model = Counted(mlp(6, 5, seed=0))

    def forwards(*targets, wrt="input"):
        # One more orders the samples where there are several chunks; seven samples are one.
        run = lambda: evaluate_targets(model, X, targets, wrt=wrt, lump=0.1)  # noqa: E731
        run()
        return model.taken(run)[0]

    same = [Target(f, Y) for f in SHARED]
    predicted = [Target(f, None) for f in SHARED]
    assert forwards(*same) == forwards(*predicted) == 1
    assert forwards(*same, *predicted) == 2
    assert forwards(Target("margin", Y), Target("margin", Z), Target("margin", Y.clone())) == 3
    # Of parameters, only cross-entropy has its closed form with lumping.
    assert forwards(*same, wrt="params") == 2
    assert forwards(*same[1:], wrt="params") == 1


def test_wrong_labels_name_their_samples():
    model = mlp(6, 5, seed=0)
    wrong, negative = Y.clone(), Y.clone()
    wrong[[2, 6]] = torch.tensor([5, 7])
    negative[3] = -1
    good, other = Target("cross_entropy", Y), Target("margin", None)
    message = r"y: expected labels from 0 to 4, got 5, 7 in samples 2, 6"
    for wrt, lump, full in [
        *itertools.product(["input", "params", "layers"], [None, 0.1], [False]),
        *itertools.product(["input", "params"], [None], [True]),
    ]:
        options = {"wrt": wrt, "lump": lump, "assume_full_rank": full}
        for targets in itertools.permutations([good, other, Target("cross_entropy", wrong)]):
            with pytest.raises(LabelError, match=message) as caught:
                evaluate_targets(model, X, targets, memory_budget=4_000, **options)
            assert caught.value.indices == (2, 6)
        with pytest.raises(LabelError, match="got -1 in samples 3") as caught:
            evaluate_targets(model, X, [good, Target("margin", negative)], **options)
    with pytest.raises(LabelError, match=r"expected one label per sample, \[7\], got shape \[3\]"):
        evaluate_targets(model, X, [good, Target("margin", Y[:3])])


def test_labels_are_checked_before_any_backward_pass():
    model = Counted(mlp(6, 5, seed=0))

    def run():
        with pytest.raises(LabelError):
            evaluate_targets(model, X, [Target("margin", None), Target("margin", Y + 3)])

    assert model.taken(run) == (1, 0)


def test_other_errors():
    model = mlp(6, 5, seed=0)
    with pytest.raises(OptionError, match="targets: expected at least one, got none"):
        evaluate_targets(model, X, [])
    with pytest.raises(OptionError, match=r"objective: expected one of .*, got 'nll'"):
        evaluate_targets(model, X, [Target("margin", Y), Target("nll", Y)])
    with pytest.raises(OptionError, match="assume_full_rank: expected inverse='exact'"):
        evaluate_targets(model, X, [Target("margin", Y)], inverse="damped", assume_full_rank=True)

    def broken(z, y):
        return (z[:, 0] - z[4, 0]).abs().sqrt()  # a gradient that is not finite for sample 4

    with pytest.raises(NonFiniteError, match=r"objective broken: .*in samples 4"):
        evaluate_targets(model, X, [Target("margin", Y), Target(broken, Y)])
    x = X.clone()
    x[5, 0] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        evaluate_targets(model, x, [Target("margin", Y), Target("entropy", None)])
    assert caught.value.indices == (5,)


@pytest.mark.parametrize("classes", [2, 3, 5, 7, 10, 12])
@pytest.mark.parametrize("wrt", ["input", "params", "layers"])
def test_entropy_at_its_largest_is_a_stationary_point(classes, wrt):
    """All classes equally probable: the gradient is nothing but rounding, whatever its sum."""
    model = mlp(12, classes, seed=0)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    x = torch.randn(3, 12).double()
    options = [{}] if wrt == "layers" else [{}, {"assume_full_rank": True}]
    for option in options:
        found = evaluate(model, x, None, wrt=wrt, objective="entropy", **option)
        assert found.fi.max() < 1e-28
        check(model, x, [Target(f, None) for f in SHARED], wrt=wrt, **option)


def test_two_classes_by_one_logit():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double().eval()
    y = Y % 2
    for wrt in ("input", "params"):
        check(model, X, [Target(f, v) for f in OBJECTIVES for v in (y, None)], wrt=wrt)


def test_labels_of_other_kinds():
    """What evaluate takes, its targets take: integers of any width, lists."""
    model = mlp(6, 5, seed=0)
    for y in (Y.int(), Y.tolist(), Y.numpy()):
        got = evaluate_targets(model, X, [Target("margin", y), Target("entropy", None)])
        assert_same(got[0], evaluate(model, X, Y, objective="margin"))
