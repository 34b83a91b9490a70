"""Small networks, and the measure computed from their full Jacobian, for tests of the theory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SigmoidNetwork", "jacobian", "metric", "mlp", "rank_condition", "small_cnn"]


def mlp(inputs: int, classes: int, seed: int, gain: float = 2.0) -> nn.Module:
    """A float64 tanh network whose logits have a standard deviation of about ``gain``."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, classes)).double().eval()
    with torch.no_grad():
        net[2].weight.normal_(0.0, gain / 24**0.5 * 1.5)
        net[2].bias.normal_(0.0, gain / 2)
    return net


def small_cnn(classes: int, seed: int, gain: float = 1.0) -> nn.Module:
    """A float32 network for 1 x 12 x 12 images: convolutions, BatchNorm, in-place ReLU, pooling."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16 * 36, classes),
    )
    with torch.no_grad():
        net[-1].weight.mul_(8 * gain)
    return net.eval()


def jacobian(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and dz/dx [B, K, p] of a model, one class after the other."""
    x = x.detach().requires_grad_()
    z = model(x)
    rows = [torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0] for k in range(z.shape[1])]
    return z.detach(), torch.stack([r.flatten(1) for r in rows], 1)


def metric(z: Tensor, jac: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """G [B, p, p] and the cross-entropy's h [B, p], by their definitions."""
    p = z.softmax(1)
    dl = jac - (p[:, :, None] * jac).sum(1, keepdim=True)  # [B, K, p]
    g = torch.einsum("bk,bkp,bkq->bpq", p, dl, dl)
    return g, -dl[torch.arange(len(y)), y]


def rank_condition(jac: Tensor) -> float:
    """The largest condition number of the contrasts' K x p matrices (over their min(K-1, p)
    singular values): rows in float64 resolve FI to about its square times eps."""
    s = torch.linalg.svdvals((jac - jac.mean(1, keepdim=True)).double())
    count = min(jac.shape[1] - 1, jac.shape[2])
    return float((s[:, 0] / s[:, count - 1]).max())


class SigmoidNetwork:
    """The worked example of Shu and Zhu's section 2.3, in numpy: a feed-forward network,
    a_l = sigma(W_l a_(l-1) + b_l) and P = softmax(W a + b), with its gradients in closed form."""

    def __init__(self, widths: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        pairs = list(pairwise(widths))
        self.weights = [rng.normal(0.0, 2.5 / n**0.5, (m, n)) for n, m in pairs]
        self.biases = [rng.normal(0.0, 0.3, m) for _, m in pairs]

    def gradients(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P [K] and d log P / dx [K, p] at one input [p]."""
        activations = []
        a = x
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            a = 1.0 / (1.0 + np.exp(-(w @ a + b)))
            activations.append(a)
        z = self.weights[-1] @ a + self.biases[-1]
        p = np.exp(z - z.max())
        p /= p.sum()
        # d log P_k / dz = e_k - P, then backwards: W^T, times sigma' = a (1 - a)
        delta = (np.eye(len(p)) - p) @ self.weights[-1]  # [K, width]
        for w, a in zip(reversed(self.weights[:-1]), reversed(activations), strict=True):
            delta = (delta * (a * (1.0 - a))) @ w
        return p, delta

    def influence(self, x: np.ndarray, y: int) -> float:
        """h^T G^+ h by a pseudo-inverse: for networks that are not confident."""
        p, dl = self.gradients(x)
        metric = (dl * p[:, None]).T @ dl
        h = -dl[y]
        rank = min(len(p) - 1, len(x))
        values, vectors = np.linalg.eigh(metric)
        kept = vectors[:, -rank:]
        return float(((kept.T @ h) ** 2 / values[-rank:]).sum())

    def module(self) -> nn.Module:
        """The same network in torch, float64."""
        layers: list[nn.Module] = []
        for w, b in zip(self.weights, self.biases, strict=True):
            layer = nn.Linear(w.shape[1], w.shape[0]).double()
            layer.weight.data, layer.bias.data = torch.from_numpy(w), torch.from_numpy(b)
            layers += [layer, nn.Sigmoid()]
        return nn.Sequential(*layers[:-1]).eval()
