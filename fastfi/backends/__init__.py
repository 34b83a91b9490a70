"""Implementations of the operators of :mod:`fastfi._ops`, and the one place that registers them."""

from __future__ import annotations

import torch

from fastfi._ops import OP_NAMES
from fastfi.backends import blas, cpu, reference, reference_windows

__all__ = ["backends"]

_REFERENCE = {**vars(reference), **vars(reference_windows)}

# Matrix products of torch, on every device.
_BLAS = {"linear_gram": blas.linear_gram, "conv_gram": blas.conv_gram}

for _name in OP_NAMES:
    if _name in _BLAS:
        torch.library.impl(f"fastfi::{_name}", "default")(_BLAS[_name])
        continue
    # The reference serves every device that has no kernel of its own.
    torch.library.impl(f"fastfi::{_name}", "default")(_REFERENCE[_name])
    torch.library.register_kernel(f"fastfi::{_name}", "cpu", getattr(cpu, _name))


def backends() -> dict[str, dict[str, str]]:
    """Which kernel each operator runs, by device type.

    Returns:
        ``{operator: {device type: kernel}}``; ``"default"`` stands for every device that is not
        named. The CPU's entry names the instruction set in use.
    """
    kernel = f"C++ ({cpu.instruction_sets()[0]})"
    return {name: {"cpu": kernel, "default": "torch reference"} for name in OP_NAMES}
