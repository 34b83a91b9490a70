"""Setup 1: FI of the pixels of every training image, for its label (Figures 1 and 2); its rank, its
cost, and the authors' rule on some of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from examples.mnist_layers import FULL
from examples.plots import Panel
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import CLASSES, balanced
from examples.shu_zhu_2019.drawings import image_rows, manhattan_grid
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.setup1_naive import definition, forward_seconds, naive_seconds
from examples.shu_zhu_2019.setup_measures import (
    authors_ranks,
    column,
    finite,
    influence_of,
    median,
    single,
)
from examples.tables import number

__all__ = ["DATASETS", "NAME", "SETTINGS", "compute", "draw"]

NAME = "setup1"
SETTINGS: tuple[str, ...] = ("rule_images", "naive_images")
DATASETS = ("mnist", "cifar10")
SPLITS = ("train", "valid", "test")
TOP = 5
CLOSE = 0.01  # relative

Found = Mapping[tuple[str, str], NDArray[np.float64]]  # columns by (split, name)


def _images_of(
    context: Context, dataset: str, positions: Sequence[int], found: Found
) -> list[dict[str, Any]]:
    """What is said of single training images."""
    fi, predicted = found["train", "fi"], found["train", "predicted"]
    train = context.images(dataset, "train")
    return [
        {
            "position": int(i),
            "row": int(train.rows[i]),
            "label": int(train.y[i]),
            "predicted": int(predicted[i]),
            "fi": finite(fi[i]),
        }
        for i in positions
    ]


def _authors(
    context: Context, dataset: str, network: str, found: Found, top: Sequence[int]
) -> dict[str, Any] | None:
    """The authors' five images in our scores; None where our images are not theirs."""
    ranks = authors_ranks(dataset, "train", found["train", "fi"], ("top5", network))
    if ranks is None:
        return None
    theirs = [each["position"] for each in ranks]
    images = _images_of(context, dataset, theirs, found)
    for image, each in zip(images, ranks, strict=True):
        image["rank"] = each["rank"]
    return {"images": images, "shared": len(set(theirs) & set(top))}


def _rank(context: Context, dataset: str, network: str, at: torch.Tensor) -> dict[str, Any]:
    """Does the closed form hold? Exact FI with its rank decision beside it."""
    train = context.images(dataset, "train")
    exact = influence_of(context, dataset, network, train, at, note="rank")
    closed = influence_of(context, dataset, network, train, at, assume_full_rank=True)
    assert exact.rank is not None
    full, ratio = (exact.rank == FULL).numpy(), (exact.fi / closed.fi).numpy()
    return {
        "images": len(at),
        "full": int(full.sum()),
        "difference": finite(np.abs(ratio[full] - 1).max()) if full.any() else None,
        "lowest_rank": int(exact.rank.min()),
        "smallest_ratio": None if full.all() else finite(ratio[~full].min()),
    }


def _cost(context: Context, dataset: str, network: str) -> dict[str, Any]:
    """Seconds of all scores beside naive autograd's; what the latter says, too."""
    config, train = context.config, context.images(dataset, "train")
    model = context.model(dataset, network)
    at = balanced(train.y, config.naive_images, 10, config.seed)
    naive = naive_seconds(model, train, at, config.device)
    rule = influence_of(context, dataset, network, train, at, inverse="truncated").fi.numpy()
    plain, closed = definition(model, train, at, config.device)
    forward, batch = forward_seconds(model, train, config.device)
    taken = [context.score_seconds(dataset, network, split) for split in SPLITS]
    total = None if any(t is None for t in taken) else sum(t for t in taken if t is not None)
    images = sum(len(context.images(dataset, split)) for split in SPLITS)
    each = float(naive.seconds.mean())
    # Where the rule keeps no singular value, both say 0.
    apart = np.abs(naive.fi - rule) / np.maximum(rule, np.finfo(float).tiny)
    away = np.abs(plain / closed - 1)
    return {
        "images": images,
        "scores": total,
        "scores_each": None if total is None else total / images,
        "forward_each": forward,
        "forward_batch": batch,
        "naive_images": len(at),
        "naive_each": each,
        "naive": each * images,
        "rule_close": int((apart < CLOSE).sum()),
        "rule_apart": median(apart),
        "plain_close": int((away < CLOSE).sum()),
        "plain_away": median(away),
    }


