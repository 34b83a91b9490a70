"""Named objectives against torch's own gradients, and objectives that need a row of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastfi
from fastfi.classes import sort_classes
from fastfi.objectives import OBJECTIVES, logit_gradient

pytestmark = pytest.mark.usefixtures("one_thread")

DEFINITIONS = {
    "cross_entropy": lambda z, y: -z.log_softmax(1).gather(1, y[:, None])[:, 0],
    "logit": lambda z, y: z.gather(1, y[:, None])[:, 0],
    "margin": lambda z, y: (
        z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
    ),
    "entropy": lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1),
    "nll_of_others": lambda z, y: -(-z.softmax(1).gather(1, y[:, None])[:, 0]).log1p(),
}
INVERSES = ["exact", "truncated", "damped"]


def test_every_named_objective_is_defined_here():
    assert set(DEFINITIONS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "cross_entropy"])
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_gradients(name, spread):
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(200, 7, generator=g, dtype=torch.float64) * spread).requires_grad_()
    y = torch.randint(0, 7, (200,), generator=g)
    (want,) = torch.autograd.grad(DEFINITIONS[name](z, y).sum(), z)
    got = logit_gradient(name, z.detach(), z.detach().log_softmax(1), y)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_nll_of_others_keeps_its_digits_where_one_class_holds_all_the_mass():
    z = torch.tensor([[50.0, 0.0, -1.0]], dtype=torch.float64)
    y = torch.tensor([0])
    got = logit_gradient("nll_of_others", z, z.log_softmax(1), y)
    # P_y = 1 to the last bit; the others share in proportion to exp(0), exp(-1).
    share = torch.tensor([0.0, -1.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(got[0, 1:], -share, rtol=1e-12, atol=0)
    assert got[0, 0].item() == pytest.approx(1.0, rel=1e-15)


@pytest.fixture(params=[3, 40], ids=["rank below K - 1", "full rank"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    hidden = request.param
    return nn.Sequential(nn.Linear(20, hidden), nn.Tanh(), nn.Linear(hidden, 7)).double()


X = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(30) % 7


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("inverse", INVERSES)
def test_a_name_and_the_same_function_agree(model, name, inverse):
    if (name, inverse) == ("cross_entropy", "truncated"):
        pytest.skip("the authors' rule changes the gradient of cross-entropy: dP_y / (P_y + eps)")
    got = fastfi.influence(model, X, Y, objective=name, inverse=inverse)
    want = fastfi.influence(model, X, Y, objective=DEFINITIONS[name], inverse=inverse)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_against_the_pseudo_inverse(model, name):
    """h^T G^+ h from the whole Jacobian; these networks are not confident, so pinv is accurate."""
    jacobian = torch.func.vmap(torch.func.jacrev(model))(X).detach()  # [B, K, p]
    z = model(X).detach().requires_grad_()
    (g,) = torch.autograd.grad(DEFINITIONS[name](z, Y).sum(), z)
    p = z.softmax(1).detach()
    h = torch.einsum("bk,bkp->bp", g, jacobian)
    dl = jacobian - (p[:, :, None] * jacobian).sum(1, keepdim=True)
    metric = torch.einsum("bk,bkp,bkq->bpq", p, dl, dl)
    inverse = torch.linalg.pinv(metric, rtol=1e-11, hermitian=True)
    want = torch.einsum("bp,bpq,bq->b", h, inverse, h)
    got = fastfi.influence(model, X, Y, objective=name)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-12)
    damped = metric + 0.01 * metric.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(20)
    want = torch.einsum("bp,bp->b", h, torch.linalg.solve(damped, h))
    got = fastfi.influence(model, X, Y, objective=name, inverse="damped")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("inverse", INVERSES)
def test_lumping_nothing_changes_nothing(model, name, inverse):
    want = fastfi.influence(model, X, Y, objective=name, inverse=inverse)
    got = fastfi.influence(model, X, Y, objective=name, inverse=inverse, lump=1e-300)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["margin", "entropy", "nll_of_others"])
def test_full_rank_closed_form(name):
    torch.manual_seed(0)
    model = nn.Linear(20, 7).double()
    want = fastfi.influence(model, X, Y, objective=name)
    got = fastfi.influence(model, X, Y, objective=name, assume_full_rank=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def classes_of(probabilities: list[float], y: int, lump: float | None):
    z = torch.tensor([probabilities], dtype=torch.float64).log()
    return sort_classes(z, torch.tensor([y]), lump)


def apply(cotangent: Tensor) -> list[float]:
    return [round(v, 12) for v in cotangent[0].tolist()]


def test_sorted_contrasts():
    c = classes_of([0.1, 0.6, 0.3], 0, None)
    assert c.order.tolist() == [[1, 2, 0]]
    assert c.position.tolist() == [2]
    assert apply(c.cotangent(1)) == [0, -1, 1]
    assert apply(c.cotangent(2)) == [1, -1, 0]


def test_lumped_contrasts():
    # The rest after 0.5 and 0.3 holds 0.2 < 0.25; its logit is the logsumexp of its members'.
    c = classes_of([0.05, 0.5, 0.3, 0.15], 1, 0.25)
    assert c.log_prob.exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert apply(c.cotangent(1)) == [0, -1, 1, 0]
    assert apply(c.cotangent(2)) == [0.25, -1, 0, 0.75]


def test_the_label_is_never_lumped():
    c = classes_of([0.04, 0.5, 0.3, 0.06, 0.1], 0, 0.25)
    assert c.order[0, :3].tolist() == [1, 2, 0]
    assert c.position.tolist() == [2]
    assert c.log_prob.exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.04, 0.16])
    assert apply(c.cotangent(2)) == [1, -1, 0, 0, 0]
    assert apply(c.cotangent(3)) == [0, -1, 0, 0.375, 0.625]


def test_a_single_class_is_not_lumped():
    c = classes_of([0.5, 0.3, 0.2], 0, 0.25)
    assert not c.lumped
    assert c.log_prob.shape == (1, 3)


def test_samples_that_keep_fewer_classes_are_padded():
    p = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    c = sort_classes(p.log(), None, 0.2)
    assert c.log_prob.shape == (2, 4)
    assert c.log_prob[0].exp().tolist() == pytest.approx([0.9, 0.1, 0, 0])
    assert apply(c.cotangent(2)) == [0, 0, 0, 0]
    assert apply(c.cotangent(3)) == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["margin", "entropy", "nll_of_others"])
def test_lumping_other_objectives_stays_below_the_exact_value(name):
    """What an objective does within the merged classes is lost, nothing is amplified: at full rank
    FI = sum g_k^2 / P_k can only fall when classes are pooled (Cauchy and Schwarz)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 10)).double()
    with torch.no_grad():
        model[2].weight *= 10
    y = torch.arange(30) % 10
    exact = fastfi.influence(model, X, y, objective=name)
    lumped = fastfi.influence(model, X, y, objective=name, lump=0.05)
    assert bool((lumped <= exact * (1 + 1e-9)).all())
    if name == "nll_of_others":
        torch.testing.assert_close(lumped, exact, rtol=1e-9, atol=0)
    if name == "entropy":
        assert float((lumped / exact).min()) > 0.5


def test_pooled_gradient():
    c = classes_of([0.05, 0.5, 0.3, 0.15], 1, 0.25)
    grad = torch.tensor([[1.0, 2.0, -7.0, 4.0]], dtype=torch.float64)
    by_position, cotangent = c.pool(grad)
    assert by_position.tolist() == [[2.0, -7.0, 5.0]]
    assert apply(cotangent) == [1.25, 2.0, -7.0, 3.75]
