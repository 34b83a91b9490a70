"""The numbers of influence_map: each window taken alone, the authors' rule window by window, and
what the theory says of any map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import jacobian, metric, rank_condition
from torch import Tensor, nn
from windows import Layout

import fastfi
from fastfi.inverse import Inverse

EPS = 2.0**-52

pytestmark = pytest.mark.usefixtures("one_thread")


def network(classes: int, seed: int = 0, gain: float = 2.0) -> nn.Module:
    """Float64, smooth, for 2 x 5 x 6 images."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(180, classes)
    ).double()
    with torch.no_grad():
        net[0].weight.normal_(0.0, 0.4)
        net[3].weight.normal_(0.0, gain / 10)
        net[3].bias.normal_(0.0, gain / 2)
    return net.eval()


def images(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 2, 5, 6, generator=torch.Generator().manual_seed(seed)).double()


class Alone(nn.Module):
    """A network of which only some pixels of one image are inputs: [B, len(at)] -> [B, K]."""

    def __init__(self, model: nn.Module, x: Tensor, at: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.at = model, x.flatten(1), at
        self.shape = x.shape[1:]

    def forward(self, part: Tensor) -> Tensor:
        at = self.at.expand(len(part), -1)
        full = self.x.expand(len(part), -1).scatter(1, at, part)
        return self.model(full.reshape(-1, *self.shape))


PIXELS = [(0, 0), (0, 5), (4, 0), (2, 3), (4, 4)]


@pytest.mark.parametrize("objective", ["cross_entropy", "logit", "entropy"])
@pytest.mark.parametrize("channels", ["separate", "joint"])
@pytest.mark.parametrize("lump", [None, 0.2])
def test_every_window_is_influence_of_its_pixels(
    channels: str, objective: str, lump: float | None
) -> None:
    """The same rows and sums in another order: eps64 times the square of the rows' condition, which
    is below 1e3, comes to 2e-10 at most."""
    model, x = network(6), images(1)
    scales = (1, 3, 5)
    layout = Layout((5, 6), 2, scales, channels)
    options = {"objective": objective, "lump": lump}
    z, jac = jacobian(model, x)
    prob = z.softmax(1)
    if lump is not None:
        lumped = fastfi.influence_map(model, x, scales=[5], inverse="exact", full_output=True,
                                      lump=lump)  # fmt: skip
        assert 1 < int(lumped.rank.max()) < 5
    whole = {
        rule: fastfi.influence_map(
            model, x, scales=scales, channels=channels, inverse=rule, full_output=True, **options
        )
        for rule in ("exact", "truncated", "damped")
    }
    for s, scale in enumerate(scales):
        for pixel in PIXELS:
            around = torch.from_numpy(layout.at(pixel, scale))
            for c in range(layout.groups):
                at = torch.cat([around, around + 30]) if channels == "joint" else around + 30 * c
                place = (0, s, *pixel) if channels == "joint" else (0, s, c, *pixel)
                assert rank_condition(jac[:, :, at]) < 1e3
                part, own = x.flatten(1)[:, at], Alone(model, x, at[None])
                for rule in ("exact", "truncated"):
                    want = fastfi.influence(own, part, inverse=rule, full_output=True, **options)
                    torch.testing.assert_close(
                        whole[rule].fi[place], want.fi[0], rtol=1e-9, atol=0.0
                    )
                    assert whole[rule].rank[place] == want.rank[0]
                    assert whole[rule].label[0] == want.label[0] == prob.argmax()
                if lump is None:
                    # tau is relative to the metric of the whole input
                    traces = [(metric(z, j, z.argmax(1))[0]).diagonal(dim1=1, dim2=2).sum()
                              for j in (jac, jac[:, :, at])]  # fmt: skip
                    rule_ = fastfi.Damped(1e-2 * float(traces[0] / traces[1]))
                    want_ = fastfi.influence(own, part, inverse=rule_, **options)
                    torch.testing.assert_close(
                        whole["damped"].fi[place], want_[0], rtol=1e-10, atol=0.0
                    )


def authors_rule(
    p: np.ndarray, jac: np.ndarray, y: int, eps: float
) -> tuple[float, int, float, float]:
    """The published scripts' arithmetic: dP_k / (sqrt(P_k) + eps), an SVD, an absolute cut.

    Args:
        p: [K]; jac: dz/d(window), [K, w].

    Returns:
        FI, the number of singular values kept, their smallest relative distance from the cut, and
        the largest of them.
    """
    mean = np.zeros(jac.shape[1])
    for k in range(len(p)):
        mean += p[k] * jac[k]
    d_prob = np.zeros_like(jac)
    l0 = np.zeros_like(jac)
    for k in range(len(p)):
        d_prob[k] = p[k] * (jac[k] - mean)
        l0[k] = d_prob[k] / (np.sqrt(p[k]) + eps)
    h = -d_prob[y] / (p[y] + eps)
    u, s, _ = np.linalg.svd(l0.T, full_matrices=False)  # u [w, min(w, K)]
    fi, kept = 0.0, 0
    for i in range(len(s)):
        if s[i] > eps:
            fi += float(u[:, i] @ h) ** 2 / s[i] ** 2
            kept += 1
    return fi, kept, float(np.abs(s / eps - 1).min()), float(s[0])


@pytest.mark.parametrize("gain", [0.5, 2.0, 6.0])
def test_the_authors_rule(gain: float) -> None:
    """Whole maps of the paper's Setup 4 against loops over windows, pixels in 0..255.

    The cut is 1e-2 of the largest singular value or more, so that squares of those above it are
    known to 1e4 eps64 and better in either arithmetic."""
    inner = network(7, 3, gain)
    x = (127 + 60 * images(2, 4)).clamp(0, 255)

    def model(x: Tensor) -> Tensor:
        return inner((x - 127) / 60)

    scales = (1, 3, 5)
    y = torch.tensor([2, 5])
    got = fastfi.influence_map(model, x, y, scales=scales, inverse="truncated", full_output=True)
    assert got.label.tolist() == [2, 5]
    z, jac = jacobian(model, x)
    layout = Layout((5, 6), 2, scales, "separate")
    p, jac_ = z.softmax(1).numpy(), jac.numpy()
    counts = set()
    for b in range(2):
        fi, rank = got.fi[b].flatten().tolist(), got.rank[b].flatten().tolist()
        for i, at in enumerate(layout.columns()):
            want, kept, gap, largest = authors_rule(p[b], jac_[b][:, list(at)], int(y[b]), 1e-3)
            assert gap > 1e-6 and largest < 0.1
            counts.add(kept)
            assert rank[i] == kept
            assert abs(fi[i] - want) <= 1e-8 * want  # the contract
    assert 0 in counts and max(counts) > 1


@pytest.mark.parametrize("rule", ["damped", "exact"])
@pytest.mark.parametrize("c", [2.0**-20, 0.3, 255.0])
def test_rescaling_the_input_changes_nothing(rule: str, c: float) -> None:
    model, x = network(6), images(3)
    want = fastfi.influence_map(model, x, inverse=rule)
    got = fastfi.influence_map(lambda v: model(v / c), x * c, inverse=rule)
    # rows to a few eps64; the exact rule magnifies by the square of a condition below 1e3
    torch.testing.assert_close(got, want, rtol=1e-8 if rule == "exact" else 1e-11, atol=0.0)


@pytest.mark.parametrize("rule", ["damped", "exact"])
def test_maps_grow_with_the_scale(rule: str) -> None:
    model, x = network(6), images(3)
    y = torch.tensor([0, 3, 5])
    maps = fastfi.influence_map(model, x, y, scales=(1, 3, 5, 11), inverse=rule)
    assert bool((maps[:, :-1] <= maps[:, 1:] * (1 + 1e-9)).all())
    joint = fastfi.influence_map(model, x, y, scales=(1, 3, 5, 11), inverse=rule, channels="joint")
    assert bool((maps <= joint[:, :, None] * (1 + 1e-9)).all())
    # a window of everything, from any pixel
    whole = fastfi.influence(model, x, y, inverse=rule)
    torch.testing.assert_close(
        joint[:, 3], whole[:, None, None].expand(3, 5, 6), rtol=1e-10, atol=0.0
    )


@pytest.mark.parametrize(
    ("rule", "default"),
    [
        (fastfi.Exact(0.6), fastfi.Exact()),
        (fastfi.Truncated(0.05), fastfi.Truncated()),
        (fastfi.Damped(0.3), fastfi.Damped()),
    ],
)
def test_the_parameters_of_the_rules_are_used(rule: Inverse, default: Inverse) -> None:
    model, x = network(6), images(3)
    got, other = (
        fastfi.influence_map(
            model, x, scales=[11], channels="joint", inverse=inverse, full_output=True
        )
        for inverse in (rule, default)
    )
    want = fastfi.influence(model, x, inverse=rule, full_output=True)
    torch.testing.assert_close(got.fi, want.fi.view(3, 1, 1, 1).expand(3, 1, 5, 6), rtol=1e-10,
                               atol=0.0)  # fmt: skip
    assert bool((got.fi != other.fi).any())
    if want.rank is not None:
        assert torch.equal(got.rank, want.rank.view(3, 1, 1, 1).expand(3, 1, 5, 6))
        assert bool((got.rank < other.rank).any())


def test_exact_maps_are_constant_where_the_rank_is_full() -> None:
    """FI = (1 - P_y) / P_y in every window with K - 1 independent pixels."""
    model, x = network(6), images(3)
    y = torch.tensor([0, 3, 5])
    maps = fastfi.influence_map(model, x, y, scales=(5, 1), inverse="exact", full_output=True)
    assert bool((maps.rank[:, 0] == 5).all()) and bool((maps.rank[:, 1] == 1).all())
    log_p = model(x).detach().log_softmax(1)
    want = fastfi.influence(model, x, y, assume_full_rank=True)
    torch.testing.assert_close(
        maps.fi[:, 0], want.view(3, 1, 1, 1).expand(3, 2, 5, 6), rtol=1e-12, atol=0.0
    )
    own = log_p.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(maps.log_prob, own, rtol=4 * EPS, atol=0.0)


def test_a_pixel_that_does_nothing_has_no_influence() -> None:
    model, x = network(6), images(2)
    hidden = torch.ones(2, 5, 6).double()
    hidden[:, 1:4, 2:5] = 0
    for rule in ("exact", "truncated", "damped"):
        got = fastfi.influence_map(
            lambda v: model(v * hidden), x, scales=(1, 3), inverse=rule, full_output=True
        )
        assert bool((got.fi[:, 0, :, 1:4, 2:5] == 0).all())
        assert bool((got.fi[:, 1, :, 2, 3] == 0).all())
        assert int((got.fi == 0).sum()) == 2 * 2 * 10
        if rule != "damped":
            assert torch.equal(got.rank == 0, got.fi == 0)
