"""Shared, frozen, parametrised and bare parameters, and other habits: see ``architectures``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from architectures_vision import Flow, head
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

__all__ = ["BUILDERS"]


def seq(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    """Layers on a batch of four vectors of six numbers."""
    return nn.Sequential(*layers), torch.randn(4, 6)


class Reused(nn.Module):
    """One Linear three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.alias = self.linear
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(2.0 * self.linear(x))
        return self.head(torch.tanh(self.alias(x)) + self.linear(x.flip(1)))


class TiedLanguageModel(nn.Module):
    """The decoder's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.hidden = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 8)
        self.decoder.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embed(x).mean(1))))


class TiedAutoencoder(nn.Module):
    """F.linear(h, W^T): the encoder's weight once more, transposed, in the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.shift = nn.Parameter(torch.randn(6))
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(x))
        return self.head(F.linear(code, self.encoder.weight.t(), self.shift))


def frozen() -> tuple[nn.Module, Tensor]:
    """A frozen layer, a layer with a frozen bias, and one with a frozen weight."""
    net, x = seq(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), head(8, 5))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    net[3].weight.requires_grad_(False)
    return net, x


class Functional(nn.Module):
    """The parent uses its child's parameters; the child is never called. A slice of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.wide = nn.Linear(6, 7), nn.Linear(7, 12)
        self.head = head(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.child.weight, self.child.bias))
        return self.head(torch.tanh(F.linear(x, self.wide.weight[:5], self.wide.bias[:5])))


class CalledAndFunctional(nn.Module):
    """A layer that is called, and whose weight the parent uses as well (a penalty, a gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.first.weight.sum(1))
        return self.head(torch.tanh(self.first(x)) * gate + x @ self.first.weight)


class Double(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, w: Tensor) -> Tensor:
        return self.scale * w.tanh()


def parametrised() -> tuple[nn.Module, Tensor]:
    net, x = seq(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), head(8, 5)
    )
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[2])
    parametrize.register_parametrization(net[4], "weight", Double())
    return net, x


class Scales(nn.Module):
    """Bare parameters: a residual's scale, a matmul, an einsum, a temperature, a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.matrix = nn.Parameter(torch.randn(6, 6) / 2)
        self.cube = nn.Parameter(torch.randn(6, 2, 3) / 2)
        self.shifts = nn.ParameterList([torch.randn(6), torch.randn(1)])
        self.temperature = nn.Parameter(torch.tensor(0.1))
        self.head = head(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * torch.tanh(self.first(x))
        x = torch.tanh(x @ self.matrix + self.shifts[0])
        x = torch.einsum("bi,ijk->bjk", x, self.cube).flatten(1) + self.shifts[1]
        return self.head(x) * self.temperature.exp()


class Scaled(torch.autograd.Function):
    """y = (x W^T)^2 with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out = x @ weight.T
        ctx.save_for_backward(x, weight, out)
        return out.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, out = ctx.saved_tensors
        grad = 2.0 * grad * out
        return grad @ weight, grad.T @ x


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(Scaled.apply(x, self.weight)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 6)
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bilinear(x[:, :3], x[:, 3:])))


def norms() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.GroupNorm(3, 6),
        nn.PReLU(6),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(),
        nn.LayerNorm((5, 4)),
        nn.Conv2d(4, 6, 1),
        nn.RMSNorm(4),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.LocalResponseNorm(2),
        nn.LayerNorm((6, 5, 4), bias=False),
    ]
    return Flow(*layers, width=6, classes=5), torch.randn(3, 2, 5, 4)


class Sides(nn.Module):
    """``side`` reaches the output through detach(), is computed and dropped, or is not called."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        name = {"detached": "side", "dropped": "auxiliary", "unused": "spare"}[how]
        self.first = nn.Linear(6, 6)
        self.add_module(name, nn.Linear(6, 6))
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.how == "dropped":
            self.auxiliary(x)
        return self.head(x + self.side(x).detach() if self.how == "detached" else x)


class Output(nn.Module):
    """Heads of other forms: log-probabilities, one logit, an object."""

    def __init__(self, form: str, classes: int) -> None:
        super().__init__()
        self.form, self.first, self.head = form, nn.Linear(6, 7), head(7, classes)

    def forward(self, x: Tensor) -> Any:
        z = self.head(torch.tanh(self.first(x)))
        if self.form == "object":
            return SimpleNamespace(logits=z, loss=None)
        return z.log_softmax(1) if self.form == "log_softmax" else z.squeeze(1)


class Table(nn.Module):
    """Weights made from a table by a Linear (a hypernetwork): its rows are not samples, and there
    are as many of them as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3))
        self.maker = nn.Linear(3, 6)
        self.head = head(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(2.0 * torch.tanh(x @ self.maker(self.table).T))


class Rows(nn.Module):
    """Rows that are not samples in order: reversed, two for each sample, or some of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "reversed":
            x = torch.tanh(self.first(x.flip(0)))
            return self.head(self.norm(torch.tanh(self.second(x)).flip(0)))
        if self.how == "siamese":
            both = torch.cat([x, x.flip(1)], 0)
            left, right = self.norm(torch.tanh(self.first(both))).chunk(2, 0)
            return self.head(self.second(left) * right)
        chosen = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = self.first(x[chosen])
        out[~chosen] = self.second(x[~chosen])
        return self.head(torch.tanh(self.norm(out)))


def experts() -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 6)
    x[:, 0] = torch.tensor([0.5, -0.5, 1.0, 0.7])
    return Rows("experts"), x


class Checkpointed(nn.Module):
    """Activations computed again in each backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6))
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.block, x, use_reentrant=False)))


def vectors(model: type[nn.Module], *args: object) -> Any:
    return lambda: (model(*args), torch.randn(4, 6))


BUILDERS = {
    "reused": vectors(Reused),
    "tied_embedding": lambda: (TiedLanguageModel(), torch.randint(0, 8, (4, 5))),
    "tied_autoencoder": vectors(TiedAutoencoder),
    "frozen": frozen,
    "functional": vectors(Functional),
    "called_and_functional": vectors(CalledAndFunctional),
    "parametrised": parametrised,
    "bare_parameters": vectors(Scales),
    "custom_function": vectors(CustomFunction),
    "bilinear": vectors(TwoInputs),
    "norms": norms,
    "detached": vectors(Sides, "detached"),
    "uncalled_branch": vectors(Sides, "dropped"),
    "unused_layer": vectors(Sides, "unused"),
    "log_softmax": vectors(Output, "log_softmax", 5),
    "single_logit": vectors(Output, "single", 1),
    "object_with_logits": vectors(Output, "object", 5),
    "hypernetwork": vectors(Table),
    "reversed_rows": vectors(Rows, "reversed"),
    "siamese": vectors(Rows, "siamese"),
    "experts": experts,
    "checkpointed": vectors(Checkpointed),
}
