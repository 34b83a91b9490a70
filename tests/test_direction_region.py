"""direction(region=...): the most influential perturbation of some pixels alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from networks import jacobian, metric, mlp, rank_condition
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 3, 4)
Y = torch.tensor([0, 3, 6, 2])
MASKS = {
    "a corner": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool(),
    "one pixel": torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool(),
    "unconnected": torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1]]).bool(),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), mlp(24, 7, 21)).eval()


def images() -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(5)).double()


def wanted(
    model: nn.Module, x: Tensor, y: Tensor, masks: Tensor, rule: str
) -> tuple[Tensor, float]:
    """G^+ h (or with tau of the whole input) on the masked columns, and the worst condition."""
    z, jac = jacobian(model, x)
    out, worst = torch.zeros_like(x).flatten(1), 1.0
    whole, _ = metric(z, jac, y)
    p = z.softmax(1)
    for b in range(len(x)):
        at = masks[b].expand(SHAPE).flatten().nonzero().flatten()
        part = jac[b : b + 1, :, at]
        worst = max(worst, rank_condition(part))
        g, h = (t[0] for t in metric(z[b : b + 1], part, y[b : b + 1]))
        if rule == "damped":
            tau = 1e-2 * whole[b].trace()
            v = torch.linalg.solve(g + tau * torch.eye(len(at)).double(), h)
        elif rule == "exact":
            # G = D^T S D; by its largest eigenvalues, as many as the rank
            values, vectors = torch.linalg.eigh(g)
            r = min(6, len(at))
            worst = max(worst, float(values[-1] / values[-r]) ** 0.5)
            v = vectors[:, -r:] @ ((vectors[:, -r:].T @ h) / values[-r:])
        else:
            weight = p[b] / (p[b].sqrt() + 1e-3)
            dl = part[0] - p[b] @ part[0]
            u, s, _ = torch.linalg.svd((weight[:, None] * dl).T, full_matrices=False)
            keep = s > 1e-3
            v = u[:, keep] @ ((u[:, keep].T @ h) / s[keep] ** 2)
            worst = max(worst, float(s[0] / s[keep][-1]))
        out[b, at] = v / v.norm()
    return out.reshape(x.shape), worst


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("name", [*MASKS, "each its own"])
def test_by_the_definition(rule: str, name: str) -> None:
    model, x = network(), images()
    if name == "each its own":
        region = torch.stack([*MASKS.values(), torch.ones(3, 4).bool()])
        masks = region
    else:
        region = MASKS[name]
        masks = region.expand(4, 3, 4)
    v = fastfi.direction(model, x, Y, region=region, inverse=rule)
    assert v.shape == x.shape and v.dtype == x.dtype
    outside = ~masks[:, None].expand_as(v)
    assert bool((v[outside] == 0).all())
    torch.testing.assert_close(
        v.flatten(1).norm(dim=1), torch.ones(4).double(), rtol=1e-12, atol=0.0
    )
    want, condition = wanted(model, x, Y, masks, rule)
    slack = 100 * 2.0**-52 * condition**2  # of the definition itself, in float64
    assert slack < 1e-7
    torch.testing.assert_close(v, want, rtol=0.0, atol=1e-12 + slack)


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
def test_a_region_of_everything_is_no_region(rule: str) -> None:
    model, x = network(), images()
    v = fastfi.direction(model, x, Y, region=torch.ones(3, 4).bool(), inverse=rule)
    assert torch.equal(v, fastfi.direction(model, x, Y, inverse=rule))


def test_it_attains_the_regions_influence() -> None:
    """(h . v)^2 / (v^T (G + tau I) v) is region_influence, and nothing in the region exceeds it."""
    model, x = network(), images()
    region = MASKS["unconnected"]
    z, jac = jacobian(model, x)
    g, h = metric(z, jac, Y)
    tau = 1e-2 * g.diagonal(dim1=1, dim2=2).sum(1)
    for rule, extra in [("damped", tau), ("exact", 0 * tau)]:
        damped = g + extra[:, None, None] * torch.eye(24).double()

        def ratio(w: Tensor, damped: Tensor = damped) -> Tensor:
            w = w.flatten(-3)
            return (h * w).sum(-1) ** 2 / torch.einsum("...bp,bpq,...bq->...b", w, damped, w)

        v = fastfi.direction(model, x, Y, region=region, inverse=rule)
        fi = fastfi.region_influence(model, x, Y, region.long() - 1, inverse=rule)[:, 0]
        # quadratic in the error of v at a maximum; G itself to its condition, below 1e5, in eps64
        torch.testing.assert_close(ratio(v), fi, rtol=1e-9, atol=0.0)
        assert bool(((h * v.flatten(1)).sum(1) > 0).all())
        others = torch.randn(500, 4, *SHAPE, dtype=torch.float64) * region
        assert bool((ratio(others) <= fi * (1 + 1e-9)).all())


def test_flat_inputs() -> None:
    model, x = mlp(6, 4, 2), torch.randn(3, 6, dtype=torch.float64)
    region = torch.tensor([True, False, True, True, False, False])
    v = fastfi.direction(model, x, region=region)
    assert bool((v[:, ~region] == 0).all()) and bool((v[:, region] != 0).any())
    again = fastfi.direction(model, x, region=region.expand(3, 6))
    torch.testing.assert_close(again, v, rtol=1e-12, atol=0.0)


def test_masks_stay_with_their_samples_in_chunks() -> None:
    model = network()
    x = torch.randn(19, *SHAPE, generator=torch.Generator().manual_seed(6)).double()
    region = torch.rand(19, 3, 4, generator=torch.Generator().manual_seed(7)) < 0.5
    want = fastfi.direction(model, x, region=region)
    got = fastfi.direction(model, x, region=region, memory_budget=1)
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-9)
    assert torch.equal(want != 0, region[:, None].expand_as(want))


def test_zero_where_the_region_does_nothing() -> None:
    inner, region = network(), MASKS["a corner"]
    for rule in ("exact", "truncated", "damped"):
        v = fastfi.direction(lambda x: inner(x * ~region), images(), region=region, inverse=rule)
        assert torch.equal(v, torch.zeros_like(v))


EMPTY = torch.stack([MASKS["a corner"], torch.zeros(3, 4).bool()] * 2)


@pytest.mark.parametrize(
    ("region", "expected", "came"),
    [
        (torch.zeros(3, 4).bool(), "at least one pixel", "masks [0]"),
        (EMPTY, "at least one pixel", "masks [1, 3]"),
        (torch.ones(3, 4), "a boolean mask", "torch.float32"),
        (torch.ones(3, 4).long(), "a boolean mask", "torch.int64; try regions == r"),
        (torch.ones(4, 3).bool(), "of shape [3, 4], or [4, 3, 4]", "[4, 3]"),
        (torch.ones(2, 3, 4).bool(), "of shape [3, 4], or [4, 3, 4]", "[2, 3, 4]"),
        (torch.ones(4, 2, 3, 4).bool(), "of shape [3, 4], or [4, 3, 4]", "[4, 2, 3, 4]"),
        ("all", "expected a boolean mask", "str"),
    ],
)
def test_masks_are_refused(region: Any, expected: str, came: str) -> None:
    message = ".*".join(map(re.escape, ("region: ", expected, came)))
    with pytest.raises(fastfi.InputError, match=message):
        fastfi.direction(network(), images(), region=region)
