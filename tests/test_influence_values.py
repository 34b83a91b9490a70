"""The numbers that fastfi.influence returns: the same in any batch and precision, those of the
paper's worked example, and those of the oracle where the model's Jacobian is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import samplers
import torch
from networks import SigmoidNetwork, jacobian, mlp, rank_condition, small_cnn
from oracle import Problem
from torch import Tensor, nn

import fastfi

EPS = 2.0**-52


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_alone_in_7_in_256(rule: str, gain: float) -> None:
    """The same sample scores alike in any batch, float32: 1e-4 relative (the contract)."""
    model = small_cnn(10, 7, gain)
    torch.manual_seed(8)
    x = torch.rand(256, 1, 12, 12)
    y = torch.arange(256) % 10
    every = fastfi.influence(model, x, y, inverse=rule)
    seven = fastfi.influence(model, x[:7], y[:7], inverse=rule)
    alone = torch.cat(
        [fastfi.influence(model, x[i : i + 1], y[i : i + 1], inverse=rule) for i in range(7)]
    )
    torch.testing.assert_close(seven, every[:7], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(alone, every[:7], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("rule", ["exact", "damped"])
def test_alone_in_7_in_256_below_full_rank(rule: str) -> None:
    model = mlp(4, 10, 9).float()
    torch.manual_seed(10)
    x = torch.randn(256, 4)
    y = torch.arange(256) % 10
    every = fastfi.influence(model, x, y, inverse=rule)
    seven = fastfi.influence(model, x[:7], y[:7], inverse=rule)
    torch.testing.assert_close(seven, every[:7], rtol=1e-4, atol=0.0)
    for i in range(7):
        alone = fastfi.influence(model, x[i : i + 1], y[i : i + 1], inverse=rule)
        torch.testing.assert_close(alone, every[i : i + 1], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("rule", ["exact", "truncated", "damped"])
@pytest.mark.parametrize("network", ["cnn", "narrow"])
def test_float32_against_float64(rule: str, network: str) -> None:
    """1e-3 relative for samples whose rank is clear (the contract); the others say so by a lower
    rank. Clear: contrasts of condition below 1e3, so that float32 rows (6e-8) fix FI to 1e-4; for
    the authors' rule, no singular value within 1 % of the cut."""
    if network == "cnn":
        model, x = small_cnn(10, 11, 4.0), torch.rand(64, 1, 12, 12)
    else:
        model, x = mlp(4, 10, 12).float(), torch.randn(64, 4)
    y = torch.arange(64) % 10
    single = fastfi.influence(model, x, y, inverse=rule, full_output=True)
    assert single.fi.dtype == torch.float32
    model, x = model.double(), x.double()
    double = fastfi.influence(model, x, y, inverse=rule, full_output=True)
    assert double.fi.dtype == torch.float64
    z, jac = jacobian(model, x)
    if rule == "truncated":
        p = z.softmax(1)
        dl = jac - (p[:, :, None] * jac).sum(1, keepdim=True)
        s = torch.linalg.svdvals((p / (p.sqrt() + 1e-3))[:, :, None] * dl)
        clear = ((s / 1e-3 - 1).abs() > 0.01).all(1)
    else:
        clear = torch.tensor([rank_condition(j[None]) < 1e3 for j in jac])
    assert clear.sum() >= 48
    torch.testing.assert_close(single.fi[clear].double(), double.fi[clear], rtol=1e-3, atol=0.0)
    if rule != "damped":
        assert single.rank[clear].tolist() == double.rank[clear].tolist()


@pytest.mark.parametrize("widths", [[6, 8, 7, 5], [3, 8, 7, 5], [2, 9, 6], [10, 16, 4]])
def test_the_papers_worked_example(widths: list[int]) -> None:
    """Section 2.3: a sigmoid network with closed-form gradients, independent of automatic ones.

    Its own pseudo-inverse resolves eps64 times the condition of G, which is checked.
    """
    network = SigmoidNetwork(widths, seed=sum(widths))
    model = network.module()
    rng = np.random.default_rng(1)
    x = rng.normal(0.0, 1.0, (12, widths[0]))
    y = rng.integers(0, widths[-1], 12)
    got = fastfi.influence(model, torch.from_numpy(x), torch.from_numpy(y), full_output=True)
    rank = min(widths[0], widths[-1] - 1)
    assert got.rank.tolist() == [rank] * 12
    for i in range(12):
        p, dl = network.gradients(x[i])
        assert p.min() > 1e-3
        values = np.linalg.eigvalsh((dl * p[:, None]).T @ dl)[-rank:]
        bound = 100 * EPS * values[-1] / values[0]
        assert bound < 1e-6
        assert abs(got.fi[i].item() - network.influence(x[i], y[i])) <= bound * got.fi[i].item()


