"""What a run does: which data sets and networks, how long training is, how many images each part
looks at. Three presets: quick (small networks, minutes on two cores), cpu and gpu (ResNet-50 and
DenseNet-121)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

__all__ = ["DATASETS", "NETWORKS", "PRESETS", "Config", "changed", "configure"]

DATASETS = ("mnist", "cifar10")
NETWORKS = ("ResNet", "DenseNet")


@dataclass(frozen=True)
class Config:
    """All settings of a run; ``--set NAME=VALUE`` changes any of the numbers.

    Attributes:
        data: folder with ``mnist/`` (IDX files) and ``cifar10/`` (Parquet, or torchvision's).
        out: where networks, data of the figures, figures and the report go.
        datasets: of DATASETS.
        preset: the name of the preset, for the report.
        large: ResNet-50 and DenseNet-121, or small networks with the same building blocks.
        device: "cpu", "cuda".
        seed: of the networks' weights and of every sample drawn.
        stem_stride: of the first convolution: 1 as the authors had, or 2 (a quarter of the work).
        sum_dropout: dropout after the sums of ResNet-50's blocks too, as the authors had.
        epochs: passes over the training images; CIFAR-10 takes cifar_factor times as many.
        batch: images in a training step.
        rate: the highest learning rate of the cycle.
        train_images, test_images: how many to use; 0 for all.
        rule_images: images for which the authors' rule and Damped are computed (Setups 1 and 3).
        layer_images: for profiles over the layers (Setup 2.2); layer_rule_images of them under the
            authors' rule.
        outliers: overlapped digits in the training set; a ninth of it again in the validation set.
        outlier_images: ordinary images in that training set; 0 for all.
        outlier_epochs: of training with them, after training without.
        cook_images: outliers, and as many other images, for Cook's influence and Damped.
        map_images: for figures of maps.
        attack_images: for one-pixel attacks.
        bootstrap: resamples behind each interval.
        flipped: share of wrong labels in the experiment with down-weighted images.
        flipped_images, flipped_epochs: its training set, and passes over it (CIFAR-10 as above).
        naive_images: for the time of naive autograd, extrapolated to all.
        checkpoint_seconds: between two checkpoints of training.
    """

    data: Path
    out: Path
    datasets: tuple[str, ...] = DATASETS
    preset: str = "quick"
    large: bool = False
    device: str = "cpu"
    seed: int = 0
    stem_stride: int = 2
    sum_dropout: bool = False
    epochs: int = 3
    cifar_factor: int = 3
    batch: int = 128
    rate: float = 3e-3
    train_images: int = 0
    test_images: int = 0
    rule_images: int = 1_000
    layer_images: int = 300
    layer_rule_images: int = 100
    outliers: int = 2_700
    outlier_images: int = 0
    outlier_epochs: int = 1
    cook_images: int = 300
    map_images: int = 3
    attack_images: int = 100
    bootstrap: int = 1_000
    flipped: float = 0.05
    flipped_images: int = 10_000
    flipped_epochs: int = 5
    naive_images: int = 100
    checkpoint_seconds: float = 120.0


# quick: ten minutes on two cores with both data sets. cpu: the MNIST half in a night on two cores.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "train_images": 4_000,
        "test_images": 2_000,
        "rule_images": 300,
        "layer_images": 100,
        "layer_rule_images": 50,
        "outliers": 270,
        "cook_images": 60,
        "cifar_factor": 2,
        "attack_images": 30,
        "bootstrap": 300,
        "flipped_images": 3_000,
        "flipped_epochs": 4,
        "naive_images": 20,
    },
    "cpu": {
        "large": True,
        "epochs": 4,
        "batch": 64,
        "rate": 1e-3,
        "datasets": ("mnist",),
    },
    "gpu": {
        "large": True,
        "device": "cuda",
        "stem_stride": 1,
        "epochs": 12,
        "rate": 1e-3,
        "rule_images": 10_000,
        "layer_images": 2_000,
        "layer_rule_images": 500,
        "outlier_epochs": 3,
        "cook_images": 2_700,
        "attack_images": 500,
        "flipped_images": 0,
        "flipped_epochs": 10,
    },
}


def configure(
    preset: str,
    data: Path,
    out: Path,
    datasets: Sequence[str] | None = None,
    changes: Sequence[str] = (),
) -> Config:
    """The preset with changes "NAME=VALUE"; ValueError where one has no such name or value."""
    config = replace(Config(data, out, preset=preset), **PRESETS[preset])  # type: ignore[arg-type]
    if datasets:
        config = replace(config, datasets=tuple(dict.fromkeys(datasets)))
    types = {f.name: type(getattr(config, f.name)) for f in fields(config)}
    known = sorted(name for name, kind in types.items() if kind in (int, float, bool, str))
    known.remove("preset")
    for text in changes:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise ValueError(f"expected NAME=VALUE with a name of {', '.join(known)}; got {text!r}")
        config = replace(config, **{name: _parsed(name, types[name], value)})
    return config


def changed(config: Config) -> dict[str, object]:
    """The settings that are not the preset's, but data, out and datasets."""
    usual = replace(Config(config.data, config.out, preset=config.preset), **PRESETS[config.preset])  # type: ignore[arg-type]
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name != "datasets" and getattr(config, f.name) != getattr(usual, f.name)
    }


# The least and the largest value that makes sense; numbers without an entry: at least 1. Where 0
# is allowed it means all images.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31),
    "stem_stride": (1, 2),
    "batch": (2, math.inf),
    "rate": (1e-8, 1),
    "train_images": (0, math.inf),
    "test_images": (0, math.inf),
    "flipped_images": (0, math.inf),
    "outliers": (10, math.inf),
    "outlier_images": (0, math.inf),
    "bootstrap": (20, math.inf),
    "flipped": (0.001, 0.5),
    "checkpoint_seconds": (0, math.inf),
}


def _parsed(name: str, kind: type, value: str) -> object:
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value == "true"
    if name == "device":
        try:
            return str(torch.device(value))
        except RuntimeError:
            raise ValueError(f"device: expected cpu, cuda or cuda:N, got {value!r}") from None
    try:
        parsed = kind(value)
    except ValueError:
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}") from None
    least, most = RANGES.get(name, (1, math.inf))
    if not least <= parsed <= most:
        above = f" and at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name}: expected at least {least:g}{above}, got {value!r}")
    if name == "outliers" and parsed % 10:
        raise ValueError(f"outliers: expected as many of each of ten classes, got {value!r}")
    return parsed
