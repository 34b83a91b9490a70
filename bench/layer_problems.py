"""How much of each network the layer benchmarks take, and the call that they measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastfi
from bench.workloads import EVERY_NETWORK, Network, network

__all__ = ["PLANS", "LayerPlan", "chunks_of", "influence", "layer_network"]


class LayerPlan(NamedTuple):
    """What suits a network.

    Attributes:
        batch: samples that fastfi gets.
        rounds: how often a measurement is repeated.
        batches: the batch sizes among which the backward passes may look for their best.
        naive: samples that the naive way gets.
        jacrev: samples that vmap(jacrev) takes at once, what suits it best.
        peers: the same for other libraries; None: they are left out.
        over_passes: the target over the K-1 backward passes, None without one.
        over_naive: the target over the naive way, None without one.
    """

    batch: int
    rounds: int
    batches: tuple[int, ...]
    naive: int = 1
    jacrev: int = 1
    peers: int | None = None
    over_passes: float | None = None
    over_naive: float | None = None


# Inputs of 32 x 32 keep 16 times the positions behind the stem for small images: the arithmetic of
# products grows with them, and the naive way's SVDs, which cost the same, matter less.
PLANS = {
    "SmallCNN": LayerPlan(256, 9, (64, 128, 256), 4, 32, 32),
    "ResNet-18": LayerPlan(64, 5, (16, 32, 64), 1, 1, 1, 1.5, 50.0),
    "ResNet-50": LayerPlan(32, 3, (8, 16, 32), 1, 1, 1, 1.5, 50.0),
    "ResNet-18, small stem": LayerPlan(8, 3, (2, 4, 8), over_passes=2.3),
    "ResNet-50, small stem": LayerPlan(4, 3, (1, 2, 4), over_passes=2.3),
}
assert tuple(PLANS) == EVERY_NETWORK


@cache
def layer_network(name: str, batch: int | None = None) -> Network:
    """The network of that name with the plan's batch, or with another."""
    q = network(name)
    size = PLANS[name].batch if batch is None else batch
    repeats = -(-size // len(q.x))
    x, y = q.x.repeat(repeats, 1, 1, 1)[:size], q.y.repeat(repeats)[:size]
    return q._replace(x=x, y=y)


def influence(
    q: Network, inverse: str, wrt: str = "layers", dtype: torch.dtype | None = None
) -> Tensor:
    """FI [B, L], one column for each module that owns trainable parameters; [B] for "params"."""
    return fastfi.influence(q.model, q.x, q.y, wrt=wrt, inverse=inverse, dtype=dtype)


def chunks_of(model: nn.Module, call: Callable[[], object]) -> list[int]:
    """The batch sizes with which ``call`` runs the model forward."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        call()
    finally:
        handle.remove()
    return sizes
