"""Small networks of every kind that users have, by name, for tests of the layers' Gram rules.

``build(name)`` returns a float64 model in evaluation mode and a batch for it. Nothing in it is
degenerate: BatchNorm statistics, affine parameters and biases are random, logits have a standard
deviation of about one to three, and no two weights are equal unless they are tied.
"""

from __future__ import annotations

import zlib

import architectures_odd
import architectures_ops
import architectures_sequence
import architectures_vision
import torch
from torch import Tensor, nn

__all__ = ["AFFINE_HEAD", "BLIND", "BUILDERS", "UNREACHED", "build", "randomise"]

BUILDERS = {
    **architectures_vision.BUILDERS,
    **architectures_sequence.BUILDERS,
    **architectures_odd.BUILDERS,
    **architectures_ops.BUILDERS,
}

# Parameters that never reach the logits, by their full names.
UNREACHED = {
    "unused_layer": ("spare.weight", "spare.bias"),
    "detached": ("side.weight", "side.bias"),
    "uncalled_branch": ("auxiliary.weight", "auxiliary.bias"),
}

# Networks whose autograd gradient is, on purpose, not the derivative of the function: detach(),
# no_grad(), and the padding row of an embedding.
BLIND = {"detached", "partly_without_gradient", "embedding_bag_padding", "embedding_padding"}

# Networks whose output is that of an nn.Linear with a trainable bias, and nothing else.
AFFINE_HEAD = {"mlp", "cnn", "resnet18", "densenet121", "vit", "lstm"}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network of that name in float64 and evaluation mode, and its batch."""
    torch.manual_seed(seed + zlib.crc32(name.encode()) % 100_000)
    model, x = BUILDERS[name]()
    model = model.double()
    randomise(model)
    return model.eval(), x.double() if x.is_floating_point() else x


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Moves what starts at 0 or 1 (biases, affine parameters, statistics) to random numbers."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    for p in model.parameters():
        if p.dim() <= 1:
            p += 0.2 * torch.randn_like(p)
