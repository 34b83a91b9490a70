"""Rows and probabilities from which the benchmarks of influence maps start.

Networks with random weights spread their probability evenly, which flatters rules that work more
on graded ones; so each network comes twice, as it is and confident, its head scaled up.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.models import resnet18
from bench.workloads import network
from fastfi.inverse import Damped, Truncated, default_rtol, metric_trace
from fastfi.rows import InputRows, pull_back_rows, record

__all__ = ["PROBLEMS", "RULES", "SCALES", "MapProblem", "map_network", "network_problem"]
__all__ += ["noise_problem", "rows_of", "solve_maps"]

RULES = ("exact", "truncated", "damped")
SCALES = (1, 3, 5, 7)
_CONFIDENT = 6.0  # standard deviation of a confident network's logits
_CONFIDENT_1000 = 7.5  # the same for 1,000 classes
_LUMP = 1e-3


class MapProblem(NamedTuple):
    """The arguments of ``window_influence``, classes in the operators' order.

    Attributes:
        rows: [B, K-1, C, H, W] float32, the contrasts' gradients.
        log_prob: [B, K] float64, descending.
        label: [B] int64, a position in that order.
        tau: [B] float64, the damping.
        rtol: relative length under which rows count as dependent.
    """

    rows: Tensor
    log_prob: Tensor
    label: Tensor
    tau: Tensor
    rtol: float

    @property
    def windows(self) -> int:
        """How many windows the maps of all samples, channels and scales have."""
        return len(SCALES) * self.rows[:, 0].numel()

    def first(self, samples: int = 1) -> MapProblem:
        """Its first samples."""
        return MapProblem(*(t[:samples] for t in self[:4]), self.rtol)

    def lines(self, count: int) -> MapProblem:
        """The uppermost lines of its images, as images of their own."""
        return self._replace(rows=self.rows[..., :count, :].contiguous())


def _problem(rows: Tensor, log_prob: Tensor, label: Tensor, rtol: float) -> MapProblem:
    gram = torch.ops.fastfi.gram(rows.flatten(2))
    return MapProblem(rows, log_prob, label, Damped().alpha * metric_trace(gram, log_prob), rtol)


def solve_maps(q: MapProblem, rule: str, function: Callable | None = None) -> Tensor:
    """The maps of one rule, [B, S, C, H, W] float64.

    Args:
        function: another implementation of the operator, with its arguments.
    """
    function = function or torch.ops.fastfi.window_influence
    parameter = {"exact": q.rtol, "truncated": Truncated().eps, "damped": 0.0}[rule]
    tau = q.tau if rule == "damped" else None
    arguments = (q.rows, q.log_prob, q.label, None, SCALES, "separate", rule, parameter, tau, False)
    return function(*arguments)[0]


def _sharpen(model: nn.Module, x: Tensor, spread: float) -> None:
    """Scales the head so that the logits have this standard deviation."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        factor = spread / model(x).std(1).mean()
        head.weight.mul_(factor)
        head.bias.mul_(factor)


@cache
def map_network(name: str, confident: bool, batch: int) -> tuple[nn.Module, Tensor]:
    """The network of :mod:`bench.workloads` of that name and the first images of its batch."""
    q = network(name)
    model = q.model
    if confident:
        model = deepcopy(model)
        _sharpen(model, q.x[:8], _CONFIDENT)
    return model, q.x[:batch]


def rows_of(model: nn.Module, x: Tensor, lump: float | None = None) -> InputRows:
    """The rows for x's predicted classes, as ``influence_map`` computes them for one chunk."""
    recorded = record(model, x, "logits")
    return pull_back_rows(recorded, None, objective="cross_entropy", lump=lump)


def _from_rows(data: InputRows, x: Tensor) -> MapProblem:
    assert data.label is not None
    rows = data.rows.unflatten(2, x.shape[1:])
    return _problem(rows, data.classes.log_prob, data.label, data.rtol)


@cache
def network_problem(name: str, confident: bool, batch: int = 1) -> MapProblem:
    """A network's rows on its batch."""
    model, x = map_network(name, confident, batch)
    return _from_rows(rows_of(model, x), x)


@cache
def lumped_problem() -> MapProblem:
    """ResNet-18 with 1,000 classes on one 32 x 32 image, where some 30 classes hold all but 0.1 %
    of the mass: those are kept, the others merged into one."""
    torch.manual_seed(0)
    model = resnet18(1000).eval()
    x = torch.rand(1, 3, 32, 32)
    _sharpen(model, x, _CONFIDENT_1000)
    return _from_rows(rows_of(model, x, _LUMP), x)


@cache
def noise_problem(size: int = 224, classes: int = 10) -> MapProblem:
    """Random rows of one colour image: noise of several grain sizes, from one pixel to 16, and
    logits of standard deviation 2; the label is the second class."""
    make = torch.Generator().manual_seed(size)
    shape = (classes - 1, 3, size, size)
    rows = 0.01 * torch.randn(shape, generator=make)
    for grain in (4, 16):
        coarse = torch.randn(*shape[:2], size // grain, size // grain, generator=make)
        rows += 0.01 * nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    z = 2.0 * torch.randn(1, classes, generator=make, dtype=torch.float64)
    log_prob = z.log_softmax(1).sort(1, descending=True).values
    rtol = default_rtol(torch.finfo(rows.dtype).eps, classes)
    return _problem(rows[None], log_prob, torch.ones(1, dtype=torch.int64), rtol)


# One sample each.
PROBLEMS: dict[str, Callable[[], MapProblem]] = {
    "28 x 28 x 1, SmallCNN": lambda: network_problem("SmallCNN", False),
    "28 x 28 x 1, SmallCNN, confident": lambda: network_problem("SmallCNN", True),
    "32 x 32 x 3, ResNet-18": lambda: network_problem("ResNet-18", False),
    "32 x 32 x 3, ResNet-18, confident": lambda: network_problem("ResNet-18", True),
    "32 x 32 x 3, 1,000 classes lumped": lumped_problem,
    "224 x 224 x 3, noise": noise_problem,
}
