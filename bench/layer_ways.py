"""Ghost or direct, fused or by products: what the planner's constants rest on.

    python -m bench.layer_ways

For the convolutions of ResNets at 32 x 32 and nine rows, the time of one sample's Gram matrix each
way, the least of five, and what the planner chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfi.backends import blas, cpu_layers
from fastfi.layers.planner import ghost_is_cheaper

__all__ = ["LAYERS", "main", "ways"]

ROWS = 9
# Channels, outputs, height and width, kernel, stride.
LAYERS = [
    *[(3, 64, 32, 7, 2), (64, 64, 8, 3, 1), (64, 64, 8, 1, 1), (64, 256, 8, 1, 1)],
    *[(256, 64, 8, 1, 1), (128, 128, 4, 3, 1), (128, 512, 4, 1, 1), (256, 256, 2, 3, 1)],
    *[(256, 1024, 2, 1, 1), (512, 512, 1, 3, 1), (64, 64, 32, 3, 1), (64, 128, 32, 3, 2)],
    *[(128, 128, 16, 3, 1), (256, 256, 8, 3, 1), (512, 512, 4, 3, 1)],
]


def _least(call: Callable[[], Tensor]) -> float:
    call()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ways(layer: Sequence[int]) -> tuple[dict[str, float], str]:
    """Seconds of one sample by way, and the way that the planner chooses."""
    channels, outputs, size, k, stride = layer
    batch = 64 if size <= 8 else 8
    x = torch.randn(batch, channels, size, size)
    out = (size + 2 * (k // 2) - k) // stride + 1
    d = [torch.randn(batch, outputs, out, out) for _ in range(ROWS)]
    form = ((k, k), (stride, stride), (k // 2, k // 2), (1, 1), 1)
    seconds = {"direct": _least(lambda: blas.conv_gram(x, d, *form, False))}
    if out * out <= 256:  # more makes matrices of many megabytes
        seconds["ghost, products"] = _least(lambda: blas.conv_gram(x, d, *form, True))
        seconds["ghost, fused"] = _least(lambda: cpu_layers.conv_gram(x, d, *form, True))
    sizes = out * out, channels * k * k, outputs, ROWS
    ghost = ghost_is_cheaper(*sizes, torch.float32, k * k, size * size)
    return {way: s / batch for way, s in seconds.items()}, "ghost" if ghost else "direct"


def main() -> None:
    """Prints a Markdown table."""
    names = ("direct", "ghost, products", "ghost, fused")
    print(f"| C, O, size, kernel, stride | {' | '.join(names)} | planned |")
    print("|:--|--:|--:|--:|:--|")
    for layer in LAYERS:
        seconds, planned = ways(layer)
        cells = [f"{1e6 * seconds[n]:.0f} µs" if n in seconds else "" for n in names]
        print(f"| {', '.join(map(str, layer))} | {' | '.join(cells)} | {planned} |", flush=True)


if __name__ == "__main__":
    main()
