"""FI as it is usually computed: one autograd call per sample and class, then a pseudo-inverse.

This is what the paper's formulas say word for word, and the yardstick for speed. It is right for
samples whose class probabilities are of similar size and loses its digits on confident ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["naive_influence"]


def naive_influence(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FI of the cross-entropy under perturbations of the input, sample by sample, class by class.

    Args:
        model: a classifier in eval mode that returns logits.
        x: [B, ...] inputs, in the model's precision.
        y: [B] int64 labels.

    Returns:
        [B] float64. Gradients and pseudo-inverse have the model's precision; the cut-off is K times
        its epsilon (numpy's default of 1e-15 would let float32's rounding errors through).
    """
    values = []
    for sample, label in zip(x, y.tolist(), strict=True):
        omega = sample[None].detach().requires_grad_()
        log_prob = torch.log_softmax(model(omega), 1)[0]  # [K]
        rows = [
            torch.autograd.grad(log_prob[k], omega, retain_graph=True)[0].flatten().numpy()
            for k in range(len(log_prob))
        ]
        dl = np.stack(rows)  # [K, p], rows dl_k
        root = np.sqrt(log_prob.detach().exp().numpy())  # [K]
        l0 = root[:, None] * dl  # [K, p], the metric is G = L0^T L0
        m = l0 @ l0.T  # [K, K], G^+ = L0^T M^+ M^+ L0
        cut = len(m) * np.finfo(m.dtype).eps
        half = np.linalg.pinv(m, rcond=cut, hermitian=True) @ (l0 @ -dl[label])  # [K]
        values.append(float(half.astype(np.float64) @ half.astype(np.float64)))
    return torch.tensor(values, dtype=torch.float64)
