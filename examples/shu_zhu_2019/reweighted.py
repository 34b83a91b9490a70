"""Beyond the paper: training with influential images weighted down, where some labels are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.curves import compared
from examples.shu_zhu_2019.data import CLASSES, Images, balanced
from examples.shu_zhu_2019.measures import exact_scores, in_batches
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.training import logits, train
from fastfi.plot.layers import COLOURS

__all__ = ["DATASETS", "NAME", "SETTINGS", "compute", "draw", "mislabelled", "paired", "weights"]

NAME = "reweighted"
SETTINGS = ("flipped", "flipped_images", "flipped_epochs", "rule_images", "bootstrap")
DATASETS = ("mnist", "cifar10")
NETWORK = "ResNet"
MOST = 0.05  # the share of the images that counts as the most influential
TRAININGS = ("equal", "weighted", "oracle")

Array = NDArray[Any]


@dataclass(frozen=True)
class Mislabelled:
    """Training images, some with a wrong label.

    Attributes:
        images: with the labels that training sees.
        flipped: [N] bool, whose label is wrong.
    """

    images: Images
    flipped: Tensor


def mislabelled(images: Images, share: float, classes: int, seed: int) -> Mislabelled:
    """Replaces the labels of ``share`` of the images, at least of one, each by one of the others.

    Raises:
        ValueError: ``share`` leaves no image with its label.
    """
    count = max(1, round(share * len(images)))
    if count >= len(images):
        raise ValueError(f"flipped: expected a share below 1 of {len(images)} images, got {share}")
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(len(images), generator=generator)[:count]
    flipped = torch.zeros(len(images), dtype=torch.bool)
    flipped[at] = True
    other = torch.randint(1, classes, (count,), generator=generator)
    y = images.y.clone()
    y[at] = (y[at] + other) % classes
    return Mislabelled(replace(images, y=y), flipped)


def weights(fi: Array) -> Tensor:
    """``1 / (1 + FI)``, P of the given label at full rank: [N] float32 in 0..1.

    With these weights the gradient of the cross-entropy is, at the network that FI was computed
    with, that of 1 - P_y, a loss of at most 1: one wrong label cannot pull harder than that.
    """
    return torch.from_numpy(1 / (1 + fi)).float()


def paired(first: Tensor, second: Tensor) -> dict[str, Any]:
    """McNemar's exact test of two networks on the same images.

    Args:
        first, second: [N] bool, classified correctly.

    Returns:
        How many only the one, only the other has right; the difference of the accuracies, second
        minus first, with a 95 % interval (normal approximation of paired proportions); the
        two-sided p of the binomial test, 1 where the networks agree on all images.
    """
    n = len(first)
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    gain = (won - lost) / n
    # 1.96: of the normal distribution
    half = 1.96 * float(np.sqrt(max(0.0, won + lost - (won - lost) ** 2 / n))) / n
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"lost": lost, "won": won, "gain": gain, "interval": [gain - half, gain + half], "p": p}


def compute(context: Context, dataset: str) -> Result:
    """Three trainings from the same weights, in the same order of the images: ``equal``, all
    weights 1; ``weighted``, by exact FI of the network trained before; ``oracle``, weight 0 for the
    wrong labels. The labels' truth and the test set have no part in the second."""
    config, classes = context.config, len(CLASSES[dataset])
    train_images = context.images(dataset, "train")
    at = balanced(train_images.y, config.flipped_images, classes, config.seed)
    data = mislabelled(train_images.take(at), config.flipped, classes, config.seed)
    flipped = data.flipped.numpy()
    equal, seconds = _trained(context, dataset, "equal", data.images, None)
    out = config.out / "scores" / f"{dataset}-{NETWORK}-flipped"
    fi, predicted = exact_scores(equal, data.images, out, config.device)
    weight = weights(fi)
    test = context.images(dataset, "test")
    right = {"equal": _right(equal, test, config.device)}
    taken = {"equal": seconds}
    for name, of in (("weighted", weight), ("oracle", (~data.flipped).float())):
        model, taken[name] = _trained(context, dataset, name, data.images, of)
        right[name] = _right(model, test, config.device)
    most = np.argsort(-fi, kind="stable")[: max(1, round(MOST * len(fi)))]
    hits = int(flipped[most].sum())
    true_y = train_images.y[at].numpy()
    values: dict[str, Any] = {
        "title": context.title(NETWORK),
        "images": len(fi),
        "flipped": int(flipped.sum()),
        "share": config.flipped,
        "epochs": context.epochs(dataset, config.flipped_epochs),
        "test_images": len(test),
        "resamples": config.bootstrap,
        "accuracy": {name: float(r.double().mean()) for name, r in right.items()},
        "error": {name: _standard_error(r) for name, r in right.items()},
        "seconds": taken,
        "weighted": paired(right["equal"], right["weighted"]),
        "oracle": paired(right["equal"], right["oracle"]),
        # Of the network with equal weights, on the flipped images: what it has learnt of them.
        "memorised": float((predicted == data.images.y.numpy())[flipped].mean()),
        "seen_through": float((predicted == true_y)[flipped].mean()),
        "clean_right": float((predicted == true_y)[~flipped].mean()),
        "weight": {
            "clean": float(weight[~data.flipped].mean()),
            "flipped": float(weight[data.flipped].mean()),
        },
        "median": {
            "clean": float(np.median(fi[~flipped])),
            "flipped": float(np.median(fi[flipped])),
        },
        "most": {
            "images": len(most),
            "hits": hits,
            "precision": hits / len(most),
            "recall": hits / int(flipped.sum()),
        },
        "all": compared(
            {"exact": fi}, flipped, reference="exact", resamples=config.bootstrap, seed=config.seed
        ),
        "subset": _subset(context, equal, data, fi),
    }
    return Result(values, {"fi": fi.astype(np.float32), "flipped": flipped.astype(np.uint8)})


