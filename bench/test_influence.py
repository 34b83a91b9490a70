"""``fastfi.influence`` (Setup 1: input, true label) against ``bench.baselines``."""

from __future__ import annotations

import itertools
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastfi
from bench import baselines
from bench.race import AT_LEAST, AT_MOST, Side, race
from bench.workloads import NETWORKS, Network, network

RULES = ("exact", "truncated", "damped")
EVERY = pytest.mark.parametrize("name", NETWORKS)


def side(q: Network, inverse: str = "exact", assume_full_rank: bool = False) -> Side:
    """Setup 1 on the network's batch."""
    label = f"Setup 1, {inverse}" + (", assume_full_rank" if assume_full_rank else "")
    return Side(
        label,
        lambda: fastfi.influence(
            q.model, q.x, q.y, inverse=inverse, assume_full_rank=assume_full_rank
        ),
        len(q.x),
    )


def chunk_sizes(q: Network, inverse: str) -> list[int]:
    """The chunks in which fastfi calls the model for this batch, once it has measured the model."""
    fastfi.influence(q.model, q.x, q.y, inverse=inverse)
    sizes: list[int] = []
    handle = q.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    fastfi.influence(q.model, q.x, q.y, inverse=inverse)
    handle.remove()
    return sizes


def describe(sizes: list[int]) -> str:
    """``16 + 2 x 120`` for [16, 120, 120]."""
    runs = [(size, len(list(group))) for size, group in itertools.groupby(sizes)]
    return " + ".join(f"{count} x {size}" if count > 1 else f"{size}" for size, count in runs)


@EVERY
def test_assumed_rank_against_forward(benchmark: BenchmarkFixture, name: str) -> None:
    q = network(name)
    yardstick = Side("one forward pass", lambda: baselines.forward(q.model, q.x), len(q.x))
    work = side(q, assume_full_rank=True)
    race(benchmark, work, yardstick, section=name, rounds=21, kind=AT_MOST, target=1.05)


@EVERY
@pytest.mark.parametrize("inverse", RULES)
def test_against_passes(benchmark: BenchmarkFixture, inverse: str, name: str) -> None:
    q = network(name)
    batch = len(q.x)
    sizes = chunk_sizes(q, inverse)
    title = f"forward + 9 backward passes, same chunks ({describe(sizes)})"
    yardstick = Side(title, lambda: baselines.forward_backward(q.model, q.x, sizes), batch)
    target = 1.10 if name.startswith("ResNet") else None
    work = side(q, inverse)
    race(benchmark, work, yardstick, section=name, rounds=q.rounds, kind=AT_MOST, target=target)


def best_batch(q: Network) -> Tensor:
    """The batch at which the passes cost least per sample, each size tried twice in turn."""
    wide = q.x.repeat(-(-max(q.batches) // len(q.x)), 1, 1, 1)
    cost = dict.fromkeys(q.batches, float("inf"))
    for _ in range(2):
        for size in cost:
            start = time.perf_counter()
            baselines.forward_backward(q.model, wide[:size])
            cost[size] = min(cost[size], (time.perf_counter() - start) / size)
    return wide[: min(cost, key=lambda size: cost[size])]


@EVERY
def test_against_passes_at_their_best(benchmark: BenchmarkFixture, name: str) -> None:
    q = network(name)
    x = best_batch(q)
    title = f"forward + 9 backward passes, best batch ({len(x)})"
    yardstick = Side(title, lambda: baselines.forward_backward(q.model, x), len(x))
    target = 1.10 if name.startswith("ResNet") else None
    race(benchmark, side(q), yardstick, section=name, rounds=q.rounds, kind=AT_MOST, target=target)


@EVERY
def test_against_naive(benchmark: BenchmarkFixture, name: str) -> None:
    q = network(name)
    x, y = q.x[: q.naive], q.y[: q.naive]
    yardstick = Side(
        "naive autograd + numpy pinv",
        lambda: baselines.naive_influence(q.model, x, y),
        q.naive,
    )
    target = 8.0 if name.startswith("ResNet") else None
    race(benchmark, side(q), yardstick, section=name, rounds=q.rounds, kind=AT_LEAST, target=target)


@EVERY
def test_against_jacrev(benchmark: BenchmarkFixture, name: str) -> None:
    q = network(name)
    # Its best chunk: at fastfi's it leaves the caches and is up to 20 times slower still.
    yardstick = Side(
        f"vmap(jacrev) + torch.linalg, best batch ({q.jacrev})",
        lambda: baselines.jacrev_influence(q.model, q.x, q.y, q.jacrev),
        len(q.x),
    )
    target = 1.5 if name.startswith("ResNet") else None
    race(benchmark, side(q), yardstick, section=name, rounds=q.rounds, kind=AT_LEAST, target=target)
