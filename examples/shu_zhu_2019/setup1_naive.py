"""What FI costs beside naive autograd: one gradient for each image and class, and a singular value
decomposition, as in the authors' scripts."""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.data import Images

__all__ = ["EPS", "Naive", "definition", "forward_seconds", "naive_influence", "naive_seconds"]

EPS = 1e-3  # of the authors' rule
FORWARD_BATCH = 500
FORWARD_BATCHES = 4


class Naive(NamedTuple):
    """What :func:`naive_seconds` finds.

    Attributes:
        seconds: [n], of each image.
        fi: [n] float64.
    """

    seconds: NDArray[np.float64]
    fi: NDArray[np.float64]


def naive_influence(model: nn.Module, x: Tensor, label: int, eps: float) -> float:
    """FI of the cross-entropy of one image x [1, ...], in the model's precision.

    L0_k = dP_k / (sqrt(P_k) + eps), h = -dP_y / (P_y + eps), FI = h^T (L0 L0^T)^+ h. With eps = 0
    this is equation 6 of Shu and Zhu (2019), and singular values below p times the machine epsilon
    of the largest count as zero; otherwise it is the authors' rule, which drops those up to eps.
    """
    omega = x.detach().requires_grad_()
    probs = torch.softmax(model(omega), 1)[0]  # [K]
    rows = torch.stack(
        [torch.autograd.grad(p, omega, retain_graph=True)[0].flatten() for p in probs]
    )  # [K, p], dP_k
    probs = probs.detach()
    scaled = (rows / (probs.sqrt() + eps)[:, None]).T  # [p, K], L0
    u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
    cut = eps if eps else float(s[0]) * len(scaled) * torch.finfo(s.dtype).eps
    kept = s > cut
    part = (rows[label] / (probs[label] + eps)) @ u[:, kept] / s[kept]
    return float(part.square().sum())


def naive_seconds(model: nn.Module, images: Images, at: Tensor, device: str) -> Naive:
    """Times the authors' rule on images one by one, after one to warm up."""
    naive_influence(model, images.pixels(at[:1]).to(device), int(images.y[at[0]]), EPS)
    seconds, values = [], []
    for i in at.tolist():
        start = time.perf_counter()
        x = images.pixels(torch.tensor([i])).to(device)
        # A float: the device has finished.
        values.append(naive_influence(model, x, int(images.y[i]), EPS))
        seconds.append(time.perf_counter() - start)
    return Naive(np.array(seconds), np.array(values))


def definition(
    model: nn.Module, images: Images, at: Tensor, device: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FI by the definition without any theorem, and by the closed form, [n] each; the network runs
    in float64 for both."""
    double = copy.deepcopy(model).double()
    x, y = images.pixels(at).double().to(device), images.y[at].to(device)
    values = [naive_influence(double, x[i : i + 1], int(y[i]), 0.0) for i in range(len(x))]
    closed = fastfi.influence(double, x, y, assume_full_rank=True)
    assert isinstance(closed, Tensor)
    return np.array(values), closed.cpu().numpy()


@torch.no_grad()
def forward_seconds(model: nn.Module, images: Images, device: str) -> tuple[float, int]:
    """Seconds of the network alone per image, as the median of some batches after one to warm up;
    and the number of images in a batch."""
    x = images.pixels(slice(0, FORWARD_BATCH)).to(device)
    seconds = []
    for _ in range(1 + FORWARD_BATCHES):
        start = time.perf_counter()
        float(model(x).sum())  # the device has finished
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])) / len(x), len(x)
