"""Time and peak memory of one way to compute layer influence, in a process of its own; prints one
line of JSON.

    python -m bench.layer_memory fastfi "ResNet-18" damped
    python -m bench.layer_memory "vmap(jacrev)" "ResNet-18" exact

The code is run once on one or two samples, so that libraries loaded late and what a method keeps
about a model are not counted: the peak is what the resident set grows above that level, results
included. The yardstick is what a forward pass and K-1 backward passes may reasonably hold: the
activations that autograd saves for one chunk, R + 2 times, R = K-1 rows. Linux only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import layer_baselines as baselines
from bench.layer_peers import PEERS, prepare
from bench.layer_problems import PLANS, chunks_of, influence, layer_network
from bench.memory import peak_growth
from bench.workloads import CLASSES, Network
from fastfi.memory import ActivationMeter

__all__ = ["METHODS", "activations", "main"]

METHODS = ("fastfi", "naive", "vmap(jacrev)", *PEERS)
FACTOR = CLASSES - 1 + 2  # R + 2


class Work(NamedTuple):
    """What one method does.

    Attributes:
        call: with the samples x, y.
        chunk: samples that it takes at once; None: fastfi decides.
        samples: to measure it with.
    """

    call: Callable[[Tensor, Tensor], object]
    chunk: int | None
    samples: int


def _work(method: str, name: str, rule: str, q: Network) -> Work:
    plan = PLANS[name]
    model = q.model
    if method == "fastfi":
        return Work(lambda x, y: influence(q._replace(x=x, y=y), rule), None, len(q.x))
    if method == "naive":
        return Work(lambda x, y: baselines.naive_layers(model, x, y, rule), 1, 1)
    if method == "vmap(jacrev)":
        chunk = plan.jacrev
        call = baselines.jacrev_layers
        return Work(lambda x, y: call(model, x, y, chunk, rule), chunk, chunk)
    run = prepare(PEERS[method], model)
    chunk = plan.peers or 1
    return Work(lambda x, y: baselines.solve(run(x), y, rule), chunk, chunk)


def activations(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves in a forward pass with parameters that require gradients: each
    storage once, parameters not."""
    with ActivationMeter() as meter:
        model(x)
    return meter.total


def main() -> None:
    """Measures fastfi on twice the plan's batch, the others on what they take at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("network", choices=tuple(PLANS))
    parser.add_argument("rule", choices=("exact", "truncated", "damped"))
    options = parser.parse_args()
    name = options.network
    q = layer_network(name, 2 * PLANS[name].batch)
    work = _work(options.method, name, options.rule, q)
    x, y = q.x[: work.samples].clone(), q.y[: work.samples]
    warm = min(2, len(x))
    work.call(x[:warm], y[:warm])
    sizes: list[int] = []
    start = time.perf_counter()
    peak, reset = peak_growth(lambda: sizes.extend(chunks_of(q.model, lambda: work.call(x, y))))
    seconds = time.perf_counter() - start
    chunk = work.chunk or max(sizes)
    line = {
        "peak_bytes": peak,
        "yardstick_bytes": FACTOR * activations(q.model, x[:chunk]),
        "reset": reset,
        "seconds": seconds / len(x),
        "samples": len(x),
        "chunk": chunk,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
