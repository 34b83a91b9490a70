"""What fastfi is measured against.

Each function takes ``model, x [B, ...], y [B]`` and does the work of one yardstick:

* :func:`forward`: one forward pass, no autograd graph;
* :func:`forward_backward`: forward and K-1 batched backward passes to the input, one autograd call
  per class, the least that any method with full rows can do;
* :func:`naive_influence` (from the examples): per sample and class autograd, numpy pseudo-inverse;
* :func:`jacrev_influence`: ``torch.func.vmap(jacrev)`` and batched ``torch.linalg``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from examples.naive import naive_influence

__all__ = ["damped", "exact", "forward", "forward_backward", "jacrev_influence", "jacrev_rows"]
__all__ += ["naive_influence", "truncated"]


def forward(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The logits [B, K]."""
    with torch.no_grad():
        return model(x)


def _passes(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    z = model(x)  # [B, K]
    order = z.detach().argsort(1, descending=True)  # [B, K]
    rows = x.new_empty(z.shape[1] - 1, *x.shape)  # [K-1, B, ...]
    for r in range(len(rows)):
        cotangent = torch.zeros_like(z)
        cotangent.scatter_(1, order[:, r + 1 : r + 2], 1.0)
        cotangent.scatter_(1, order[:, :1], -1.0)
        (rows[r],) = torch.autograd.grad(z, x, cotangent, retain_graph=r + 1 < len(rows))
    return rows


def forward_backward(model: nn.Module, x: Tensor, chunks: Sequence[int] = ()) -> list[Tensor]:
    """Forward and K-1 backward passes to the input, each for a whole chunk.

    Args:
        model: a classifier in eval mode.
        x: [B, ...].
        chunks: the sizes of the chunks, which add up to B; () takes the whole batch at once.

    Returns:
        For each chunk of b samples [K-1, b, ...]: gradients of the sorted contrasts z_k - z_top.
    """
    return [_passes(model, part) for part in x.split(list(chunks) or [len(x)])]


def jacrev_rows(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """dl [B, K, p] (gradients of the log-probabilities) and log_prob [B, K], by torch.func."""
    state = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}

    def log_prob(sample: Tensor) -> tuple[Tensor, Tensor]:
        z = functional_call(model, state, (sample[None],))[0]  # [K]
        out = torch.log_softmax(z, 0)
        return out, out

    dl, out = vmap(jacrev(log_prob, has_aux=True))(x)
    return dl.flatten(2), out


def exact(dl: Tensor, log_prob: Tensor, y: Tensor) -> Tensor:
    """h^T G^+ h from dl [B, K, p], through the K x K matrix L0 L0^T, in float64."""
    l0 = log_prob.double().exp().sqrt()[:, :, None] * dl.double()  # [B, K, p]
    pick = y[:, None, None].expand(-1, 1, dl.shape[2])
    h = -dl.double().gather(1, pick)[:, 0]  # [B, p]
    c = torch.einsum("bkp,bp->bk", l0, h)
    half = torch.linalg.pinv(l0 @ l0.mT, rtol=1e-10, hermitian=True) @ c[:, :, None]
    return half[:, :, 0].square().sum(1)  # G^+ = L0^T M^+ M^+ L0, so FI = |M^+ c|^2


def truncated(dl: Tensor, log_prob: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """The rule of the authors' published scripts, by SVD of L0, in float64."""
    p = log_prob.double().exp()  # [B, K]
    l0 = (p / (p.sqrt() + eps))[:, :, None] * dl.double()
    p_y = p.gather(1, y[:, None])  # [B, 1]
    pick = y[:, None, None].expand(-1, 1, dl.shape[2])
    h = -(p_y / (p_y + eps)) * dl.double().gather(1, pick)[:, 0]  # [B, p]
    _, s, vh = torch.linalg.svd(l0, full_matrices=False)  # [B, K], [B, K, p]
    parts = torch.einsum("bkp,bp->bk", vh, h) / s
    return torch.where(s > eps, parts.square(), 0).sum(1)


def damped(dl: Tensor, log_prob: Tensor, y: Tensor, alpha: float = 1e-2) -> Tensor:
    """h^T (G + tau I)^-1 h with tau = alpha trace(G), by SVD of L0, in float64."""
    l0 = log_prob.double().exp().sqrt()[:, :, None] * dl.double()
    pick = y[:, None, None].expand(-1, 1, dl.shape[2])
    h = -dl.double().gather(1, pick)[:, 0]
    tau = alpha * l0.square().sum((1, 2))  # [B]
    _, s, vh = torch.linalg.svd(l0, full_matrices=False)
    parts = torch.einsum("bkp,bp->bk", vh, h).square() / (s.square() + tau[:, None])
    return parts.sum(1)  # h lies in the row space of L0 wherever every P_k > 0


def jacrev_influence(model: nn.Module, x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Exact FI [B] by vmap(jacrev) and batched torch.linalg, ``chunk`` samples at once."""
    parts = zip(x.split(chunk), y.split(chunk), strict=True)
    return torch.cat([exact(*jacrev_rows(model, part), label) for part, label in parts])