def _trained(
    context: Context, dataset: str, name: str, images: Images, weight: Tensor | None
) -> tuple[nn.Module, float]:
    """One of TRAININGS, and its seconds."""
    config = context.config
    model = context.new_model(dataset, NETWORK)
    notes = train(
        model,
        images,
        None,
        replace(context.plan(dataset), epochs=context.epochs(dataset, config.flipped_epochs)),
        context.weights(f"{dataset}-{NETWORK}-flipped-{name}"),
        device=config.device,
        weight=weight,
        # Labels do not show in the settings otherwise.
        label=f"{context.label(dataset, NETWORK)}, {config.flipped:g} flipped, {name}",
    )
    return model, float(notes["seconds"])


def _right(model: nn.Module, images: Images, device: str) -> Tensor:
    return logits(model, images, device).argmax(1) == images.y  # [N] bool


def _standard_error(right: Tensor) -> float:
    p = float(right.double().mean())
    return float(np.sqrt(p * (1 - p) / len(right)))


def _subset(context: Context, model: nn.Module, data: Mislabelled, fi: Array) -> dict[str, Any]:
    """Exact and Damped FI for finding wrong labels, on half wrong ones and half others, which count
    for as many as they stand for."""
    config = context.config
    generator = torch.Generator().manual_seed(config.seed + 1)
    chosen, weight = [], []
    for kind in (data.flipped, ~data.flipped):
        own = torch.nonzero(kind).flatten()
        few = own[torch.randperm(len(own), generator=generator)][: max(1, config.rule_images // 2)]
        chosen.append(few)
        weight.append(np.full(len(few), len(own) / len(few)))
    at = torch.cat(chosen)

    def damped(x: Tensor, y: Tensor) -> Tensor:
        return fastfi.influence(model, x, y, inverse="damped", dtype=torch.float64)

    score, _ = in_batches(damped, data.images.take(at), config.device)
    return compared(
        {"exact": fi[at.numpy()], "damped": score},
        data.flipped[at].numpy(),
        np.concatenate(weight),
        reference="exact",
        resamples=config.bootstrap,
        seed=config.seed,
    )


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """``scores``: distributions of FI of clean and of wrong labels."""
    fi, flipped = result.arrays["fi"].astype(np.float64), result.arrays["flipped"].astype(bool)
    floor = fi[fi > 0].min() if (fi > 0).any() else 1.0
    drawn = np.log10(np.maximum(fi, floor))
    edges = np.linspace(drawn.min(), max(drawn.max(), drawn.min() + 1), 61)
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    axes = figure.subplots()
    for kind, colour, text in (
        (~flipped, COLOURS[0], "label unchanged"),
        (flipped, COLOURS[5], "label replaced by a wrong one"),
    ):
        count = np.histogram(drawn[kind], edges)[0]
        share = 100 * count / kind.sum()
        axes.stairs(share, 10**edges, color=colour, lw=1.6)
        label = f"{text}: {int(kind.sum()):,} images"
        axes.stairs(share, 10**edges, color=colour, fill=True, alpha=0.3, label=label)
    cut = np.sort(fi)[::-1][result.values["most"]["images"] - 1]
    axes.axvline(cut, color="0.25", lw=1.0, ls=(0, (5, 3)))
    axes.text(
        cut, 1.02, f"most influential {100 * MOST:g} %", fontsize=9, color="0.25", ha="center",
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("first-order influence FI of the pixels, for the given label")
    axes.set_ylabel("images of the kind (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return {"scores": figure}