def linear_model(problems: list[Problem]) -> tuple[nn.Module, Tensor]:
    """Samples whose logits and Jacobian are exactly those of the problems, classes shuffled: input
    i is 2^shift * rows_i applied at 0, told apart by a last coordinate of zero derivative."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = np.stack([np.vstack([np.zeros_like(q.rows[:1]), q.rows]) for q in problems])
            self.jac = torch.from_numpy(np.ldexp(rows.astype(np.float64), problems[0].shift))
            self.bias = torch.tensor([q.log_prob for q in problems], dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            which = x[:, -1].detach().long()
            z = self.bias[which] + torch.einsum("bkp,bp->bk", self.jac[which], x[:, :-1])
            return z.flip(1)

    x = torch.zeros(len(problems), problems[0].rows.shape[1] + 1, dtype=torch.float64)
    x[:, -1] = torch.arange(len(problems))
    return Chosen().eval(), x


@pytest.mark.parametrize("spread", [1.0, 15.0, 60.0])
@pytest.mark.parametrize(("width", "rank"), [(3, 3), (9, 4), (9, 6)])
def test_a_linear_model_against_the_oracle(spread: float, width: int, rank: int) -> None:
    """End to end with nothing to differentiate wrongly: the contract of the solves holds for the
    public function, for every rule."""
    rng = np.random.default_rng([13, width, rank])
    which = ("top", "middle", "least")
    problems = [samplers.problem(rng, 7, width, rank, spread, kind).scaled(-4) for kind in which]
    model, x = linear_model(problems)
    y = torch.tensor([6 - q.label for q in problems])  # the classes are flipped
    for rule, tolerance in [("exact", 1e-10), ("truncated", 1e-8), ("damped", 1e-8)]:
        got = fastfi.influence(model, x, y, inverse=rule, full_output=True)
        assert got.fi.dtype == torch.float64
        assert got.label.tolist() == y.tolist()
        for i, q in enumerate(problems):
            if rule == "exact":
                want, count = oracle.exact(q)
                assert got.rank[i] == count == rank
            elif rule == "truncated":
                want, count, gap = oracle.truncated(q, 1e-3)
                assert gap > 0.01
                assert got.rank[i] == count
            else:
                want = oracle.damped(q, float(oracle.trace(q)) * 1e-2)
                assert got.rank is None
            assert oracle.relative_error(got.fi[i].item(), want) <= tolerance
            own = q.log_prob[q.label]
            assert abs(got.log_prob[i].item() - own) <= 8 * EPS * max(1.0, abs(own))


@pytest.mark.parametrize(("objective", "kind"), [("entropy", "entropy"), ("callable", "integers")])
def test_other_objectives_of_a_linear_model(objective: str, kind: str) -> None:
    rng = np.random.default_rng(14)
    problems = [samplers.problem(rng, 7, 4, 4, s, kind) for s in (1.0, 5.0, 15.0)]
    model, x = linear_model(problems)
    slopes = torch.tensor([q.grad for q in problems], dtype=torch.float64).flip(1)
    used: str | Callable[[Tensor, Tensor], Tensor] = objective
    if objective == "callable":

        def used(z: Tensor, y: Tensor) -> Tensor:
            return (z * slopes[y]).sum(1)

    y = torch.arange(3)  # told to the callable, which picks its slopes by it
    got = fastfi.influence(model, x, y, objective=used)
    for value, q in zip(got.tolist(), problems, strict=True):
        assert oracle.relative_error(value, oracle.exact(q)[0]) <= 1e-10


def test_a_logit_is_an_objective_beyond_the_contrasts() -> None:
    """z_y has sum g = 1: its gradient is a row of its own, projected on the contrasts' span."""
    rng = np.random.default_rng(15)
    for width, rank in [(3, 3), (9, 4), (9, 6)]:
        q = samplers.problem(rng, 7, width, rank, 5.0, "raw")
        jac = np.vstack([q.raw[None], q.rows + q.raw])  # class 0 has the row h itself
        layer = nn.Linear(width, 7).double().eval()
        layer.weight.data = torch.from_numpy(jac.astype(np.float64))
        layer.bias.data = torch.tensor(q.log_prob, dtype=torch.float64)
        x, y = torch.zeros(1, width, dtype=torch.float64), torch.tensor([0])
        fi = fastfi.influence(layer, x, y, objective="logit").item()
        assert oracle.relative_error(fi, oracle.exact(q)[0]) <= 1e-10
        rule = fastfi.Damped(0.1)
        fi = fastfi.influence(layer, x, y, objective="logit", inverse=rule).item()
        want = oracle.damped(q, float(oracle.trace(q)) * 0.1)
        assert oracle.relative_error(fi, want) <= 1e-8
