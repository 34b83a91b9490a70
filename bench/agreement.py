"""Checks that everything the benchmarks compare computes the same numbers. Run before any timing.

The operators are compared on problems whose rank is clear and whose logits have a moderate spread,
where torch.linalg is right too; the accuracy contract proper is the tests' business.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastfi
from bench import baselines, layer_baselines, map_baselines
from bench.layer_peers import PEERS, prepare
from bench.layer_problems import influence, layer_network
from bench.map_problems import PROBLEMS, RULES, solve_maps
from bench.workloads import NETWORKS, network, problems
from fastfi.backends import reference, reference_windows

__all__ = ["Check", "checks"]

ops = torch.ops.fastfi

SAMPLES = 4  # of each network
WINDOWS = 60  # of each map, for the loop of SVDs


class Check(NamedTuple):
    """The largest relative difference between two ways to compute something, and the bound."""

    name: str
    difference: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # False for NaN


def _relative(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).abs() / b.double().abs()).max())


def _operators() -> Iterator[Check]:
    eps = torch.finfo(torch.float64).eps
    for batch, r in ((8, 9), (2, 99)):
        rows = torch.randn(batch, r, 3072, generator=torch.Generator().manual_seed(0))
        got, wide = ops.gram(rows), rows.double()
        scale = wide.square().sum(2).amax()
        for name, want in (
            ("reference", reference.gram(rows)),
            ("torch.bmm", torch.bmm(wide, wide.mT)),
        ):
            # Sums of 3,072 products: each order of summation errs by at most 3072 eps.
            difference = float((got - want).abs().max() / scale)
            yield Check(f"gram, {r} x 3072, C++ and {name}", difference, 3072 * eps)
    for n, p, batch in ((10, 40, 16), (10, 5, 16), (99, 396, 2)):
        q = problems(batch, n, p)
        dz = torch.cat([q.rows.new_zeros(batch, 1, p), q.rows], 1)
        dl = dz - (q.log_prob.exp()[:, :, None] * dz).sum(1, keepdim=True)
        plain = (dl, q.log_prob, q.label)
        arguments = (q.gram, q.log_prob, q.label, None)
        rtol = 10 * eps
        for rule, got, ref, linalg in (
            (
                "exact",
                ops.solve_exact(*arguments, rtol)[0],
                reference.solve_exact(*arguments, rtol)[0],
                baselines.exact(*plain),
            ),
            (
                "truncated",
                ops.solve_truncated(*arguments, 1e-3)[0],
                reference.solve_truncated(*arguments, 1e-3)[0],
                baselines.truncated(*plain),
            ),
            (
                "damped",
                ops.solve_damped(*arguments, q.tau),
                reference.solve_damped(*arguments, q.tau),
                baselines.damped(*plain),
            ),
        ):
            name = f"solve_{rule}, {n} x {n}, rank {min(n, p)}, C++ and"
            yield Check(f"{name} reference", _relative(got, ref), 1e-8)
            # torch.linalg squares the condition number: about half of float64's digits.
            yield Check(f"{name} torch.linalg", _relative(got, linalg), 1e-6)


def _networks() -> Iterator[Check]:
    # Float32 gradients, computed in different orders: the contract's end-to-end bound.
    bound = 1e-3
    for name in NETWORKS:
        q = network(name)
        x, y = q.x[:SAMPLES], q.y[:SAMPLES]
        dl, log_prob = baselines.jacrev_rows(q.model, x)
        fi = {
            rule: fastfi.influence(q.model, x, y, inverse=rule, dtype=torch.float64)
            for rule in ("exact", "truncated", "damped")
        }
        for rule, got in fi.items():
            want = getattr(baselines, rule)(dl, log_prob, y)
            yield Check(f"{name}, {rule}, fastfi and jacrev", _relative(got, want), bound)
        naive = baselines.naive_influence(q.model, x[:2], y[:2])
        difference = _relative(fi["exact"][:2], naive)
        yield Check(f"{name}, exact, fastfi and naive", difference, bound)
        full = fastfi.influence(q.model, x, y, assume_full_rank=True, dtype=torch.float64)
        difference = _relative(fi["exact"], full)
        yield Check(f"{name}, exact and assume_full_rank", difference, bound)
        contrasts = baselines.forward_backward(q.model, x)[0].flatten(2).transpose(0, 1)
        order = log_prob.argsort(1, descending=True)
        pick = order[:, :, None].expand_as(dl)
        want = dl.gather(1, pick)[:, 1:] - dl.gather(1, pick)[:, :1]
        difference = float((contrasts - want).abs().max() / want.abs().max())
        yield Check(f"{name}, rows of the passes and of jacrev", difference, bound)


def _map_difference(a: Tensor, b: Tensor) -> float:
    """Relative to b, or to a millionth of its largest FI where that is more: a truncated map is
    zero at places."""
    return float(((a - b).abs() / b.clamp(min=1e-6 * float(b.max()))).max())


def _maps() -> Iterator[Check]:
    eps = torch.finfo(torch.float64).eps
    for name, problem in PROBLEMS.items():
        q = problem()
        if q.windows > 100_000 or q.log_prob.shape[1] > 10:
            q = q.lines(8)
        places = map_baselines.windows_of(q, WINDOWS)
        for rule in RULES:
            got = solve_maps(q, rule)
            title = f"maps, {name}, {rule}, C++ and"
            want = solve_maps(q, rule, reference_windows.window_influence)
            # Where the rank is deficient, the Gram matrices' rounding errors grow by the condition
            # number that the rank decision admits; a row just above the decision for one of the
            # two and below it for the other moves FI by as much as the decision's length.
            exact = max(q.rows.shape[1] * eps / q.rtol**2, q.rtol)
            bound = exact if rule == "exact" else 1e-8
            yield Check(f"{title} reference", _map_difference(got, want), bound)
            # Where classes are improbable, G's own singular values fall below that decision, which
            # fastfi makes on the rows: torch.linalg and numpy drop what it keeps.
            even = bool(q.log_prob.min() > -7)
            bound = (exact if even else 1e-3) if rule == "exact" else 1e-6
            want = map_baselines.eigh_maps(q, rule)
            yield Check(f"{title} torch.linalg.eigh", _map_difference(got, want), bound)
            loop = map_baselines.svd_loop(map_baselines.prepare(q, rule), places)
            some = map_baselines.pick(got, places)
            difference = _map_difference(some, torch.from_numpy(loop))
            yield Check(f"{title} loop of two SVDs", difference, bound)


def _layers() -> Iterator[Check]:
    # Float32 gradients err by some 1e-6 of the largest, and FI by as much times the range of a
    # layer's singular values, which is below 100 at a spread of 1: within the contract's end-to-end
    # bound. The Jacobian is computed in float64: products in float32 cannot tell a singular value
    # below the truncated rule's 1e-3 from zero where the largest is 50.
    bound = 1e-3
    for name in ("SmallCNN", "ResNet-18", "ResNet-50"):
        q = layer_network(name, 2)
        wide = copy.deepcopy(q.model).double()
        grams = layer_baselines.jacrev_grams(wide, q.x.double())
        total = grams._replace(gram=grams.gram.sum(1, keepdim=True))  # all parameters together
        for rule in ("exact", "truncated", "damped"):
            title = f"layers, {name}, {rule}"
            got = influence(q, rule, dtype=torch.float64)
            want = layer_baselines.solve(grams, q.y, rule)
            yield Check(f"{title}, fastfi and jacrev in float64", _relative(got, want), bound)
            params = influence(q, rule, wrt="params", dtype=torch.float64)
            want = layer_baselines.solve(total, q.y, rule)[:, 0]
            yield Check(f"{title}, params, fastfi and jacrev", _relative(params, want), bound)
            if name != "ResNet-50":  # for the sake of time
                naive = layer_baselines.naive_layers(q.model, q.x[:1], q.y[:1], rule)
                yield Check(f"{title}, fastfi and naive", _relative(got[:1], naive), bound)
    yield from _peers(bound)


def _peers(bound: float) -> Iterator[Check]:
    q = layer_network("SmallCNN", 4)
    for method, peer in PEERS.items():
        if importlib.util.find_spec(peer.package) is None:
            continue
        grams = prepare(peer, q.model)(q.x)
        for rule in ("exact", "damped"):
            wrt = "params" if peer.summed else "layers"
            got = influence(q, rule, wrt=wrt, dtype=torch.float64).view(len(q.x), -1)
            want = layer_baselines.solve(grams, q.y, rule)
            title = f"{wrt}, SmallCNN, {rule}, fastfi and {method}"
            yield Check(title, _relative(got, want), bound)


def checks() -> Iterator[Check]:
    """Every check, computed as it is asked for."""
    yield from _operators()
    yield from _networks()
    yield from _maps()
    yield from _layers()