def compute(context: Context, dataset: str) -> Result:
    """Scores of all training and validation images; ranks, rule and cost on some."""
    config = context.config
    train = context.images(dataset, "train")
    at = balanced(train.y, config.rule_images, 10, config.seed)
    values: dict[str, Any] = {
        "classes": list(CLASSES[dataset]),
        "images": {split: len(context.images(dataset, split)) for split in SPLITS},
    }
    arrays: dict[str, NDArray[Any]] = {
        "label": train.y.numpy().astype(np.uint8),
        "valid_label": context.images(dataset, "valid").y.numpy().astype(np.uint8),
        "rule_at": at.numpy().astype(np.int32),
    }
    for network in NETWORKS:
        context.model(dataset, network)  # trained before scoring is timed
        # The test images' time counts, their FI is Setup 3's.
        scores = {split: context.scores(dataset, network, split) for split in SPLITS}
        found = {(s, c): column(scores[s], c) for s in SPLITS for c in ("fi", "predicted")}
        fi, predicted = found["train", "fi"], found["train", "predicted"]
        wrong = predicted != train.y.numpy()
        top = np.argsort(-fi, kind="stable")[:TOP]
        rule = influence_of(
            context, dataset, network, train, at, inverse="truncated", note="the authors' rule"
        ).fi.numpy()
        of_class = [fi[train.y.numpy() == k] for k in range(10)]
        values[network] = {
            "title": context.title(network),
            "median": median(fi),
            "valid_median": median(found["valid", "fi"]),
            "above": int((fi > 1).sum()),
            "above_share": float((fi > 1).mean()),
            "valid_above": int((found["valid", "fi"] > 1).sum()),
            "wrong": int(wrong.sum()),
            "above_and_right": int(((fi > 1) & ~wrong).sum()),
            "class_largest": [finite(f.max()) if len(f) else None for f in of_class],
            "top": _images_of(context, dataset, top.tolist(), found),
            "authors": _authors(context, dataset, network, found, top.tolist()),
            "rank": _rank(context, dataset, network, at),
            "rule": {
                "images": len(at),
                "exact": median(fi[at]),
                "truncated": median(rule),
                "zero": int((rule == 0).sum()),
                "exact_largest": finite(fi[at].max()),
                "truncated_largest": finite(rule.max()),
            },
            "cost": _cost(context, dataset, network),
        }
        arrays[f"{network}_fi"], arrays[f"{network}_wrong"] = single(fi), wrong
        arrays[f"{network}_valid_fi"] = single(found["valid", "fi"])
        arrays[f"{network}_exact"], arrays[f"{network}_truncated"] = single(fi[at]), single(rule)
        arrays[f"{network}_top_images"] = train.x[torch.from_numpy(top)].numpy()
    return Result(values, arrays)


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """Figures 1 and 2."""
    values, arrays = result
    names = CLASSES[dataset]
    panels = [
        [Panel(values[n]["title"], arrays[f"{n}_fi"], arrays["label"], arrays[f"{n}_wrong"],
               "true class")]
        for n in NETWORKS
    ]  # fmt: skip
    rows = []
    for network in NETWORKS:
        captions = [
            f"{names[each['label']]}, says {names[each['predicted']]}\n"
            + ("FI infinite" if each["fi"] is None else f"FI {number(each['fi'])}")
            for each in values[network]["top"]
        ]
        rows.append((values[network]["title"], arrays[f"{network}_top_images"], captions))
    return {"manhattan": manhattan_grid(panels, names), "top": image_rows(rows)}
