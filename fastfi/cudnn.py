"""What cuDNN does to a network on a GPU that FI has to know of: TF32, and recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastfi._process import ProcessSetting

__all__ = ["TF32_EPS", "differentiable_rnns", "row_eps"]

# Machine epsilon of TF32's ten bits.
TF32_EPS = 2.0**-10


def _in_tf32() -> tuple[bool, bool]:
    """Whether float32 matrix products, and convolutions, may be made in TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9: once this is set, reading the older names raises
        return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    return bool(matmul.allow_tf32), bool(cudnn.allow_tf32)


def row_eps(model: Any, dtype: torch.dtype, device: torch.device) -> float:
    """Machine epsilon of the precision in which a network computes its gradients.

    Where torch is left as it comes, convolutions of float32 numbers on a GPU are made in TF32, with
    ten bits instead of 23; rows then err by that much, and rank decisions must know.

    Args:
        model: whose convolutions are looked for; anything but an nn.Module may have some.
        dtype: of its input or parameters.
    """
    if device.type == "cuda" and dtype == torch.float32:
        products, convolutions = _in_tf32()
        if products or (convolutions and _may_convolve(model)):
            return TF32_EPS
    return torch.finfo(dtype).eps


def _may_convolve(model: Any) -> bool:
    if not isinstance(model, nn.Module):
        return True
    # A module that convolves by functions holds its weights itself, with three dimensions or more.
    return any(isinstance(m, (_ConvNd, nn.RNNBase)) for m in model.modules()) or any(
        p.dim() >= 3 for p in model.parameters()
    )


@contextmanager
def _disabled() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_without_cudnn = ProcessSetting(_disabled)


def differentiable_rnns(module: Any, device: torch.device) -> AbstractContextManager[None]:
    """Forward passes in here can be differentiated although a recurrent layer is in evaluation
    mode: cuDNN's own recurrent kernels refuse that, torch's do not. Nothing changes for other
    modules, or on other devices. The setting belongs to the process, so threads share it."""
    recurrent = device.type == "cuda" and isinstance(module, nn.Module)
    if not (recurrent and any(isinstance(m, nn.RNNBase) for m in module.modules())):
        return nullcontext()
    return _without_cudnn()
