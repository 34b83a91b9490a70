"""What the theory says of FI, through the public function alone: invariance (Theorem 1), the closed
form at full rank (F2), and lumping (F3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import jacobian, mlp, rank_condition
from torch import Tensor, nn

import fastfi

EPS = 2.0**-52

pytestmark = pytest.mark.usefixtures("one_thread")


class Reparameterised(nn.Module):
    """The same function of other coordinates: model(phi(x'))."""

    def __init__(self, model: nn.Module, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.phi = model, phi

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.phi(x))


def diagonal(p: int, rng: np.random.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """phi and the condition of its derivative: coordinates in other units."""
    scale = torch.from_numpy(np.exp(rng.uniform(-1.5, 1.5, p)) * rng.choice([-1.0, 1.0], p))
    return lambda x: x * scale, torch.diag(scale)


def linear(p: int, rng: np.random.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    matrix = torch.from_numpy(rng.normal(0.0, 1.0, (p, p)) + 2.0 * np.eye(p))
    return lambda x: x @ matrix.T, matrix


def nonlinear(p: int, rng: np.random.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """x + 0.5 Q tanh(Q^T x) with Q orthogonal: its derivative I + 0.5 Q sech^2 Q^T is positive
    definite everywhere, so it is a diffeomorphism of R^p; its condition is at most 1.5."""
    q = torch.from_numpy(np.linalg.qr(rng.normal(size=(p, p)))[0])
    shift = torch.from_numpy(rng.normal(size=p))
    return lambda x: x + 0.5 * torch.tanh(x @ q + shift) @ q.T, 1.5 * torch.eye(p).double()


@pytest.mark.parametrize("kind", [diagonal, linear, nonlinear])
@pytest.mark.parametrize(("inputs", "classes"), [(1, 3), (3, 8), (5, 9), (12, 5)])
@given(seed=st.integers(0, 10_000))
def test_theorem_1(
    kind: Callable[..., tuple[Callable[[Tensor], Tensor], Tensor]],
    inputs: int,
    classes: int,
    seed: int,
) -> None:
    """Exact influence does not change under a diffeomorphism of the input, for any rank.

    FI is the squared length of a projection of a vector of squared length F2 = (1 - P_y) / P_y (its
    value at full rank, and its upper bound). Rows in float64, through a Gram matrix, fix the
    subspace to delta = 100 eps64 kappa^2, kappa the rows' condition. So sqrt(FI) moves by at most
    delta sqrt(F2), which is what the test allows; delta itself is never above 1e-6.
    """
    model = mlp(inputs, classes, seed)
    rng = np.random.default_rng(seed)
    phi, derivative = kind(inputs, rng)
    moved = torch.from_numpy(rng.normal(size=(4, inputs)))
    x = phi(moved)
    y = torch.from_numpy(rng.integers(0, classes, 4))
    _, jac = jacobian(model, x)
    condition = rank_condition(jac) * float(torch.linalg.cond(derivative))
    if 100 * EPS * condition**2 > 1e-6:
        return  # a rank that float64 cannot tell
    delta = 100 * EPS * condition**2
    want = fastfi.influence(model, x, y, full_output=True)
    got = fastfi.influence(Reparameterised(model, phi).eval(), moved, y, full_output=True)
    assert want.rank.tolist() == got.rank.tolist() == [min(inputs, classes - 1)] * 4
    assert (want.fi > 0).all()
    bound = (-torch.expm1(want.log_prob)).clamp(min=0).sqrt() * (-0.5 * want.log_prob).exp()
    assert ((got.fi.sqrt() - want.fi.sqrt()).abs() <= delta * bound).all()


def test_theorem_1_is_not_for_the_other_rules() -> None:
    """The authors' absolute cut and damping do depend on the coordinates: had the test above been
    blind, it would pass for them too."""
    model = mlp(3, 8, 0)
    x = torch.randn(4, 3, dtype=torch.float64)
    scale = torch.tensor([1.0, 30.0, 0.02], dtype=torch.float64)
    other = Reparameterised(model, lambda v: v * scale).eval()
    for rule in (fastfi.Damped(), fastfi.Truncated(0.05)):
        before = fastfi.influence(model, x, inverse=rule)
        after = fastfi.influence(other, x / scale, inverse=rule)
        assert ((before - after).abs() > 1e-3 * before).any()


def test_damping_ignores_a_uniform_scale() -> None:
    """tau follows the metric's trace (F7)."""
    model = mlp(5, 7, 1)
    x = torch.randn(4, 5, dtype=torch.float64)
    other = Reparameterised(model, lambda v: 255.0 * v).eval()
    before = fastfi.influence(model, x, inverse="damped")
    after = fastfi.influence(other, x / 255.0, inverse="damped")
    # x / 255 * 255 moves x by eps64, and the rest is 1e-16 / alpha.
    torch.testing.assert_close(after, before, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("gain", [1.0, 6.0, 40.0])
@pytest.mark.parametrize("labels", ["predicted", "random"])
def test_full_rank_is_the_closed_form(gain: float, labels: str) -> None:
    """F2: (1 - P_y) / P_y, whatever the network; rows or no rows."""
    model = mlp(12, 6, 3, gain)
    x = torch.randn(16, 12, dtype=torch.float64)
    y = None if labels == "predicted" else torch.arange(16) % 6
    rows = fastfi.influence(model, x, y, full_output=True)
    none = fastfi.influence(model, x, y, assume_full_rank=True, full_output=True)
    with torch.no_grad():
        z = model(x)
    label = z.argmax(1) if y is None else y
    assert rows.label.tolist() == none.label.tolist() == label.tolist()
    assert rows.rank.tolist() == none.rank.tolist() == [5] * 16
    for i in range(16):
        logits = z[i].tolist()
        # chunks of another size may round the forward pass otherwise: eps64 times |z| in a logit
        bound = 1e-12 + 100 * EPS * max(map(abs, logits))
        want = oracle.full_rank(logits, int(label[i]))
        assert oracle.relative_error(rows.fi[i].item(), want) <= bound
        assert oracle.relative_error(none.fi[i].item(), want) <= bound


def test_full_rank_of_other_objectives() -> None:
    """In general sum g_k^2 / P_k: for a margin, 1 / P_y + 1 / P_other."""
    model = mlp(12, 6, 4)
    x = torch.randn(8, 12, dtype=torch.float64)
    with torch.no_grad():
        p = model(x).softmax(1)
    top = p.topk(2).values
    want = (1 / top).sum(1)
    for full in (False, True):
        got = fastfi.influence(model, x, objective="margin", assume_full_rank=full)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    with pytest.raises(fastfi.OptionError):
        fastfi.influence(model, x, objective="logit", assume_full_rank=True)


MASSES = (1e-9, 1e-4, 1e-2, 0.2, 0.9)


@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_lumping_can_only_increase(objective: str) -> None:
    """F3 below full rank: merging classes loses metric, and more merging loses more.

    For objectives other than cross-entropy this is so while the rank is not reduced: a gradient h
    that leaves the range of the lumped metric is projected on it.
    """
    model = mlp(3, 12, 5, gain=3.0)
    x = torch.randn(24, 3, dtype=torch.float64)
    y = torch.arange(24) % 12 if objective == "cross_entropy" else None
    _, jac = jacobian(model, x)
    slack = 1 + 100 * EPS * rank_condition(jac) ** 2
    assert slack < 1 + 1e-9
    plain = fastfi.influence(model, x, y, objective=objective)
    last, grew = plain, torch.zeros(24, dtype=torch.bool)
    for mass in MASSES:
        out = fastfi.influence(model, x, y, objective=objective, lump=mass, full_output=True)
        covered = out.rank == 3 if objective == "margin" else torch.ones(24, dtype=torch.bool)
        assert (out.fi * slack >= last)[covered].all()
        grew |= (out.fi > plain * 1.01) & covered
        last = torch.where(covered, out.fi, last)
    assert grew.sum() >= 12


def test_lumping_changes_nothing_at_full_rank() -> None:
    model = mlp(20, 12, 6, gain=3.0)
    x = torch.randn(12, 20, dtype=torch.float64)
    y = torch.arange(12)
    want = fastfi.influence(model, x, y)
    for mass in MASSES:
        got = fastfi.influence(model, x, y, lump=mass, full_output=True)
        assert (got.rank < 11).any() or mass < 1e-3
        # logsumexp of the lumped logits: a few eps64 of |z|
        torch.testing.assert_close(got.fi, want, rtol=1e-12, atol=0.0)
