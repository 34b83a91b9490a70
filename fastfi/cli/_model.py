"""From ``--model package.module:factory`` to a model ready for scoring."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

from fastfi.cli._weights import load_weights
from fastfi.errors import OptionError

__all__ = ["load_model", "parse_device"]


def load_model(
    spec: str, weights: Path | None, device: torch.device, trainable: bool = False
) -> nn.Module:
    """Imports and calls a model factory, loads weights, and puts the model in evaluation mode.

    Args:
        spec: "package.module:factory". The factory (a function or an nn.Module class) is called
            without arguments. The current directory is importable.
        weights: see :func:`~fastfi.cli._weights.load_weights`. None keeps what the factory made.
        device: where the model goes.
        trainable: leave parameters trainable that the factory left so, because they are to be
            perturbed.

    Returns:
        The model, in evaluation mode, its parameters without gradients unless ``trainable``.

    Raises:
        OptionError: nothing to import there, or the factory failed.
        WeightsError: the weights do not fit.
    """
    name, colon, attribute = spec.partition(":")
    if not (name and colon and attribute):
        raise OptionError(f"--model: expected package.module:factory, got {spec!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:  # the module is the user's: importing it can raise anything
        raise OptionError(
            f"--model {spec}: cannot be imported ({type(error).__name__}: {error}); the current "
            f"directory is {here}"
        ) from error
    if not callable(factory):
        raise OptionError(f"--model {spec}: expected a callable, got {type(factory).__name__}")
    try:
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:  # the user's code
        raise OptionError(
            f"--model {spec}: calling it without arguments failed ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"--model {spec}: expected an nn.Module, got {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights)
    if not trainable:
        model.requires_grad_(False)
    return model.eval().to(device)


def parse_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        OptionError: no such device, or torch cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise OptionError(f"--device {name}: torch cannot use it here ({reason})") from error
    return device
