"""Ghost or direct? Two ways to the same Gram matrix, by their multiply-adds."""

from __future__ import annotations

import torch

__all__ = ["ghost_is_cheaper"]


def ghost_is_cheaper(
    positions: int, inputs: int, outputs: int, rows: int, dtype: torch.dtype
) -> bool:
    """Whether ``S = a a^T, H = S d, <H, d>`` costs less than ``W = d^T a, <W, W>``.

    Args:
        positions: T.
        inputs: D, an output's fan-in.
        outputs: O.
        rows: n.
        dtype: of the cotangents. Ghost products are float64 whatever it is, direct ones that.
    """
    if positions == 1:
        return True
    slow = 1.0 if dtype == torch.float64 else 2.0  # a float64 product, in float32 ones
    ghost = slow * (positions**2 * (inputs + rows * outputs) + rows**2 * positions * outputs)
    direct = rows * positions * outputs * inputs + slow * rows**2 * outputs * inputs / 2
    return ghost < direct
