"""Influence of parameters from its definition: the whole Jacobian, sample by sample.

Nothing here is shared with the package, and nothing knows of layers' Gram rules. Each logit of each
sample is differentiated on its own, with respect to every trainable parameter, by plain autograd in
float64; the measure then follows from singular value decompositions:

    P = softmax(z), dl_k = J_k - sum_j P_j J_j, L0_k = sqrt(P_k) dl_k, L0 = U S V^T, h = g^T J
    exact      |S^-1 V^T h|^2 over the rank of the contrasts
    truncated  the authors' rule, L0_k = dP_k / (sqrt P_k + eps), singular values above eps alone
    damped     h^T (G + tau I)^-1 h, with tau = alpha * trace G of a reference block
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

__all__ = ["Block", "LayerJacobian", "as_logits", "layer_jacobian", "layer_names"]


def as_logits(output: object) -> Tensor:
    """Logits [B, K] of whatever a model may return."""
    z = output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]
    if z.dim() == 1 or z.shape[1] == 1:
        z = z.reshape(-1, 1)
        z = torch.cat([torch.zeros_like(z), z], 1)
    return z


def owner_of(name: str) -> str:
    """The module that a parameter's full name belongs to; parametrizations are their owner's."""
    parts = name.split(".")
    if "parametrizations" in parts:
        return ".".join(parts[: parts.index("parametrizations")])
    return ".".join(parts[:-1])


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every name of every trainable parameter, tied ones under each of their modules' names."""
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            yield name, p


def layer_names(model: nn.Module) -> list[str]:
    """Modules that own trainable parameters directly, in the order of ``named_modules``."""
    owners = {owner_of(name) for name, _ in named_trainable(model)}
    return [name or "(model)" for name, _ in model.named_modules() if name in owners]


def parameter_names(model: nn.Module, name: str) -> list[str]:
    """What a selected name stands for: a parameter, or all trainable ones of a module."""
    names = [n for n, _ in named_trainable(model)]
    if name in ("(model)", ""):
        return [n for n in names if owner_of(n) == ""]
    return [n for n in names if n == name or n.startswith(name + ".")]


