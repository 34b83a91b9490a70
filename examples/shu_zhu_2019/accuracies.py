"""Table 1: accuracies of the trained networks."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.setup_measures import column

__all__ = ["DATASETS", "NAME", "SETTINGS", "compute", "draw"]

NAME = "accuracies"
SETTINGS: tuple[str, ...] = ()
DATASETS = ("mnist", "cifar10")
SPLITS = ("train", "valid", "test")


def _accuracy(context: Context, dataset: str, network: str, split: str) -> float:
    """Share of the images whose predicted class is their label, from the pass that scores them."""
    scores = context.scores(dataset, network, split)
    return float((column(scores, "predicted") == column(scores, "label")).mean())


def compute(context: Context, dataset: str) -> Result:
    """Accuracies (0..1) by split, and how the networks were trained."""
    values = {}
    for network in NETWORKS:
        model, notes = context.trained(dataset, network)
        values[network] = {
            "title": context.title(network),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": notes["seconds"],
            "history": notes["history"],
            "accuracy": {split: _accuracy(context, dataset, network, split) for split in SPLITS},
            "images": {split: len(context.images(dataset, split)) for split in SPLITS},
        }
    return Result(values, {})


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """A table needs no figure."""
    return {}
