"""The networks, inputs and small problems that the benchmarks and the agreement checks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.models import resnet18, resnet18_small, resnet50, resnet50_small
from examples.models import SmallCNN

__all__ = ["EVERY_NETWORK", "NETWORKS", "Network", "Problems", "network", "problems"]

CLASSES = 10


class Network(NamedTuple):
    """A classifier in eval mode and a batch for it.

    Attributes:
        model: random weights; the head is scaled so that the logits' standard deviation is 1, the
            one spread at which every method, float32 pseudo-inverses included, finds the same FI.
        x: [B, C, H, W] float32.
        y: [B] int64.
        naive: how many samples the naive yardstick gets.
        jacrev: how many samples vmap(jacrev) gets at once: what suits it best, measured.
        rounds: how often a long measurement is repeated.
        batches: the batch sizes among which a yardstick may look for its best.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    naive: int
    jacrev: int
    rounds: int
    batches: tuple[int, ...]


class _Plan(NamedTuple):
    factory: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    naive: int
    jacrev: int
    rounds: int
    batches: tuple[int, ...]


_PLANS = {
    "SmallCNN": _Plan(SmallCNN, (1, 28, 28), 256, 16, 32, 15, (64, 128, 256, 512)),
    "ResNet-18": _Plan(resnet18, (3, 32, 32), 128, 4, 8, 5, (32, 64, 128)),
    "ResNet-50": _Plan(resnet50, (3, 32, 32), 128, 3, 16, 5, (32, 64, 128)),
    "ResNet-18, small stem": _Plan(resnet18_small, (3, 32, 32), 32, 3, 4, 5, (8, 16, 32)),
    "ResNet-50, small stem": _Plan(resnet50_small, (3, 32, 32), 8, 1, 1, 3, (2, 4, 8)),
}
EVERY_NETWORK = tuple(_PLANS)
NETWORKS = EVERY_NETWORK[:4]  # of the input's influence


@cache
def network(name: str) -> Network:
    """The network of that name with its batch, the same numbers in every process."""
    plan = _PLANS[name]
    torch.manual_seed(0)
    model = plan.factory().eval()
    x = torch.rand(max(plan.batches), *plan.shape)
    y = torch.randint(CLASSES, (len(x),))
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.div_(model(x[:8]).std(1).mean())
    batch = plan.batch
    return Network(model, x[:batch], y[:batch], plan.naive, plan.jacrev, plan.rounds, plan.batches)


class Problems(NamedTuple):
    """Small solve problems in the operators' class order (class 0 is the most probable).

    Attributes:
        rows: [B, K-1, p] float64.
        gram: [B, K-1, K-1] float64, rows rows^T.
        log_prob: [B, K] float64, descending.
        label: [B] int64.
        tau: [B] float64, 1e-2 times the trace of the metric.
    """

    rows: Tensor
    gram: Tensor
    log_prob: Tensor
    label: Tensor
    tau: Tensor


@cache
def problems(batch: int, n: int, p: int, spread: float = 3.0) -> Problems:
    """Random problems with n contrasts of p numbers and logits of standard deviation ``spread``."""
    make = torch.Generator().manual_seed(n * p)
    rows = torch.randn(batch, n, p, generator=make, dtype=torch.float64)
    z = spread * torch.randn(batch, n + 1, generator=make, dtype=torch.float64)
    log_prob = torch.log_softmax(z, 1).sort(1, descending=True).values
    label = torch.randint(n + 1, (batch,), generator=make)
    dz = torch.cat([rows.new_zeros(batch, 1, p), rows], 1)  # [B, K, p]
    prob = log_prob.exp()
    dl = dz - (prob[:, :, None] * dz).sum(1, keepdim=True)
    tau = 1e-2 * (prob * dl.square().sum(2)).sum(1)
    return Problems(rows, rows @ rows.mT, log_prob, label, tau)
