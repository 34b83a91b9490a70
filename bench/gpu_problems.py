"""Random inputs of every operator: small ones to check it, large ones to time it.

Everything is drawn from one generator on the CPU for checks, and on the device for timing. B
samples, K classes, R = K - 1 contrasts, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastfi.inverse import metric_trace

__all__ = ["ConvShape", "Solve", "convolutions", "layer_inputs", "many_problems", "norms_of"]
__all__ += ["perturbed", "solve_problem", "window_rows"]


class Solve(NamedTuple):
    """Arguments of the three solves.

    Attributes:
        gram: [B, n, n] float64.
        log_prob: [B, K] float64, descending.
        label: [B] int64, or None.
        grad: [B, K] float64 with zero sum, or None.
        tau: [B] float64.
    """

    gram: Tensor
    log_prob: Tensor
    label: Tensor | None
    grad: Tensor | None
    tau: Tensor


def _objective(
    form: str, batch: int, classes: int, g: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    if form == "label":
        return torch.randint(classes, (batch,), generator=g), None
    if form == "grad":
        grad = torch.randint(-9, 10, (batch, classes), generator=g).double()
        grad[:, 0] -= grad.sum(1)
        return None, grad
    return None, None


def _log_prob(batch: int, classes: int, spread: float, g: torch.Generator) -> Tensor:
    z = spread * torch.randn(batch, classes, generator=g, dtype=torch.float64, device=g.device)
    return z.log_softmax(1).sort(1, descending=True).values


def solve_problem(
    batch: int, classes: int, width: int, form: str, spread: float, g: torch.Generator
) -> Solve:
    """Contrasts of ``width`` small integers, so that their Gram matrix is exact.

    Args:
        form: of the objective: "label", "grad", or "raw", where h is one more row.
        spread: standard deviation of the logits.
    """
    n = classes if form == "raw" else classes - 1
    rows = torch.randint(-9, 10, (batch, n, width), generator=g).double()
    gram = rows @ rows.mT
    log_prob = _log_prob(batch, classes, spread, g)
    tau = 1e-2 * metric_trace(gram[:, : classes - 1, : classes - 1], log_prob)
    return Solve(gram, log_prob, *_objective(form, batch, classes, g), tau)


def perturbed(t: Tensor, g: torch.Generator, symmetric: bool) -> Tensor:
    """Every number off by as much as float64 rounds at: what no result can be asked to resolve."""
    noise = torch.randn(t.shape, generator=g, dtype=torch.float64).clamp(-2, 2)
    if symmetric:
        noise = noise.triu() + noise.triu(1).mT
    return t * (1.0 + 2.0**-52 * noise)


def many_problems(count: int, classes: int, width: int, device: str, seed: int) -> Solve:
    """Problems for timing: real-valued rows, logits of standard deviation 3, made on the device a
    part at a time."""
    g = torch.Generator(device).manual_seed(seed)
    n = classes - 1
    gram = torch.empty(count, n, n, dtype=torch.float64, device=device)
    for part in gram.split(50_000):  # some libraries take 65,535 products at once
        shape = (len(part), n, width)
        rows = torch.randn(shape, generator=g, dtype=torch.float64, device=device)
        torch.bmm(rows, rows.mT, out=part)
    log_prob = _log_prob(count, classes, 3.0, g)
    label = torch.randint(classes, (count,), generator=g, device=device)
    tau = torch.cat([
        1e-2 * metric_trace(part, log_p)
        for part, log_p in zip(gram.split(50_000), log_prob.split(50_000), strict=True)
    ])  # fmt: skip
    return Solve(gram, log_prob, label, None, tau)


def window_rows(
    shape: Sequence[int], classes: int, form: str, dtype: torch.dtype, g: torch.Generator
) -> tuple[Tensor, Solve]:
    """rows [B, n, C, *spatial], and of a :class:`Solve` all but the Gram matrix, which is that of
    the whole image."""
    batch, n = shape[0], classes if form == "raw" else classes - 1
    size = (batch, n, *shape[1:])
    rows = torch.randn(size, generator=g, device=g.device).to(dtype)
    gram = torch.ops.fastfi.gram(rows.flatten(2))
    log_prob = _log_prob(batch, classes, 2.0, g)
    tau = 1e-2 * metric_trace(gram[:, : classes - 1, : classes - 1], log_prob)
    label, grad = _objective(form, batch, classes, g) if g.device.type == "cpu" else (None, None)
    if g.device.type != "cpu":
        label = torch.randint(classes, (batch,), generator=g, device=g.device)
    return rows, Solve(gram, log_prob, label, grad, tau)


class ConvShape(NamedTuple):
    """A convolution of a network.

    Attributes:
        channels, outputs: of the input and of the output.
        spatial: of the input.
        kernel, stride, padding, dilation, groups: as ``conv_gram`` takes them.
        positions: of the output.
    """

    channels: int
    outputs: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    positions: tuple[int, ...]

    @property
    def form(self) -> tuple[object, ...]:
        """The geometry, in the operator's order."""
        return (self.kernel, self.stride, self.padding, self.dilation, self.groups)

    def title(self) -> str:
        sizes = "x".join(map(str, self.spatial))
        kernel = "x".join(map(str, self.kernel))
        stride = f"/{self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{self.channels}>{self.outputs} at {sizes}, {kernel}{stride}"


def _seen(model: nn.Module, kind: type[nn.Module], size: int) -> list[tuple[nn.Module, Tensor]]:
    """Modules of a kind and their outputs and inputs' sizes, for one image."""
    found: list[tuple[nn.Module, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda m, args, out: found.append((m, (args[0].shape, out.shape))))
        for m in model.modules()
        if isinstance(m, kind)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return found


def convolutions(model: nn.Module, size: int = 32) -> dict[ConvShape, int]:
    """The convolutions of a network on images [3, size, size], and how often each occurs."""
    counts: dict[ConvShape, int] = {}
    for m, (before, after) in _seen(model.eval(), nn.Conv2d, size):
        shape = ConvShape(m.in_channels, m.out_channels, tuple(before[2:]), m.kernel_size,
                          m.stride, m.padding, m.dilation, m.groups, tuple(after[2:]))  # fmt: skip
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def norms_of(model: nn.Module, size: int = 32) -> list[tuple[int, int]]:
    """(channels, positions) of each BatchNorm of a network on such images."""
    seen = _seen(model.eval(), nn.BatchNorm2d, size)
    return [(after[1], after[2:].numel()) for _, (_, after) in seen]


def layer_inputs(
    shape: ConvShape, batch: int, n: int, dtype: torch.dtype, g: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """x [B, C, *spatial] and n cotangents [B, O, *positions], on the generator's device."""
    x = torch.randn(batch, shape.channels, *shape.spatial, generator=g, device=g.device)
    size = (batch, shape.outputs, *shape.positions)
    d = [torch.randn(size, generator=g, device=g.device).to(dtype) for _ in range(n)]
    return x.to(dtype), d
