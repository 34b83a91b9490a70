"""Setup 3: FI of the pixels for the predicted class, training set against test set (Figure 5 and
Table 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

import fastfi
from examples.plots import Panel
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import CLASSES, balanced
from examples.shu_zhu_2019.drawings import manhattan_grid
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.setup_measures import authors_ranks, column, influence_of, single

__all__ = ["DATASETS", "NAME", "PERCENTILES", "SETTINGS", "compute", "draw", "table"]

NAME = "setup3"
SETTINGS: tuple[str, ...] = ("rule_images",)
DATASETS = ("mnist", "cifar10")
SPLITS = ("train", "valid", "test")
PERCENTILES = (75, 80, 85, 90, 95, 98, 99, 100)
JUDGED = PERCENTILES[:-1]  # the largest value of a set grows with its size
SETS = {"train": ("train",), "files": ("train", "valid"), "test": ("test",)}


def table(fi: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float]]:
    """Percentiles of each set, linearly interpolated; JSON has strings for keys."""
    found = {name: np.percentile(values, PERCENTILES).tolist() for name, values in fi.items()}
    return {
        name: {str(q): v for q, v in zip(PERCENTILES, values, strict=True)}
        for name, values in found.items()
    }


def _not_above(high: Mapping[str, float], low: Mapping[str, float]) -> list[int]:
    """The percentiles of JUDGED at which ``high`` is not above ``low``."""
    return [q for q in JUDGED if not high[str(q)] > low[str(q)]]


def _apart(
    test: NDArray[np.float64], train: NDArray[np.float64], scores: Mapping[str, fastfi.Scores]
) -> dict[str, float]:
    """Is FI of a test image larger than that of a training image?"""
    found = mannwhitneyu(test, train, alternative="greater")
    both = fastfi.compare(scores["test"], scores["train"], "predicted_fi")
    return {
        # A tie counts one half.
        "larger": float(found.statistic) / (len(test) * len(train)),
        "p": float(found.pvalue),
        "ks": both.ks,
        "ks_p": both.p_value,
    }


def compute(context: Context, dataset: str) -> Result:
    """Percentiles under the definition and under the authors' rule, and the orderings."""
    config = context.config
    images = {split: context.images(dataset, split) for split in SPLITS}
    some = {
        split: balanced(images[split].y, config.rule_images, 10, config.seed)
        for split in ("train", "test")
    }
    values: dict[str, Any] = {"images": {split: len(images[split]) for split in SPLITS}}
    arrays: dict[str, NDArray[Any]] = {
        f"{split}_label": images[split].y.numpy().astype(np.uint8) for split in SPLITS
    }
    for network in NETWORKS:
        scores = {split: context.scores(dataset, network, split) for split in SPLITS}
        fi = {split: column(scores[split], "predicted_fi") for split in SPLITS}
        wrong = {
            split: column(scores[split], "predicted") != images[split].y.numpy() for split in SPLITS
        }
        rule = {
            split: influence_of(
                context, dataset, network, images[split], at, predicted=True, inverse="truncated",
                note="the authors' rule",
            ).fi.numpy()
            for split, at in some.items()
        }  # fmt: skip
        exact = table({name: np.concatenate([fi[s] for s in of]) for name, of in SETS.items()})
        truncated = table(rule)
        values[network] = {
            "title": context.title(network),
            "accuracy": {split: float(1 - wrong[split].mean()) for split in SPLITS},
            "exact": exact,
            "largest": {split: float(fi[split].max()) for split in ("train", "test")},
            "authors": {
                split: authors_ranks(dataset, split, fi[split], ("setup3_top", split, network))
                for split in ("train", "test")
            },
            "apart": _apart(fi["test"], fi["train"], scores),
            "not_above": _not_above(exact["test"], exact["train"]),
            "rule": {
                "images": {split: len(at) for split, at in some.items()},
                "truncated": truncated,
                "exact": table({split: fi[split][at] for split, at in some.items()}),
                "zero": {split: float((v == 0).mean()) for split, v in rule.items()},
                "not_above": _not_above(truncated["test"], truncated["train"]),
            },
        }
        for split in SPLITS:
            arrays[f"{network}_{split}_fi"] = single(fi[split])
            arrays[f"{network}_{split}_wrong"] = wrong[split]
    values["networks"] = _between(values)
    return Result(values, arrays)


def _between(values: Mapping[str, Any]) -> dict[str, Any]:
    """Does the network with the higher accuracy on a set have the lower FI there?"""
    first, second = NETWORKS
    found: dict[str, Any] = {}
    for split in ("train", "test"):
        a, b = (values[n]["accuracy"][split] for n in NETWORKS)
        if a == b:
            found[split] = {"better": None, "not_below": []}
            continue
        better, other = (first, second) if a > b else (second, first)
        not_below = _not_above(values[other]["exact"][split], values[better]["exact"][split])
        found[split] = {"better": better, "not_below": not_below}
    return found


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """Figure 5: a row for each network, training set beside test set."""
    values, arrays = result
    sets = {"train": "training", "test": "test"}
    rows = [
        [
            Panel(
                f"{values[n]['title']}, {word} set", arrays[f"{n}_{split}_fi"],
                arrays[f"{split}_label"], arrays[f"{n}_{split}_wrong"], "true class",
            )
            for split, word in sets.items()
        ]
        for n in NETWORKS
    ]  # fmt: skip
    return {"manhattan": manhattan_grid(rows, CLASSES[dataset])}
