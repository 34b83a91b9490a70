"""Each sample's classes in the order in which the solves want them, lumped where asked.

Position 0 is the most probable class, the reference. With lumping, the classes after the kept ones
are merged into one, whose logit is the logsumexp of theirs; the label is always kept. Merging is a
coarse-graining of the outcomes: the Fisher metric G can only shrink, so that FI of cross-entropy
can only grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SortedClasses", "kept_classes", "sort_classes"]


@dataclass(frozen=True)
class SortedClasses:
    """Classes of B samples in solve order, K' positions wide (K unless lumped).

    Attributes:
        logits: [B, K] float64, in the model's order.
        full_log_prob: [B, K] float64, in the model's order.
        log_prob: [B, K'] float64; -inf at positions that a sample does not use.
        order: [B, K] int64, the model's class at each position.
        kept: [B], how many leading positions are single classes; the position after them, where
            there is one, is the lumped class.
        position: [B], where the label stands.
        predicted: [B], the most probable class.
        lumped: whether any classes were merged in this batch.
    """

    logits: Tensor
    full_log_prob: Tensor
    log_prob: Tensor
    order: Tensor
    kept: Tensor
    position: Tensor
    predicted: Tensor
    lumped: bool

    def _rest(self) -> tuple[Tensor, Tensor]:
        """Which positions are lumped [B, K], and their shares of the lumped mass [B, K]."""
        columns = torch.arange(self.order.shape[1], device=self.order.device)
        rest = columns[None] >= self.kept[:, None]
        log_p = self.full_log_prob.gather(1, self.order)
        share = torch.where(rest, log_p, -torch.inf).softmax(1).nan_to_num(0.0)
        return rest, share

    def pool(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """An objective's gradient as the lumped classes see it: df/dz by position [B, K'], where
        the lumped class has the sum of its members', and the same as a cotangent [B, K] in the
        model's order, where members share that sum by their mass."""
        by_position = grad.gather(1, self.order)
        width = self.log_prob.shape[1]
        if not self.lumped:
            return by_position[:, :width], grad
        rest, share = self._rest()
        total = torch.where(rest, by_position, 0.0).sum(1, keepdim=True)
        pooled = torch.where(rest, 0.0, by_position)
        cotangent = torch.zeros_like(grad).scatter_(1, self.order, pooled + share * total)
        lumped_at = self.kept.clamp(max=by_position.shape[1] - 1)[:, None]
        return pooled.scatter_add_(1, lumped_at, total)[:, :width], cotangent

    def cotangent(self, position: int) -> Tensor:
        """df/dz of the contrast at a position >= 1: [B, K] float64. Zero where it is unused."""
        single = self.kept > position
        cotangent = torch.zeros_like(self.logits)
        at = self.order[:, position : position + 1]
        cotangent.scatter_(1, at, single[:, None].double())
        if self.lumped:
            rest, share = self._rest()
            use = (self.kept == position) & rest.any(1)
            cotangent.scatter_add_(1, self.order, share * use[:, None])
            single = single | use
        return cotangent.scatter_add_(1, self.order[:, :1], -single[:, None].double())


def kept_classes(log_prob: Tensor, lump: float) -> Tensor:
    """How many of the most probable classes leave less than ``lump`` to the rest: [B] int64.

    Args:
        log_prob: [B, K], sorted in descending order.
    """
    p = log_prob.exp()
    rest = p.flip(1).cumsum(1).flip(1)  # [B, K]: mass of this class and all after it
    return (rest >= lump).sum(1).clamp(min=1)


def sort_classes(z: Tensor, y: Tensor | None, lump: float | None) -> SortedClasses:
    """Sorts the classes of logits z [B, K]; ``y=None`` means the predicted class."""
    logits = z.detach().double()
    full = logits.log_softmax(1).clamp(min=-1e300)  # -inf is kept for positions not in use
    # Stable, so that equal logits are ordered as argmax and topk order them on every device.
    log_prob, order = full.sort(dim=1, descending=True, stable=True)
    batch, classes = full.shape
    position = order.new_zeros(batch) if y is None else (order == y[:, None]).int().argmax(1)
    kept = order.new_full((batch,), classes)
    predicted = order[:, 0]
    if lump is None:
        return SortedClasses(logits, full, log_prob, order, kept, position, predicted, False)

    kept = kept_classes(log_prob, lump)
    # A label beyond the kept classes moves to the first position after them.
    key = torch.arange(classes, device=z.device, dtype=torch.float64).repeat(batch, 1)
    outside = position >= kept
    moved = torch.where(outside, kept - 0.5, position.double())
    key.scatter_(1, position[:, None], moved[:, None])
    resort = key.argsort(1)
    order, log_prob = order.gather(1, resort), log_prob.gather(1, resort)
    position = torch.where(outside, kept, position)
    kept = kept + outside.to(kept)
    kept = torch.where(kept >= classes - 1, classes, kept)  # one class is not worth merging
    columns = torch.arange(classes, device=z.device)[None]
    rest = torch.where(columns >= kept[:, None], log_prob, -torch.inf).logsumexp(1)
    at_rest = columns == kept[:, None]
    log_prob = torch.where(columns < kept[:, None], log_prob, -torch.inf)
    log_prob = torch.where(at_rest, rest[:, None], log_prob)
    width = max(2, int((kept + (kept < classes)).max()))
    lumped = bool((kept < classes).any())
    log_prob = log_prob[:, :width].contiguous()
    return SortedClasses(logits, full, log_prob, order, kept, position, predicted, lumped)
