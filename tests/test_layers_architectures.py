"""Influence of parameters for every kind of network, against the whole Jacobian in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from architectures import AFFINE_HEAD, BLIND, BUILDERS, UNREACHED, build
from layer_jacobian import Block, LayerJacobian, as_logits, layer_jacobian, layer_names
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 2.0**-52
ALPHA = 1e-2


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    jacobian: LayerJacobian

    @property
    def layers(self) -> list[str]:
        return layer_names(self.model)

    @property
    def selection(self) -> list[str]:
        """Each child that has trainable parameters, and three parameters, by name."""
        trainable = list(self.jacobian.index)
        children = dict.fromkeys(n.split(".")[0] for n in trainable if "." in n)
        return [*children, *dict.fromkeys(trainable[i] for i in (0, len(trainable) // 2, -1))]

    def blocks(self, wrt: str) -> list[tuple[object, list[Callable[[int], Block]]]]:
        """What to ask for, and the oracle's blocks, one for each column."""
        j = self.jacobian
        if wrt == "layers":
            return [("layers", [lambda i, n=n: j.layer(i, n) for n in self.layers])]
        if wrt == "selected":
            names = self.selection
            return [(names, [lambda i, n=n: j.selected(i, n) for n in names])]
        # "params", and where the input has a derivative "all"
        whole: list[tuple[object, list[Callable[[int], Block]]]] = [("params", [j.params])]
        return whole if j.input is None else [*whole, ("all", [j.everything])]

    def tau(self, wrt: object, sample: int) -> float:
        j = self.jacobian
        return ALPHA * (j.everything(sample) if wrt == "all" else j.params(sample)).trace()

    def samples(self) -> Iterator[tuple[int, int]]:
        return enumerate(self.y.tolist())


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    model, x = build(request.param)
    jacobian = layer_jacobian(model, x)
    y = torch.arange(len(x)) % jacobian.logits.shape[1]
    return Case(request.param, model, x, y, jacobian)


def columns(out: fastfi.Influence, wrt: object, names: list[str]) -> tuple[Tensor, Tensor | None]:
    """FI and ranks as [B, L], after a look at names and shapes."""
    single = isinstance(wrt, str) and wrt != "layers"
    assert out.names == ((wrt,) if single else tuple(names))
    assert out.fi.shape == (len(out.label),) if single else (len(out.label), len(names))
    assert out.rank is None or out.rank.shape == out.fi.shape
    if not single:
        return out.fi, out.rank
    return out.fi[:, None], None if out.rank is None else out.rank[:, None]


def names_of(case: Case, wrt: object) -> list[str]:
    return case.layers if wrt == "layers" else list(wrt) if isinstance(wrt, list) else [str(wrt)]


def test_the_oracle_against_differences(case: Case) -> None:
    """J v = dz / dt along a random line of all parameters: neither autograd nor layers.

    A central difference of step 1e-7 errs by eps64 / 1e-7 = 2e-9, and hardly ever meets a kink.
    """
    if case.name in BLIND:
        pytest.skip("autograd is told not to see all of this function")
    parameters = {id(p): p for p in case.model.parameters() if p.requires_grad}
    line = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters.values()]
    start = [p.detach().clone() for p in parameters.values()]
    step, ends = 1e-7, []
    with torch.no_grad():
        for sign in (1.0, -1.0, 0.0):
            for p, v, s in zip(parameters.values(), line, start, strict=True):
                p.copy_(s + sign * step * v)
            ends.append(as_logits(case.model(case.x)))
    want = (ends[0] - ends[1]) / (2 * step)
    got = sum(
        torch.einsum("bkp,p->bk", rows, v.flatten())
        for rows, v in zip(case.jacobian.rows, line, strict=True)
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * float(want.abs().max()))


@pytest.mark.parametrize("wrt", ["layers", "params", "selected"])
def test_damped(case: Case, wrt: str) -> None:
    """Every entry of every Gram matrix counts here. Rounding is eps64 / alpha = 2e-14, times what
    the network's depth makes of eps64; 1e-16 of the full-rank value is what a block that cannot
    move the logits (a bias before a normalisation) may show."""
    for what, blocks in case.blocks(wrt):
        rule = fastfi.Damped(ALPHA)
        out = fastfi.influence(case.model, case.x, case.y, wrt=what, inverse=rule, full_output=True)
        assert out.rank is None and out.closed_form == ()
        assert torch.equal(out.label, case.y) and out.fi.dtype == torch.float64
        fi, _ = columns(out, what, names_of(case, what))
        for i, y in case.samples():
            tau = case.tau(what, i)
            want = torch.tensor([b(i).damped(y, tau) for b in blocks], dtype=torch.float64)
            none = 1e-16 * case.jacobian.params(i).closed_form(y)
            torch.testing.assert_close(fi[i], want, rtol=1e-8, atol=none)


