"""Checks that everything the benchmarks compare computes the same numbers. Run before any timing.

The operators are compared on problems whose rank is clear and whose logits have a moderate spread,
where torch.linalg is right too; the accuracy contract proper is the tests' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastfi
from bench import baselines, map_baselines
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


def checks() -> Iterator[Check]:
    """Every check, computed as it is asked for."""
    yield from _operators()
    yield from _networks()
    yield from _maps()
