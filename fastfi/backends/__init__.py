"""Implementations of the operators of :mod:`fastfi._ops`, and the one place that registers them."""

from __future__ import annotations

from importlib import import_module

import torch

from fastfi._ops import OP_NAMES
from fastfi.backends import choose, cpu, cpu_layers

__all__ = ["backends"]

for _name in OP_NAMES:
    # What serves every device that has no kernel of its own.
    _default = getattr(import_module(choose.TORCH[_name].module), _name)
    torch.library.impl(f"fastfi::{_name}", "default")(_default)
    _kernel = getattr(cpu if hasattr(cpu, _name) else cpu_layers, _name)
    torch.library.register_kernel(f"fastfi::{_name}", "cpu", _kernel)
choose.register()


def backends() -> dict[str, dict[str, str]]:
    """Which kernel each operator runs, by device type.

    Returns:
        ``{operator: {device type: kernel}}``; ``"default"`` stands for every device that is not
        named. The CPU's entry names the instruction set in use. ``"cuda"`` tells of the current
        GPU, or, where torch sees none, of what one of capability 8.0 or later would run.

    Raises:
        ValueError: FASTFI_GPU_KERNELS asks for what there is not.
        ImportError: the compiled CUDA module is broken.
    """
    kernel, cuda = f"C++ ({cpu.instruction_sets()[0]})", choose.descriptions()
    return {
        name: {"cpu": kernel, "cuda": cuda[name], "default": choose.TORCH[name].description}
        for name in OP_NAMES
    }