@pytest.mark.parametrize("wrt", ["layers", "params", "selected"])
def test_exact(case: Case, wrt: str) -> None:
    """FI and rank, where the rank is plain: no singular value of the contrasts between 1e-11 and
    1e-3 of the largest.

    sqrt(FI) is the length of a projection of a vector of length sqrt((1 - P_y) / P_y), onto a space
    that a Gram matrix fixes to some eps64 kappa^2 (kappa below 1e3); see the tests of the theory.
    """
    plain = total = 0
    for what, blocks in case.blocks(wrt):
        out = fastfi.influence(case.model, case.x, case.y, wrt=what, full_output=True)
        fi, rank = columns(out, what, names_of(case, what))
        assert rank is not None and rank.dtype == torch.int64
        assert bool((fi >= 0).all()) and bool(fi.isfinite().all())
        for i, y in case.samples():
            whole = case.jacobian.params(i)
            for column, make in enumerate(blocks):
                block, total = make(i), total + 1
                want, count = block.exact(y)
                largest = float(block.spectrum[0])
                if count is None or 0 < largest < 1e-9 * float(whole.spectrum[0]):
                    continue
                plain += 1
                assert rank[i, column] == count, (out.names[column], i)
                got, top = float(fi[i, column]), block.closed_form(y)
                delta = 1000 * EPS * block.condition() ** 2
                assert abs(got**0.5 - want**0.5) <= delta * top**0.5, (out.names[column], i)
                if count == len(block.logits) - 1:
                    assert got == pytest.approx(top, rel=1e-10)
    # Some of the small blocks of a deep network have a rank that is not plain.
    assert plain >= 0.75 * total


@pytest.mark.parametrize("wrt", ["layers", "params", "selected"])
def test_truncated(case: Case, wrt: str) -> None:
    """The authors' rule with a cut that drops some of the values, wherever none lies within 1 % of
    it. Gram matrices give squares of singular values to some eps64 of the largest, which rotates
    what is kept by delta = 100 eps64 s_max^2 / (cut^2 1 %)."""
    cut, clear = 0.05 * case.jacobian.params(0).trace() ** 0.5, 0
    for what, blocks in case.blocks(wrt):
        rule = fastfi.Truncated(cut)
        out = fastfi.influence(case.model, case.x, case.y, wrt=what, inverse=rule, full_output=True)
        fi, rank = columns(out, what, names_of(case, what))
        assert rank is not None and out.closed_form == ()
        for i, y in case.samples():
            for column, make in enumerate(blocks):
                block = make(i)
                want, count, gap = block.truncated(y, cut)
                delta = 100 * EPS * float(block.spectrum[0] ** 2) / (0.01 * cut**2)
                if gap < 0.01 or delta > 1e-5:
                    continue
                clear += 1
                assert rank[i, column] == count
                error = abs(float(fi[i, column]) - want)
                assert error <= max(delta, 1e-8) * (want + block.closed_form(y))
    assert clear > 0


def test_what_the_result_says_of_itself(case: Case) -> None:
    """Parameters that reach nothing; affine heads that need no backward pass."""
    unreached = UNREACHED.get(case.name, ())
    layers = fastfi.influence(case.model, case.x, case.y, wrt="layers", full_output=True)
    params = fastfi.influence(case.model, case.x, case.y, wrt="params", full_output=True)
    assert layers.unreached == params.unreached == unreached
    assert layers.rank is not None
    for column, name in enumerate(layers.names):
        if unreached and all(n.rpartition(".")[0] == name for n in unreached):
            assert bool((layers.fi[:, column] == 0).all())
            assert bool((layers.rank[:, column] == 0).all())
    if case.name in AFFINE_HEAD:
        assert params.closed_form == ("params",)
        assert layers.closed_form == layers.names[-1:]
    forms = [case.jacobian.params(i).closed_form(y) for i, y in case.samples()]
    want = torch.tensor(forms, dtype=torch.float64)
    for out in (layers, params):
        assert set(out.closed_form) <= set(out.names)
        for name in out.closed_form:  # a claim of a proof: to the last bits
            fi = out.fi if out is params else out.fi[:, out.names.index(name)]
            torch.testing.assert_close(fi, want, rtol=1e-12, atol=0.0)


def test_verify(case: Case) -> None:
    """The package's own check of its rules, by the full Jacobian, finds them right."""
    out = fastfi.layers.verify(case.model, case.x)
    assert out.names == tuple(case.layers)
    assert out.error.shape == (len(case.layers),) and out.error.dtype == torch.float64
    assert out.disagree == ()
    assert bool((out.error <= out.bound).all())
    assert 0 < out.bound < 1e-6


def test_float32(case: Case) -> None:
    """1e-3 relative (the contract); 1e-6 of the largest of the sample's layers is what float32's
    6e-8 leaves of a layer whose rows cancel."""
    single, x = build(case.name)[0].float(), case.x
    x = x.float() if x.is_floating_point() else x
    for what, blocks in case.blocks("layers") + case.blocks("params"):
        fi = fastfi.influence(single, x, case.y, wrt=what, inverse=fastfi.Damped(ALPHA))
        assert fi.dtype == torch.float32
        fi = fi.double().reshape(len(x), -1)
        for i, y in case.samples():
            tau = case.tau(what, i)
            want = torch.tensor([b(i).damped(y, tau) for b in blocks], dtype=torch.float64)
            torch.testing.assert_close(fi[i], want, rtol=1e-3, atol=1e-6 * float(want.max()))
