"""Section 3.1, Figure 3: does FI find overlapped digits among ordinary ones, and better than the
Jacobian norm and Cook's local influence?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.config import NETWORKS, Config
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.curves import compared, curve_points
from examples.shu_zhu_2019.data import CLASSES, Images, balanced
from examples.shu_zhu_2019.measures import exact_scores, in_batches, stands_for
from examples.shu_zhu_2019.outlier_figures import draw
from examples.shu_zhu_2019.overlapped import SHIFT, overlap
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.setup_measures import column
from examples.shu_zhu_2019.training import accuracy, train

__all__ = ["DATASETS", "NAME", "SETTINGS", "compute", "draw"]

NAME = "outliers"
SETTINGS = (
    "outliers", "outlier_images", "outlier_epochs", "rule_images", "cook_images", "bootstrap",
)  # fmt: skip
DATASETS = ("mnist",)
SHOWN = 7  # outliers in a row of the figure
SLOWER = 0.5  # the learning rate with outliers, relative to that without

Array = NDArray[Any]
Measure = Callable[[Tensor, Tensor], Tensor]


def _measures(model: nn.Module, exhausted: list[int]) -> dict[str, Measure]:
    """Every measure but exact FI; ``exhausted`` gets the number of images of each batch for which
    Cook's influence did not converge. That runs on a float64 copy of the network: in float32 the
    Hessian of images that are misclassified with confidence loses all its digits."""
    double = copy.deepcopy(model).double()

    def rule(inverse: fastfi.Truncated | fastfi.Damped) -> Measure:
        return lambda x, y: fastfi.influence(model, x, y, inverse=inverse, dtype=torch.float64)

    def cook(x: Tensor, y: Tensor) -> Tensor:
        found = fastfi.baselines.max_cook_influence(
            double, x.double(), y, full_output=True, dtype=torch.float64
        )
        exhausted.append(int((~found.converged).sum()))
        return found.influence

    return {
        "truncated": rule(fastfi.Truncated(1e-3)),
        "truncated_small": rule(fastfi.Truncated(1e-8)),
        "damped": rule(fastfi.Damped()),
        "jacobian": lambda x, y: fastfi.baselines.jacobian_norm(model, x, y, dtype=torch.float64),
        "cook": cook,
    }


def _joined(a: Images, b: Images) -> Images:
    return Images(torch.cat([a.x, b.x]), torch.cat([a.y, b.y]), torch.cat([a.rows, b.rows]))


def _retrained(
    context: Context, dataset: str, network: str, every: Images, extra_valid: Images
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the trained network after more training, now with outliers."""
    config = context.config
    model = copy.deepcopy(context.model(dataset, network))
    plan = context.plan(dataset)
    notes = train(
        model,
        every,
        _joined(context.images(dataset, "valid"), extra_valid),
        replace(plan, epochs=config.outlier_epochs, rate=SLOWER * plan.rate),
        context.weights(f"{dataset}-{network}-outliers"),
        device=config.device,
        # Where it starts from is a setting, too.
        label=f"{context.label(dataset, network)} after {plan.epochs} epochs, with outliers",
    )
    return model, notes


def _chosen(train_y: Tensor, extra_y: Tensor, count: int, seed: int) -> tuple[Tensor, Array]:
    """Ordinary images and outliers, ``count`` each at most: positions among all, and how many
    images each stands for. A smaller count chooses some of a larger one's."""
    ordinary = balanced(train_y, count, len(CLASSES["mnist"]), seed)
    outliers = balanced(extra_y, count, len(CLASSES["mnist"]), seed)
    weight = np.r_[stands_for(train_y, ordinary), stands_for(extra_y, outliers)]
    return torch.cat([ordinary, outliers + len(train_y)]), weight


def _everywhere(config: Config) -> bool:
    """Whether a backward pass for every image is affordable."""
    return not config.large or config.device.startswith("cuda")


