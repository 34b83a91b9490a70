"""What the commands make of their options."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastfi
from fastfi.cli import _options as o
from fastfi.cli._batches import Normalisation, ScoreOptions
from fastfi.cli._model import load_model, parse_device
from fastfi.cli._options import parse_bytes
from fastfi.data import ImageSource, open_dataset

__all__ = ["config_of", "metadata_of", "network_of", "open_data", "score_options"]

# Options that do not decide what is computed; those of the inverse are in its repr.
_NO_CONFIG = ("out", "figures", "overwrite", "show_progress", "show_traceback")
_OF_INVERSE = ("rtol", "eps", "alpha")


def config_of(given: Mapping[str, Any], rule: object, **parsed: Any) -> dict[str, Any]:
    """The options that decide the results, for a file's metadata."""
    config = {k: v for k, v in given.items() if k not in (*_NO_CONFIG, *_OF_INVERSE)}
    budget = given["memory_budget"]
    return {
        **config,
        "weights": None if given["weights"] is None else str(given["weights"]),
        "inverse": repr(rule),
        "memory_budget": None if budget is None else parse_bytes(budget),
        "mean": o.numbers("--mean", given["mean"]),
        "std": o.numbers("--std", given["std"]),
        **parsed,
    }


def score_options(config: Mapping[str, Any], rule: object, *names: str) -> ScoreOptions:
    """``names``: options of the measure that only this command has."""
    shared = ("objective", "outputs", "lump", "memory_budget")
    return ScoreOptions(
        labels=config["labels"],
        influence={"inverse": rule, **{k: config[k] for k in (*shared, *names)}},
        device=parse_device(config["device"]),
        batch_size=config["batch_size"],
        limit=config["limit"],
        normalisation=Normalisation(config["mean"], config["std"]),
    )


def open_data(
    data: Path | Sequence[Path], config: Mapping[str, Any], keep_errors: bool = False
) -> ImageSource:
    """``keep_errors``: images that cannot be read are noted, not raised."""
    keys = ("split", "image_key", "label_key", "layout", "color")
    return open_dataset(data, **{k: config[k] for k in keys}, keep_errors=keep_errors)


def network_of(
    model: str, weights: Path | None, device: torch.device, trainable: bool = False
) -> nn.Module:
    network = load_model(model, weights, device, trainable)
    if weights is None:
        print("fastfi: no --weights: the model is used as its factory made it", file=sys.stderr)
    return network


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "fastfi.version": fastfi.__version__,
        "fastfi.config": config,
        "fastfi.torch": torch.__version__,
    }
