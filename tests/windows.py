"""Windows of pixels one by one: the definition that maps are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import samplers
import torch
from oracle import Problem
from torch import Tensor

__all__ = ["Layout", "arguments", "every_window", "image", "random_arguments"]


@dataclass(frozen=True)
class Layout:
    """The windows of an image [colours, *spatial], at several scales.

    Attributes:
        channels: "separate", "joint" or "mean".
    """

    spatial: tuple[int, ...]
    colours: int
    scales: tuple[int, ...]
    channels: str

    @property
    def pixels(self) -> int:
        return int(np.prod(self.spatial))

    @property
    def groups(self) -> int:
        """Problems solved for each pixel and scale."""
        return 1 if self.channels == "joint" else self.colours

    def shape(self, batch: int, rank: bool = False) -> tuple[int, ...]:
        """Of the map, or of its ranks."""
        apart = self.channels == "separate" or (rank and self.channels == "mean")
        return (batch, len(self.scales), *([self.colours] if apart else []), *self.spatial)

    def at(self, pixel: Sequence[int], scale: int) -> np.ndarray:
        """Flat positions in [*spatial] of the window around a pixel: whatever is at most scale // 2
        away along every axis."""
        grid = np.array(list(np.ndindex(*self.spatial)))
        return np.flatnonzero(np.abs(grid - np.array(pixel)).max(1) <= scale // 2)

    def columns(self) -> list[tuple[int, ...]]:
        """Flat positions in [colours, *spatial] of every window, in the order [S, groups, P]."""
        out = []
        for scale in self.scales:
            around = [self.at(pixel, scale) for pixel in np.ndindex(*self.spatial)]
            for group in range(self.groups):
                which = range(self.colours) if self.channels == "joint" else [group]
                for at in around:
                    out.append(tuple(int(i) + c * self.pixels for c in which for i in at))
        return out


T = TypeVar("T")


def every_window(layout: Layout, q: Problem, solve: Callable[[Problem], T]) -> list[T]:
    """``solve`` of every window taken alone, in the order [S, groups, P]; q is the whole image."""
    known: dict[tuple[int, ...], T] = {}
    columns = layout.columns()
    for at in columns:
        if at not in known:
            raw = None if q.raw is None else q.raw[list(at)]
            known[at] = solve(replace(q, rows=q.rows[:, list(at)], raw=raw))
    return [known[at] for at in columns]


def image(
    rng: np.random.Generator, layout: Layout, classes: int, spread: float, objective: str
) -> Problem:
    """Contrasts of a few bits for every pixel, zero at the first pixel and its neighbours, in every
    channel; ``objective`` as in samplers.problem. An own row h is not zero there."""
    rows = rng.integers(-7, 8, (classes - 1, layout.colours, layout.pixels))
    rows[:, :, layout.at([0] * len(layout.spatial), 3)] = 0
    rows = rows.reshape(classes - 1, -1)
    log_prob = samplers.log_probabilities(rng, classes, spread)
    if objective in samplers.LABELS:
        return Problem(rows, log_prob, label=samplers.label_of(objective, classes))
    if objective == "raw":
        return Problem(rows, log_prob, raw=rng.integers(-7, 8, rows.shape[1]))
    grad = samplers.zero_sum_gradient(rng, objective, log_prob)
    return Problem(rows, log_prob, grad=grad)


def arguments(
    problems: Sequence[Problem], layout: Layout, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """rows, log_prob, label, grad for the op: one batch of images."""
    batch = []
    for q in problems:
        rows = q.rows if q.raw is None else np.vstack([q.rows, q.raw[None]])
        scaled = np.ldexp(rows.astype(np.float64), q.shift)
        batch.append(scaled.reshape(-1, layout.colours, *layout.spatial))
    rows = torch.from_numpy(np.stack(batch))
    assert torch.equal(rows.to(dtype).double(), rows)  # exact in this dtype
    _, log_prob, label, grad = samplers.arguments(problems)
    return rows.to(dtype), log_prob, label, grad


def random_arguments(
    seed: int,
    layout: Layout,
    classes: int,
    mode: str,
    rule: str,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    with_rank: bool = True,
) -> tuple[Any, ...]:
    """All arguments of the op, with rows of integers, in one of the three forms of its objective:
    "label", "grad" or "raw"."""
    g = torch.Generator().manual_seed(seed)
    n = classes if mode == "raw" else classes - 1
    rows = torch.randint(-3, 4, (batch, n, layout.colours, *layout.spatial), generator=g)
    logits = 2 * torch.randn(batch, classes, dtype=torch.float64, generator=g)
    label = grad = tau = None
    if mode == "label":
        label = torch.randint(0, classes, (batch,), generator=g)
    elif mode == "grad":
        grad = torch.randint(-5, 6, (batch, classes), generator=g).double()
        grad[:, 0] -= grad.sum(1)
    if rule == "damped":
        tau = 0.1 + torch.rand(batch, dtype=torch.float64, generator=g)
    log_prob = logits.sort(1, descending=True).values.log_softmax(1)
    parameter = {"exact": 1e-9, "truncated": 1e-3, "damped": 0.0}[rule]
    return (rows.to(dtype), log_prob, label, grad, layout.scales, layout.channels, rule, parameter,
            tau, with_rank)  # fmt: skip