@dataclass(frozen=True)
class Block:
    """One sample's rows for one group of coordinates.

    Attributes:
        logits: [K].
        rows: dz / domega [K, p].
    """

    logits: Tensor
    rows: Tensor

    @cached_property
    def prob(self) -> Tensor:
        return self.logits.softmax(0)

    def contrasts(self) -> Tensor:
        """Rows against the most probable class, in the order of the others: [K - 1, p]."""
        top = int(self.logits.argmax())
        others = [k for k in range(len(self.logits)) if k != top]
        return self.rows[others] - self.rows[top]

    def gram(self) -> Tensor:
        """Of the contrasts: [K - 1, K - 1]."""
        d = self.contrasts()
        return d @ d.T

    @cached_property
    def spectrum(self) -> Tensor:
        """Singular values of the contrasts, K - 1 of them, largest first."""
        d = self.contrasts()
        s = torch.linalg.svdvals(d) if d.shape[1] else d.new_zeros(0)
        return torch.cat([s, s.new_zeros(len(d) - len(s))])

    def rank(self, low: float = 1e-11, high: float = 1e-3) -> int | None:
        """The contrasts' rank, or None where float64 rows do not make it plain: a singular value
        between ``low`` and ``high`` of the largest."""
        s = self.spectrum
        if s[0] == 0:
            return 0
        ratio = s / s[0]
        if bool(((ratio > low) & (ratio < high)).any()):
            return None
        return int((ratio >= high).sum())

    def condition(self) -> float:
        """Largest over smallest singular value within the rank; infinite where that is not plain,
        and 1 for a block of zeros."""
        s, rank = self.spectrum, self.rank()
        if rank is None:
            return float("inf")
        return float(s[0] / s[rank - 1]) if rank else 1.0

    @cached_property
    def centred(self) -> Tensor:
        """dl [K, p]."""
        return self.rows - self.prob @ self.rows

    def trace(self) -> float:
        """Of the metric G."""
        return float((self.prob[:, None] * self.centred.square()).sum())

    def gradient(self, y: int, grad: Tensor | None = None) -> Tensor:
        """h [p]: of -log P_y, or of an objective with df/dz = grad [K]."""
        return -self.centred[y] if grad is None else grad @ self.rows

    def _along(self, scaled: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        _, s, v = torch.linalg.svd(scaled, full_matrices=False)
        return s, v @ h

    def exact(self, y: int, grad: Tensor | None = None) -> tuple[float, int | None]:
        """FI and the rank; the rank is None, and FI NaN, where it is not plain."""
        rank = self.rank()
        if rank is None:
            return float("nan"), None
        if rank == 0:
            return 0.0, 0
        s, c = self._along(self.prob.sqrt()[:, None] * self.centred, self.gradient(y, grad))
        return float((c[:rank] / s[:rank]).square().sum()), rank

    def closed_form(self, y: int) -> float:
        """(1 - P_y) / P_y: FI at full rank, and its upper bound below."""
        others = torch.cat([self.logits[:y], self.logits[y + 1 :]])
        return float((others.logsumexp(0) - self.logits[y]).exp())

    def truncated(self, y: int, eps: float) -> tuple[float, int, float]:
        """FI, how many singular values are kept, and the least |s / eps - 1|."""
        p = self.prob
        scaled = (p / (p.sqrt() + eps))[:, None] * self.centred
        s, c = self._along(scaled, -p[y] * self.centred[y] / (p[y] + eps))
        kept = s > eps
        gap = float((s / eps - 1).abs().min()) if len(s) else 1.0
        return float((c / s)[kept].square().sum()), int(kept.sum()), gap

    def damped(self, y: int, tau: float, grad: Tensor | None = None) -> float:
        """h^T (G + tau I)^-1 h."""
        h = self.gradient(y, grad)
        s, c = self._along(self.prob.sqrt()[:, None] * self.centred, h)
        inside = c.square() / (s.square() + tau)
        outside = (h - (c @ self._basis())).square().sum() / tau if grad is not None else 0.0
        return float(inside.sum() + outside)

    def _basis(self) -> Tensor:
        scaled = self.prob.sqrt()[:, None] * self.centred
        return torch.linalg.svd(scaled, full_matrices=False)[2]

    def merged(self, lump: float, y: int) -> tuple[Block, int]:
        """The block whose least probable classes are one while they hold less than ``lump`` (the
        label stays apart; one class alone is not merged), and where y stands in it."""
        p, mass, tail = self.prob, 0.0, []
        for k in p.argsort().tolist():
            mass += float(p[k])
            if mass >= lump:
                break
            tail.append(k)
        tail = [k for k in tail if k != y]
        if len(tail) < 2:
            return self, y
        kept = [k for k in range(len(p)) if k not in tail]
        share = p[tail] / p[tail].sum()
        logits = torch.cat([self.logits[kept], self.logits[tail].logsumexp(0)[None]])
        rows = torch.cat([self.rows[kept], (share @ self.rows[tail])[None]])
        return Block(logits, rows), kept.index(y)


@dataclass(frozen=True)
class LayerJacobian:
    """Logits [B, K] and their derivatives for each parameter tensor, by identity.

    Attributes:
        logits: [B, K] float64.
        rows: one [B, K, p] for each trainable parameter tensor.
        index: where each full name (tied parameters have several) finds its rows.
        input: [B, K, p], where the input is floating point.
    """

    model: nn.Module
    logits: Tensor
    rows: list[Tensor]
    index: dict[str, int]
    input: Tensor | None

    def _block(self, sample: int, parts: list[Tensor]) -> Block:
        return Block(self.logits[sample], torch.cat([r[sample] for r in parts], 1))

    def of_names(self, sample: int, names: list[str]) -> Block:
        """Parameters by full name; each tensor once."""
        parts = [self.rows[i] for i in dict.fromkeys(self.index[n] for n in names)]
        return self._block(sample, parts)

    def selected(self, sample: int, name: str) -> Block:
        """What ``wrt=[name]`` perturbs."""
        return self.of_names(sample, parameter_names(self.model, name))

    def layer(self, sample: int, name: str) -> Block:
        """One column of ``wrt="layers"``."""
        owner = "" if name == "(model)" else name
        return self.of_names(sample, [n for n in self.index if owner_of(n) == owner])

    def params(self, sample: int) -> Block:
        return self._block(sample, self.rows)

    def everything(self, sample: int) -> Block:
        """Input and parameters together."""
        assert self.input is not None
        return self._block(sample, [*self.rows, self.input])

    def alone(self, sample: int) -> Block:
        """The input."""
        assert self.input is not None
        return self._block(sample, [self.input])


def layer_jacobian(model: nn.Module, x: Tensor) -> LayerJacobian:
    """The whole Jacobian, one sample and one logit at a time."""
    unique: dict[int, int] = {}
    tensors: list[nn.Parameter] = []
    index = {}
    for name, p in named_trainable(model):
        if id(p) not in unique:
            unique[id(p)] = len(tensors)
            tensors.append(p)
        index[name] = unique[id(p)]
    logits, rows = [], []
    for i in range(len(x)):
        one = x[i : i + 1].clone()
        leaves: list[Tensor] = list(tensors)
        if one.is_floating_point():
            leaves.append(one.requires_grad_())
        with torch.enable_grad():
            z = as_logits(model(one * 1 if one.requires_grad else one))[0]
            grads = [
                torch.autograd.grad(v, leaves, retain_graph=True, allow_unused=True) for v in z
            ]
        logits.append(z.detach())
        # one [K, p] for each leaf
        rows.append(
            [
                torch.stack([_dense(g, leaf).reshape(-1) for g in column])
                for leaf, column in zip(leaves, zip(*grads, strict=True), strict=True)
            ]
        )
    stacked = [torch.stack(r) for r in zip(*rows, strict=True)]
    at_input = stacked.pop() if x.is_floating_point() else None
    return LayerJacobian(model, torch.stack(logits), stacked, index, at_input)


def _dense(grad: Tensor | None, leaf: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(leaf)
    return grad.to_dense() if grad.is_sparse else grad