def compute(context: Context, dataset: str) -> Result:
    """Overlapped digits are made, the networks go on training with them, and measures of every
    image and outlier are compared.

    Values by network: ``whole`` (exact FI of all images, and the Jacobian norm where that is
    affordable), ``sample`` (both on ``rule_images`` of each kind, else None), ``subset`` (all
    measures on ``cook_images`` of each kind), each as :func:`curves.compared` has it; ``before``:
    as ``whole``, for the networks that never saw an outlier.
    """
    config, images = context.config, context.images(dataset, "train")
    classes = len(CLASSES[dataset])
    at = balanced(images.y, config.outlier_images, classes, config.seed)
    ordinary = images.take(at)
    correct = torch.ones(len(ordinary), dtype=torch.bool)
    for network in NETWORKS:
        predicted = column(context.scores(dataset, network, "train"), "predicted")
        correct &= torch.from_numpy(predicted)[at] == ordinary.y
    each = max(1, config.outliers // classes)
    extra, extra_valid = overlap(ordinary, correct, each, config.seed)
    values: dict[str, Any] = {
        "each": each,
        "outliers": len(extra),
        "valid_outliers": len(extra_valid),
        "ordinary": len(ordinary),
        "available": len(images),
        "shift": SHIFT,
        "epochs": config.outlier_epochs,
        "rate": SLOWER * config.rate,
        "resamples": config.bootstrap,
        "everywhere": _everywhere(config),
        "networks": {},
    }
    arrays: dict[str, Array] = {}
    for network in NETWORKS:
        found, kept = _network(context, dataset, network, at, extra, extra_valid)
        values["networks"][network] = found
        arrays |= {f"{network}_{name}": array for name, array in kept.items()}
    return Result(values, arrays)


def _network(
    context: Context,
    dataset: str,
    network: str,
    at: Tensor,
    extra: Images,
    extra_valid: Images,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Values and arrays of one network; ``at``: the positions of the ordinary images."""
    config, ordinary = context.config, context.images(dataset, "train").take(at)
    every = _joined(ordinary, extra)
    test, device, seed = context.images(dataset, "test"), config.device, config.seed
    model, notes = _retrained(context, dataset, network, every, extra_valid)
    out = config.out / "scores" / f"{dataset}-{network}-outliers"
    exact, predicted = exact_scores(model, every, out, device)
    exhausted: list[int] = []
    measures = _measures(model, exhausted)
    outlier = np.arange(len(every)) >= len(ordinary)
    right = predicted == every.y.numpy()

    def both(chosen: Tensor) -> dict[str, Array]:
        jacobian, _ = in_batches(measures["jacobian"], every.take(chosen), device)
        return {"exact": exact[chosen.numpy()], "jacobian": jacobian}

    everything = torch.arange(len(every))
    some, weight = _chosen(ordinary.y, extra.y, config.rule_images, seed)
    if _everywhere(config):
        whole, sample = both(everything), None
    else:
        whole, sample = {"exact": exact}, both(some)
    few, few_weight = _chosen(ordinary.y, extra.y, config.cook_images, seed)
    images, subset, seconds = every.take(few), {"exact": exact[few.numpy()]}, {}
    for name, measure in measures.items():
        subset[name], seconds[name] = in_batches(measure, images, device)
    sets: dict[str, tuple[dict[str, Array], Array, Array | None] | None] = {
        "whole": (whole, outlier, None),
        "sample": None if sample is None else (sample, outlier[some.numpy()], weight),
        "subset": (subset, outlier[few.numpy()], few_weight),
        "before": ({"exact": _before(context, dataset, network, at, extra)}, outlier, None),
    }
    found: dict[str, Any] = {
        "title": context.title(network),
        "seconds": notes["seconds"],
        "history": notes["history"],
        "accuracy": {
            "ordinary": float(right[~outlier].mean()),
            "outliers": float(right[outlier].mean()),
            "test": accuracy(model, test, device),
            "test_before": accuracy(context.model(dataset, network), test, device),
        },
        "median": {
            "ordinary": float(np.median(exact[~outlier])),
            "outliers": float(np.median(exact[outlier])),
        },
        "zero": {name: float((scores == 0).mean()) for name, scores in subset.items()},
        "not_converged": sum(exhausted),
        "milliseconds": {name: 1e3 * s / len(few) for name, s in seconds.items()},
    }
    arrays: dict[str, Array] = {}
    for name, chosen in sets.items():
        if chosen is None:
            found[name] = None
            continue
        scores, kind, weights = chosen
        found[name] = compared(
            scores, kind, weights, reference="exact", resamples=config.bootstrap, seed=seed
        )
        for measure_name, score in scores.items():
            roc, precision = curve_points(score, kind, weights)
            arrays[f"{name}_{measure_name}_roc"] = roc
            arrays[f"{name}_{measure_name}_precision"] = precision
    shown = _shown(exact[outlier])
    found["shown"] = [
        {
            "label": int(extra.y[i]),
            "predicted": int(predicted[len(ordinary) + i]),
            "fi": float(exact[len(ordinary) + i]),
        }
        for i in shown
    ]
    arrays["shown"] = extra.x[shown, 0].numpy()
    return found, arrays


def _before(context: Context, dataset: str, network: str, at: Tensor, extra: Images) -> Array:
    """Exact FI of the ordinary images and of the outliers by the network trained without them."""
    model = context.model(dataset, network)

    def exact(x: Tensor, y: Tensor) -> Tensor:
        return fastfi.influence(model, x, y, assume_full_rank=True, dtype=torch.float64)

    known = column(context.scores(dataset, network, "train"), "fi")
    fresh, _ = in_batches(exact, extra, context.config.device)
    return np.r_[known[at.numpy()], fresh]


def _shown(fi: Array) -> list[int]:
    """Outliers for a figure, from the most to the least influential: [SHOWN] positions."""
    order = np.argsort(-fi, kind="stable")
    return [int(order[i]) for i in np.linspace(0, len(fi) - 1, SHOWN).round().astype(int)]
