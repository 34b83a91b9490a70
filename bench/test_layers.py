"""``fastfi.influence(wrt="layers")`` (the paper's Setup 2.2, all layers at once) against
:mod:`bench.layer_baselines` and :mod:`bench.layer_peers`."""

from __future__ import annotations

import importlib.util
import time
from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import layer_baselines as baselines
from bench.layer_peers import PEERS, prepare
from bench.layer_problems import PLANS, chunks_of, influence, layer_network
from bench.memory import AVAILABLE, in_fresh_process
from bench.race import AT_LEAST, AT_MOST, Side, memory, race, refused

EVERY = pytest.mark.parametrize("name", PLANS)
PEER_NETWORKS = tuple(name for name, plan in PLANS.items() if plan.peers is not None)
PASSES = "9 backward passes to the input, without the forward pass"

needs_proc = pytest.mark.skipif(not AVAILABLE, reason="needs Linux's /proc")


def section(name: str) -> str:
    """The network, with the number of its layers."""
    return f"layers, {name}, {len(baselines.layers_of(layer_network(name).model))} layers"


def side(name: str, rule: str = "exact", wrt: str = "layers") -> Side:
    """Every layer, for the network's batch."""
    q = layer_network(name)
    return Side(f'wrt="{wrt}", {rule}', lambda: influence(q, rule, wrt), len(q.x))


def passes(x: Tensor, name: str, label: str) -> Side:
    """The backward passes for x, whose forward pass is made here."""
    return Side(
        f"{PASSES}, {label}", baselines.BackwardPasses(layer_network(name).model, x), len(x)
    )


@EVERY
@pytest.mark.parametrize("rule", ["exact", "damped"])
def test_against_passes(benchmark: BenchmarkFixture, rule: str, name: str) -> None:
    q, plan = layer_network(name), PLANS[name]
    influence(q, rule)  # which measures the model
    chunk = max(chunks_of(q.model, lambda: influence(q, rule)))
    yardstick = passes(q.x[:chunk], name, f"same chunk ({chunk})")
    race(
        benchmark,
        side(name, rule),
        yardstick,
        section=section(name),
        rounds=plan.rounds,
        kind=AT_MOST,
        target=plan.over_passes,
    )


def best_batch(name: str) -> Tensor:
    """The batch at which the passes cost least per sample, each size tried twice in turn."""
    q, sizes = layer_network(name), PLANS[name].batches
    cost = dict.fromkeys(sizes, float("inf"))
    for _ in range(2):
        for size in sizes:
            run = baselines.BackwardPasses(q.model, q.x[:size])
            start = time.perf_counter()
            run()
            cost[size] = min(cost[size], (time.perf_counter() - start) / size)
    return q.x[: min(cost, key=lambda size: cost[size])]


@EVERY
def test_against_passes_at_their_best(benchmark: BenchmarkFixture, name: str) -> None:
    plan, x = PLANS[name], best_batch(name)
    race(
        benchmark,
        side(name),
        passes(x, name, f"best batch ({len(x)})"),
        section=section(name),
        rounds=plan.rounds,
        kind=AT_MOST,
        target=plan.over_passes,
    )


@EVERY
def test_against_naive(benchmark: BenchmarkFixture, name: str) -> None:
    q, plan = layer_network(name), PLANS[name]
    x, y = q.x[: plan.naive], q.y[: plan.naive]
    yardstick = Side(
        "naive autograd + SVD per layer",
        lambda: baselines.naive_layers(q.model, x, y),
        plan.naive,
    )
    race(
        benchmark,
        side(name),
        yardstick,
        section=section(name),
        rounds=min(plan.rounds, 2),
        kind=AT_LEAST,
        target=plan.over_naive,
    )


@EVERY
def test_against_jacrev(benchmark: BenchmarkFixture, name: str) -> None:
    q, plan = layer_network(name), PLANS[name]
    x, y = q.x[: plan.jacrev], q.y[: plan.jacrev]
    yardstick = Side(
        f"vmap(jacrev) + torch.linalg, best batch ({plan.jacrev})",
        lambda: baselines.jacrev_layers(q.model, x, y, plan.jacrev, "exact"),
        plan.jacrev,
    )
    race(
        benchmark,
        side(name),
        yardstick,
        section=section(name),
        rounds=min(plan.rounds, 3),
        kind=AT_LEAST,
    )


def require(method: str) -> None:
    """Skips where the library is not installed."""
    package = PEERS[method].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, see bench/layer_peers.py")


@cache
def refusal(method: str, name: str) -> str | None:
    """The first line of what the peer raises on two samples of this network, None if it works."""
    q = layer_network(name)
    try:
        prepare(PEERS[method], q.model)(q.x[:2])
    except Exception as error:  # whatever it is, it is the answer
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("name", PEER_NETWORKS)
def test_against_peers(benchmark: BenchmarkFixture, name: str, method: str) -> None:
    require(method)
    peer, q, size = PEERS[method], layer_network(name), PLANS[name].peers or 1
    reason = refusal(method, name)
    if reason is not None:
        refused(benchmark, work=method, section=section(name), reason=reason)
        return
    # Exact FI of all parameters together follows from the logits, where the head has a bias.
    rule, wrt = ("damped", "params") if peer.summed else ("exact", "layers")
    run = prepare(peer, q.model)
    x, y = q.x[:size], q.y[:size]
    yardstick = Side(
        f"{method} + torch.linalg, batch of {size}",
        lambda: baselines.solve(run(x), y, rule),
        size,
    )
    race(
        benchmark,
        side(name, rule, wrt),
        yardstick,
        section=section(name),
        rounds=2,
        kind=AT_LEAST,
    )


def measure(benchmark: BenchmarkFixture, method: str, name: str, rule: str = "exact") -> None:
    """Peak memory of a method; fastfi's should stay within the activations of its chunk."""
    memory(
        benchmark,
        lambda: in_fresh_process("bench.layer_memory", method, name, rule),
        work=f'wrt="layers", {rule}' if method == "fastfi" else f"{method}, {rule}",
        yardstick="activations x 11, chunk of {chunk}",
        section=section(name),
        target=1.0 if method == "fastfi" else None,
    )


@needs_proc
@EVERY
def test_memory(benchmark: BenchmarkFixture, name: str) -> None:
    measure(benchmark, "fastfi", name, "damped")


@needs_proc
@pytest.mark.parametrize("method", ["naive", "vmap(jacrev)"])
def test_memory_of_baselines(benchmark: BenchmarkFixture, method: str) -> None:
    measure(benchmark, method, "ResNet-18")


@needs_proc
@pytest.mark.parametrize("method", PEERS)
def test_memory_of_peers(benchmark: BenchmarkFixture, method: str) -> None:
    require(method)
    if refusal(method, "ResNet-18") is not None:
        pytest.skip("refused, as the races tell")
    measure(benchmark, method, "ResNet-18")
