"""What layer influence is measured against.

* :class:`BackwardPasses`: K-1 batched backward passes to the input, the forward pass made before;
* :func:`naive_layers`: per sample and class autograd with respect to every parameter, then an SVD
  for each layer, as scripts do it;
* :func:`jacrev_layers`: ``torch.func.vmap(jacrev)`` over the parameters, then batched products and
  ``torch.linalg``.

A layer is a module that owns trainable parameters; they are taken together. B samples, L layers,
K classes. Other libraries are in :mod:`bench.layer_peers`; they share :func:`solve`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fastfi.inverse import Damped, Truncated

__all__ = ["RTOL", "BackwardPasses", "Grams", "jacrev_grams", "jacrev_layers", "layers_of"]
__all__ += ["naive_layers", "solve"]

# L0's singular values up to this, relative to the largest, count as zero. Gradients in float32
# leave less than 1e-6 on the one that is (sum_k P_k dl_k = 0), and products of them in float32
# 3e-4; the smallest of the others is above 0.05 at the benchmarks' spread of 1.
RTOL = 1e-3


def layers_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters that each module owns, by the module's name, in the model's order.

    Modules without any are left out.
    """
    owned = {
        name: [p for p in module.parameters(recurse=False) if p.requires_grad]
        for name, module in model.named_modules()
    }
    return {name: parameters for name, parameters in owned.items() if parameters}


class BackwardPasses:
    """K-1 batched backward passes to the input through one forward pass, which is kept.

    The call does what any method with full rows has to do after its forward pass, and no more:
    gradients of the sorted contrasts z_k - z_top, [K-1] of [B, ...].

    Args:
        model: a classifier in eval mode.
        x: [B, ...].
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        self._z = model(self._x)  # [B, K]
        order = self._z.detach().argsort(1, descending=True)  # [B, K]
        unit = torch.eye(order.shape[1], dtype=x.dtype)[order]  # [B, K, K]
        self._cotangents = (unit[:, 1:] - unit[:, :1]).transpose(0, 1)  # [K-1, B, K]

    def __call__(self) -> list[Tensor]:
        return [
            torch.autograd.grad(self._z, self._x, cotangent, retain_graph=True)[0]
            for cotangent in self._cotangents
        ]


class _Rule(NamedTuple):
    """How a rule weighs rows.

    Attributes:
        weights: [B, K], L0_k = weights_k dl_k, and the metric is G = sum_k L0_k L0_k^T.
        factor: [B], the objective's gradient is h = -factor L0_y.
    """

    weights: Tensor
    factor: Tensor


def _rule(log_prob: Tensor, y: Tensor, name: str) -> _Rule:
    p = log_prob.exp()  # [B, K]
    p_y = p.gather(1, y[:, None]).squeeze(1)
    if name == "truncated":
        eps = Truncated().eps
        return _Rule(p / (p.sqrt() + eps), (p_y.sqrt() + eps) / (p_y + eps))
    return _Rule(p.sqrt(), p_y.rsqrt())


def naive_layers(model: nn.Module, x: Tensor, y: Tensor, rule: str = "exact") -> Tensor:
    """FI [B, L] float64, sample by sample, class by class, and layer by layer with an SVD of L0.

    Everything has the model's precision, as in scripts: float32 is right where the probabilities of
    the classes are of similar size.
    """
    layers = layers_of(model)
    parameters = [p for group in layers.values() for p in group]
    values = []
    for sample, label in zip(x, y, strict=True):
        log_prob = torch.log_softmax(model(sample[None]), 1)[0]  # [K]
        gradients = [
            torch.autograd.grad(log_prob[k], parameters, retain_graph=True)
            for k in range(len(log_prob))
        ]
        weights, factor = _rule(log_prob.detach()[None], label[None], rule)  # [1, K], [1]
        l0 = []  # of each layer [p, K]
        at = 0
        for group in layers.values():
            end = at + len(group)
            rows = [torch.cat([g.flatten() for g in grads[at:end]]) for grads in gradients]
            l0.append(torch.stack(rows, 1) * weights)
            at = end
        tau = 0.0
        if rule == "damped":
            tau = Damped().alpha * sum(float(part.square().sum()) for part in l0)
        values.append([_by_svd(part, -factor * part[:, label], rule, tau) for part in l0])
    return torch.tensor(values, dtype=torch.float64)


def _by_svd(l0: Tensor, h: Tensor, rule: str, tau: float) -> float:
    """FI of one layer from L0 [p, K], h [p] and the damping, in L0's precision."""
    basis, s, _ = torch.linalg.svd(l0, full_matrices=False)  # [p, K], [K]
    kept = s > (Truncated().eps if rule == "truncated" else RTOL * s[0])
    part = (h @ basis)[kept]
    return float((part.square() / (s[kept].square() + tau)).sum())


class Grams(NamedTuple):
    """What every method with products of rows ends in.

    Attributes:
        gram: [B, L, K, K] float64, the products dl_k . dl_l of the gradients of the
            log-probabilities with respect to each layer's parameters.
        log_prob: [B, K] float64.
    """

    gram: Tensor
    log_prob: Tensor


def solve(q: Grams, y: Tensor, rule: str) -> Tensor:
    """FI [B, L] float64 by torch.linalg; the damping follows from all layers together."""
    weights, factor = _rule(q.log_prob, y, rule)  # [B, K], [B]
    m = weights[:, None, :, None] * q.gram * weights[:, None, None, :]  # [B, L, K, K], L0 L0^T
    squares, vectors = torch.linalg.eigh(m)  # [B, L, K] ascending, [B, L, K, K]
    pick = y[:, None, None, None].expand(-1, m.shape[1], 1, m.shape[2])
    own = vectors.gather(2, pick).squeeze(2).square()  # [B, L, K]
    cut = RTOL**2 * squares[:, :, -1:]
    share = torch.ones_like(squares)
    if rule == "truncated":
        cut = torch.full_like(cut, Truncated().eps ** 2)
    if rule == "damped":
        tau = Damped().alpha * m.diagonal(dim1=2, dim2=3).sum((1, 2))  # [B]
        share = squares / (squares + tau[:, None, None])
    # L0 = V s W^T, so that h's part along W_i is -factor s_i V_yi.
    return factor.square()[:, None] * torch.where(squares > cut, share * own, 0.0).sum(2)


def jacrev_grams(model: nn.Module, x: Tensor) -> Grams:
    """The products, by torch.func: all parameters' Jacobians of the whole batch at once."""
    layers = {
        name: [f"{name}.{own}" if name else own for own, p in named if p.requires_grad]
        for name, module in model.named_modules()
        if (named := list(module.named_parameters(recurse=False)))
    }
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def log_prob(parameters: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
        z = functional_call(model, {**parameters, **fixed}, (sample[None],))[0]  # [K]
        out = torch.log_softmax(z, 0)
        return out, out

    rows, out = vmap(jacrev(log_prob, has_aux=True), in_dims=(None, 0))(trained, x)
    gram = []
    for names in layers.values():
        flat = [rows[name].flatten(2) for name in names]  # [B, K, p] each
        gram.append(torch.stack([(r @ r.mT).double() for r in flat]).sum(0))
    return Grams(torch.stack(gram, 1), out.detach().double())


def jacrev_layers(model: nn.Module, x: Tensor, y: Tensor, chunk: int, rule: str) -> Tensor:
    """FI [B, L] by vmap(jacrev) over the parameters, ``chunk`` samples at once."""
    parts = zip(x.split(chunk), y.split(chunk), strict=True)
    return torch.cat([solve(jacrev_grams(model, part), label, rule) for part, label in parts])
