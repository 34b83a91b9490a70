"""``jacobian_norm``: the length of the objective's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi.baselines._slope import Slope, measure
from fastfi.influence import check_dtype, finish
from fastfi.objectives import Objective
from fastfi.sweep import Request, run_chunks

__all__ = ["jacobian_norm"]


class _Part(NamedTuple):
    norm: Tensor
    dtype: torch.dtype


def jacobian_norm(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    objective: str | Objective = "cross_entropy",
    outputs: str = "logits",
    memory_budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Euclidean norm of the objective's gradient with respect to the sample, ``|df/dx|``.

    Equation 4 of Shu and Zhu, "Sensitivity Analysis of Deep Neural Networks", AAAI 2019
    (arXiv 1901.07152), with f = -log P_y unless another objective is asked for. One forward and one
    backward pass serve all samples of a chunk. Confident samples keep their digits: 1 - P_y is a
    sum of the other classes' probabilities, in float64.

    Args:
        model, x, y, objective, outputs, memory_budget, dtype: as in :func:`fastfi.influence`.

    Returns:
        [B] on x's device, not negative; in units of the objective per unit of x.

    Raises:
        The exceptions of :func:`fastfi.influence`.

    Example:
        >>> fastfi.baselines.jacobian_norm(model, x, y).shape
        torch.Size([4])
    """
    check_dtype(dtype)
    q = Request.checked(
        model, x, y, objective=objective, outputs=outputs, memory_budget=memory_budget
    )
    plan = q.plan(variant=("slope",))
    measure(q, plan, False, 2 * x[0].numel() * 8)

    def run(part: slice) -> _Part:
        slope = Slope(q, part)
        norm = torch.linalg.vector_norm(slope.flat(), dim=1)
        return _Part(slope.scale * norm, slope.dtype)

    found = run_chunks(q, plan, run)
    return finish(found.norm, dtype, found.dtype)
