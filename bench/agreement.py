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
from bench import baselines
from bench.workloads import NETWORKS, network, problems
from fastfi.backends import reference

__all__ = ["Check", "checks"]

ops = torch.ops.fastfi

SAMPLES = 4  # of each network


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


def checks() -> Iterator[Check]:
    """Every check, computed as it is asked for."""
    yield from _operators()
    yield from _networks()
