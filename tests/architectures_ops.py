"""Parameters in operations other than a module's call: see ``architectures``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from architectures_vision import head
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BUILDERS"]


class Gated(nn.Module):
    """A layer whose output is cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(6, 8), nn.Linear(4, 4), head(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, -1)
        return self.head(torch.sigmoid(self.gate(left)) * right)


class BatchedExperts(nn.Module):
    """Matrices side by side in one parameter: samples stand in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(4, 3, 3)),
            nn.Parameter(torch.randn(4, 1, 3)),
        )
        self.head = head(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 3).repeat(1, 2, 1).transpose(0, 1)  # [4, B, 3], as many as samples
        x = torch.tanh(torch.baddbmm(self.bias, x, self.weight))
        return self.head(x.transpose(0, 1).flatten(1))


class InPlace(nn.Module):
    """Slices assigned, sums and products in place, and ``addmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(6)), head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :3] = (x * self.scale)[:, :3]
        out[:, 3:] += self.scale[3:] * 2.0
        out.mul_(x).addcmul_(x, self.scale)
        return torch.addmm(self.head.bias, out, self.head.weight.t())


class PartlyWithoutGradient(nn.Module):
    """A layer called twice, once under ``no_grad`` (a stopped gradient, as in target networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            still = self.first(x)
        return self.head(torch.tanh(still) + self.first(x))


class GradientInside(nn.Module):
    """Logits of a gradient: an energy's force, a score."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Linear(6, 6), head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            total = torch.tanh(self.energy(at)).sum()
            (force,) = torch.autograd.grad(total, at, create_graph=True)
        return self.head(force)


class Functions(nn.Module):
    """Norms, activations and convolutions as functions of the model's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3) / 2)
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.slope = nn.Parameter(torch.rand(4))
        self.rows = nn.Parameter(torch.randn(7, 4) / 2)
        self.head = head(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv1d(x.view(-1, 2, 3), self.kernel, self.shift, padding=1)
        out = F.group_norm(out, 2, self.gain, self.shift)
        out = F.prelu(out, self.slope)
        out = F.layer_norm(out.mT, (4,), self.gain)
        picked = F.embedding((x[:, 0] > 0).long(), self.rows)
        return self.head(torch.cat([out.amax(1), picked * self.rows[3:5].norm()], 1))


def vectors(model: type[nn.Module]) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (model(), torch.randn(4, 6))


BUILDERS = {
    "gated": vectors(Gated),
    "batched_experts": vectors(BatchedExperts),
    "in_place": vectors(InPlace),
    "partly_without_gradient": vectors(PartlyWithoutGradient),
    "gradient_inside": vectors(GradientInside),
    "functions": vectors(Functions),
}
