"""Calling the user's model: one forward pass that ends in a batch of logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastfi._checks import check_finite, check_log_prob_sum, check_prob
from fastfi._process import ProcessSetting
from fastfi.errors import OptionError, OutputError

__all__ = ["OUTPUTS", "check_outputs", "eagerly", "forward", "logits_of"]

OUTPUTS = ("logits", "log_probs", "probs")


# Models that torch.compile compiled run uncompiled in here. K - 1 backward passes go through one
# graph, and a compiled graph is made for one: torch 2.13 refuses the second pass, or, with donated
# buffers switched off, returns wrong gradients from it without an error.
eagerly = ProcessSetting(lambda: torch.compiler.set_stance("force_eager"))


def check_outputs(outputs: str) -> None:
    """OptionError unless ``outputs`` is one of :data:`OUTPUTS`."""
    if outputs not in OUTPUTS:
        raise OptionError(
            f"outputs: expected one of {', '.join(map(repr, OUTPUTS))}, got {outputs!r}"
        )


def logits_of(output: Any) -> Tensor:
    """The tensor in a model's output: itself, or its ``.logits``."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if logits is None else logits
    if not isinstance(logits, Tensor):
        raise OutputError(
            "model: expected a tensor of logits [B, K] or an object with .logits, got "
            f"{type(output).__name__}"
        )
    return logits


def forward(model: Any, x: Tensor, outputs: str) -> Tensor:
    """The model's logits [B, K], K >= 2, with whatever graph autograd is recording.

    A single logit, [B, 1] or [B], is the two-class model with logits (0, z). Probabilities become
    logits by their logarithm.

    Raises:
        OutputError: the model's output is not a batch of class scores.
        NonFiniteError: an output is NaN or infinite, or a probability is 0.
    """
    z = logits_of(model(x.clone()))  # a copy, so that a model may work in place on its input
    batch = x.shape[0]
    if not z.is_floating_point():
        raise OutputError(f"model: expected floating-point {outputs}, got {z.dtype}")
    if z.dim() not in (1, 2) or z.shape[0] != batch:
        raise OutputError(
            f"model: expected {outputs} [{batch}, K] for {batch} samples, got shape {list(z.shape)}"
        )
    if z.dim() == 1 or z.shape[1] == 1:
        if outputs != "logits":
            raise OutputError(
                f"model: expected {outputs} of at least two classes, got shape {list(z.shape)}; "
                "only a single logit stands for a two-class model"
            )
        z = z.reshape(batch, 1)
        z = torch.cat([torch.zeros_like(z), z], 1)
    if z.shape[1] == 0:
        raise OutputError(f"model: expected at least one class, got shape {list(z.shape)}")
    if outputs == "probs":
        check_prob(z)
        return z.log()
    check_finite(z.detach(), "model", outputs.replace("_", "-"))
    if outputs == "log_probs":
        check_log_prob_sum(z)
    return z
