"""fastfi.direction: the perturbation that attains FI."""

from __future__ import annotations

import pytest
import torch
from networks import jacobian, metric, mlp, rank_condition
from torch import Tensor, nn

import fastfi

EPS = 2.0**-52

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("inputs", "classes"), [(1, 4), (3, 8), (12, 5)])
@pytest.mark.parametrize("labels", ["predicted", "random"])
def test_direction_is_the_most_influential(inputs: int, classes: int, labels: str) -> None:
    """It attains FI = max (h . w)^2 / (w^T G w), which no other w exceeds."""
    model = mlp(inputs, classes, 16)
    torch.manual_seed(17)
    x = torch.randn(8, inputs, dtype=torch.float64)
    y = model(x).argmax(1) if labels == "predicted" else torch.arange(8) % classes
    z, jac = jacobian(model, x)
    g, h = metric(z, jac, y)
    slack = 1e-12 + 100 * EPS * rank_condition(jac) ** 2
    assert slack < 1e-6
    v = fastfi.direction(model, x, None if labels == "predicted" else y)
    assert v.shape == x.shape
    assert v.dtype == x.dtype
    torch.testing.assert_close(v.norm(dim=1), torch.ones(8).double(), rtol=1e-12, atol=0.0)
    assert ((h * v).sum(1) >= 0).all()

    def ratio(w: Tensor) -> Tensor:
        return (h * w).sum(-1) ** 2 / torch.einsum("...bp,bpq,...bq->...b", w, g, w)

    fi = fastfi.influence(model, x, y)
    # v is known to eps64 kappa in relative length; at a maximum the ratio moves by its square
    torch.testing.assert_close(ratio(v), fi, rtol=slack, atol=0.0)
    others = ratio(torch.randn(2000, 8, inputs, dtype=torch.float64))
    nearby = ratio(v + 1e-2 * torch.randn(200, 8, inputs, dtype=torch.float64))
    assert (others <= fi * (1 + slack)).all()
    assert (nearby <= fi * (1 + slack)).all()


def test_direction_of_the_damped_rule() -> None:
    """The maximiser of (h . w)^2 / (w^T (G + tau I) w)."""
    model = mlp(6, 8, 18)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8)
    z, jac = jacobian(model, x)
    g, h = metric(z, jac, y)
    tau = 1e-2 * g.diagonal(dim1=1, dim2=2).sum(1)
    damped = g + tau[:, None, None] * torch.eye(6).double()
    want = torch.linalg.solve(damped, h)
    want = want / want.norm(dim=1, keepdim=True)
    got = fastfi.direction(model, x, y, inverse="damped")
    # condition 100 for alpha = 1e-2
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-11)


def test_direction_moves_the_objective_as_predicted() -> None:
    """A small step along v changes -log P_y by h . v > 0 times its length."""
    model = mlp(12, 5, 19)
    x, y = torch.randn(8, 12, dtype=torch.float64), torch.arange(8) % 5
    v = fastfi.direction(model, x, y)
    step = 1e-5
    with torch.no_grad():
        loss = [
            nn.functional.cross_entropy(model(x + s * v), y, reduction="none")
            for s in (-step, step)
        ]
    slope = (loss[1] - loss[0]) / (2 * step)
    z, jac = jacobian(model, x)
    _, h = metric(z, jac, y)
    assert (slope > 0).all()
    # central differences: third derivatives times step^2, and eps64 / step
    torch.testing.assert_close(slope, (h * v).sum(1), rtol=0.0, atol=1e-8)


def test_direction_is_zero_where_nothing_moves() -> None:
    layer = nn.Linear(5, 4).double().eval()
    nn.init.zeros_(layer.weight)
    v = fastfi.direction(layer, torch.randn(3, 5, dtype=torch.float64))
    assert torch.equal(v, torch.zeros(3, 5).double())
