"""Implementations of the operators of :mod:`fastfi._ops`, and the one place that registers them."""

from __future__ import annotations

import torch

from fastfi._ops import OP_NAMES
from fastfi.backends import blas, cpu, cpu_layers, reference, reference_windows

__all__ = ["backends"]

_REFERENCE = {**vars(reference), **vars(reference_windows)}

# For these the definition would form what must not be formed; products of torch serve every device.
_LAYERS = ("linear_gram", "conv_gram", "channel_sums")
_DEFAULT = {**_REFERENCE, **{name: getattr(blas, name) for name in _LAYERS}}

for _name in OP_NAMES:
    # What serves every device that has no kernel of its own.
    torch.library.impl(f"fastfi::{_name}", "default")(_DEFAULT[_name])
    _kernel = getattr(cpu_layers if _name in _LAYERS else cpu, _name)
    torch.library.register_kernel(f"fastfi::{_name}", "cpu", _kernel)


def backends() -> dict[str, dict[str, str]]:
    """Which kernel each operator runs, by device type.

    Returns:
        ``{operator: {device type: kernel}}``; ``"default"`` stands for every device that is not
        named. The CPU's entry names the instruction set in use.
    """
    kernel = f"C++ ({cpu.instruction_sets()[0]})"
    table = {name: {"cpu": kernel, "default": "torch reference"} for name in OP_NAMES}
    for name in _LAYERS:
        table[name]["default"] = "torch matrix products"
    return table
