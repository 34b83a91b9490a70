"""Ghost or direct? Two ways to the same Gram matrix, by what they cost.

Costs are counted in units of 38 picoseconds, as measured on two cores with AVX-512 for the layers
of ResNets (``bench/layer_ways.py``): a float32 multiply-add in a product of large matrices takes
1 / 3.3, one of the fused float64 kernel 0.4; each number of W that is formed costs 25, for it is
written and read again; each cotangent that is converted 15; each tap's product that is gathered 25.

On a GPU nothing is written on either way, and the matrix units' float64 products of sm_80 and sm_90
have the rate of float32 ones without them by their makers' figures: multiply-adds are counted, all
alike. No GPU has been measured.
"""

from __future__ import annotations

import torch

__all__ = ["ghost_is_cheaper"]

_PRODUCT, _FUSED, _FORMED, _CONVERTED, _GATHERED = 3.3, 0.4, 25.0, 15.0, 25.0
# Beyond the fused kernel's sizes, the ghost way is made of plain products, and this much slower.
_UNFUSED = 3.0
_FUSED_POSITIONS, _FUSED_PIXELS = 256, 576


def ghost_is_cheaper(
    positions: int,
    inputs: int,
    outputs: int,
    rows: int,
    dtype: torch.dtype,
    taps: int = 1,
    pixels: int = 0,
    device: str = "cpu",
) -> bool:
    """Whether ``S = a a^T, H = S d, <H, d>`` costs less than ``W = d^T a, <W, W>``.

    Args:
        positions: T.
        inputs: D, an output's fan-in.
        outputs: O.
        rows: n.
        dtype: of the cotangents. Ghost products are float64 whatever it is, direct ones that.
        taps: pixels of a convolution's patch, which is where its pixels' products are summed.
        pixels: of a convolution's input.
        device: its type.
    """
    if positions == 1:
        return True
    if device == "cuda":
        products = positions**2 * (inputs + rows * outputs) + rows**2 * positions * outputs
        return products < rows * outputs * inputs * (positions + rows)
    cotangents = rows * positions * outputs
    shared = positions**2 * (inputs / taps + (_GATHERED * taps if taps > 1 else 0)) / 2
    ghost = shared + cotangents * (_FUSED * positions + rows / 2 + _CONVERTED)
    if positions > _FUSED_POSITIONS or (taps > 1 and pixels > _FUSED_PIXELS):
        ghost *= _UNFUSED
    speed = _PRODUCT / (2.0 if dtype == torch.float64 else 1.0)
    formed = rows * outputs * inputs
    direct = formed * (positions / speed + rows / 2 + _FORMED)
    return ghost < direct
