"""Small networks, and dense gradients and Hessians of objectives in x, in float64."""

from __future__ import annotations

from typing import Any

import architectures
import torch
from networks import mlp
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax, scaled_dot_product_attention, softplus

__all__ = ["B", "K", "build", "check", "cross_entropy", "curvature", "dense", "eigenvalues"]

B, K = 7, 5


class Attentive(nn.Module):
    """[B, 4, 6] to [B, K]: softplus, layer norm, and attention by torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 12), nn.Linear(24, K)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.norm(t) for t in softplus(self.inner(x)).chunk(3, -1))
        a = scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return 3 * self.head(torch.cat([a[:, 0], v], -1).mean(1).repeat(1, 3))


def relu_cnn() -> nn.Module:
    """1 x 6 x 6 to K: piecewise linear."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, K))
    architectures.randomise(net)
    with torch.no_grad():
        net[-1].weight.mul_(4)
    return net.double().eval()


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 network with samples and labels, new ones for each name."""
    if name == "tanh":
        model, shape = mlp(12, K, 0), (12,)
    elif name == "relu":
        model, shape = relu_cnn(), (1, 6, 6)
    else:
        torch.manual_seed(2)
        model, shape = Attentive().double().eval(), (4, 6)
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
    return model, x, torch.arange(B) % K


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return -log_softmax(z, 0)[y]


def dense(model: Any, x: Tensor, y: Tensor, f: Any = cross_entropy) -> tuple[Tensor, Tensor]:
    """g [B, p] and H [B, p, p] of f(z [K], y), with derivatives of torch.func."""

    def value(flat: Tensor, label: Tensor) -> Tensor:
        return f(model(flat.reshape(1, *x.shape[1:]))[0], label)

    with sdpa_kernel(SDPBackend.MATH):
        g = [jacrev(value)(a, c) for a, c in zip(x.flatten(1), y, strict=True)]
        h = [jacrev(jacrev(value))(a, c) for a, c in zip(x.flatten(1), y, strict=True)]
    return torch.stack(g).detach(), torch.stack(h).detach()


def curvature(g: Tensor, h: Tensor, v: Tensor) -> Tensor:
    """Equation 5 as it stands, [B] or [n, B], for directions v [..., B, p]."""
    bend = torch.einsum("...bp,bpq,...bq->...b", v, h, v).abs()
    length = v.square().sum(-1) + torch.einsum("...bp,bp->...b", v, g).square()
    return bend / length / (1 + g.square().sum(1)).sqrt()


def eigenvalues(g: Tensor, h: Tensor) -> Tensor:
    """Of the pencil (H, I + g g^T), over sqrt(1 + g.g): [B, p]."""
    m = torch.eye(g.shape[1], dtype=g.dtype) + g[:, :, None] * g[:, None]
    root = torch.linalg.inv(torch.linalg.cholesky(m))
    return torch.linalg.eigvalsh(root @ h @ root.mT) / (1 + g.square().sum(1, keepdim=True)).sqrt()


def check(got: Tensor, want: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12 * float(want.abs().max()))
