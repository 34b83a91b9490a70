"""Setup 4 (Figure 6): where in an image FI lies, at four sizes of the window, under three rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019 import setup4_attacks as attacks
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.section import Result

__all__ = ["AUTHORS", "DATASETS", "NAME", "SETTINGS", "choose", "compute", "draw"]

NAME = "setup4"
SETTINGS: tuple[str, ...] = ("map_images", "attack_images")
DATASETS = ("mnist", "cifar10")
SCALES = (1, 3, 5, 7)
RULES = ("truncated", "damped", "exact")
TITLES = {"truncated": "the authors' rule", "damped": "damped", "exact": "exact"}
PROBABILITY, FI = 0.5, 0.6  # of the predicted class: what the authors' scripts ask of an image
ORDINARY = 0.5  # the quantile of P among the correctly classified images that one more is taken at
PANEL = 1.35  # inches
WHOLE = 10_000  # test images: positions are those of the files only where all are used


class Authors(NamedTuple):
    """A test image of the authors' scripts.

    Attributes:
        image: counted from 0, as in the scripts.
        said: what their comments tell of it that agrees with its label.
    """

    image: int
    said: str


# MNIST_*_IF_setup4_rebuttal*.py, MNIST_DenseNet121_IF_setup4.py. One script carries comments of
# another image: labels 1 and 7 and FI = 1.28 beside image 1878, an 8. Those are left out. The
# scripts for CIFAR-10 count in files of another order: their images cannot be looked up.
AUTHORS: dict[tuple[str, str], tuple[Authors, ...]] = {
    ("mnist", "ResNet"): (
        Authors(1878, "an 8 with P = 0.508, FI = 0.968; pixel (16, 12) has 0.968 at scale 1"),
    ),
    ("mnist", "DenseNet"): (Authors(1878, "no number that fits it"),),
}


class Chosen(NamedTuple):
    """The test images whose maps are made.

    Attributes:
        at: [n] int64 positions.
        why: n of "chosen", "authors", "ordinary".
        bound: the least FI under the authors' rule of those chosen.
        eligible: how many of the candidates have more than FI.
    """

    at: Tensor
    why: list[str]
    bound: float | None
    eligible: int


def choose(count: int, candidates: Tensor, fi: Tensor, authors: Tensor, ordinary: Tensor) -> Chosen:
    """The ``count`` candidates [n] of the largest ``fi`` [n], then the authors' images, then an
    ordinary one; none twice."""
    order = fi.argsort(descending=True, stable=True)[:count]
    groups = {"chosen": candidates[order], "authors": authors, "ordinary": ordinary}
    why: dict[int, str] = {}
    for name, group in groups.items():
        for i in group.tolist():
            why.setdefault(i, name)
    return Chosen(
        torch.tensor(list(why), dtype=torch.int64),
        list(why.values()),
        float(fi[order].min()) if len(order) else None,
        int((fi > FI).sum()),
    )


def _described(
    model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Class, probability and FI of each image, for the predicted class."""
    exact = fastfi.influence(model, x, None, full_output=True, dtype=torch.float64)
    rules = {
        name: fastfi.influence(model, x, None, inverse=name, dtype=torch.float64).cpu()
        for name in ("truncated", "damped")
    }
    p = exact.log_prob.exp().cpu()
    return [
        {
            "image": int(rows[i]),
            "label": classes[int(y[i])],
            "predicted": classes[int(exact.label[i])],
            "probability": float(p[i]),
            "exact": float(exact.fi[i]),
            "truncated": float(rules["truncated"][i]),
            "damped": float(rules["damped"][i]),
        }
        for i in range(len(x))
    ]


def _maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By rule, [n, S, H, W] float32 on the CPU: the mean over the channels, as the authors draw."""
    return {
        rule: fastfi.influence_map(
            model, x, scales=SCALES, inverse=rule, channels="mean", dtype=torch.float32
        ).cpu()
        for rule in RULES
    }


def _constancy(maps: Tensor, closed: Tensor, rtol: float) -> list[float]:
    """By scale, the share of the windows whose exact FI is the closed form at full rank."""
    same = (maps / closed[:, None, None, None] - 1).abs() <= rtol
    return [float(share) for share in same.double().mean((0, 2, 3))]


def _possible(size: int, coordinates: int) -> list[float]:
    """By scale, the share of the windows of a size x size image, clipped at its border, that have
    at least so many pixels."""
    at = np.arange(size)
    shares = []
    for scale in SCALES:
        half = scale // 2
        width = np.minimum(at + half, size - 1) - np.maximum(at - half, 0) + 1
        shares.append(float((width[:, None] * width >= coordinates).mean()))
    return shares


def _growing(maps: Tensor) -> bool:
    """Whether every window's FI is at least that of the smaller one inside it."""
    slack = 1e-5 * maps.amax((1, 2, 3), keepdim=True)  # float32 rows
    return bool((maps[:, 1:] >= maps[:, :-1] - slack).all())


def _network(
    context: Context, dataset: str, network: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    c, data = context.config, context.data(dataset)
    model, test = context.model(dataset, network), data.test
    columns = ("id", "label", "predicted", "predicted_log_prob", "predicted_fi")
    table = context.scores(dataset, network, "test").to_table(list(columns)).sort_by("id")
    label, predicted, log_prob, fi = (
        torch.from_numpy(table[name].to_numpy().copy()) for name in columns[1:]
    )
    correct = torch.nonzero(label == predicted).flatten()
    if len(correct) == 0:
        raise ValueError(f"{network}: expected test images that it classifies correctly, got none")
    order = correct[fi[correct].argsort(descending=True, stable=True)]

    # FI under the authors' rule costs backward passes; it is large where P is not.
    unsure = order[log_prob[order].exp() > PROBABILITY][: max(c.map_images, c.attack_images)]
    rule = torch.zeros(0)
    if len(unsure):
        x = test.pixels(unsure).to(c.device)
        rule = fastfi.influence(model, x, None, inverse="truncated", dtype=torch.float64).cpu()
    listed = AUTHORS.get((dataset, network), ()) if len(test) == WHOLE else ()
    ordinary = order[int(ORDINARY * (len(order) - 1))]
    authors = torch.tensor([a.image for a in listed], dtype=torch.int64)
    chosen = choose(c.map_images, unsure, rule, authors, ordinary[None])

    x = test.pixels(chosen.at).to(c.device)
    images = _described(model, x, test.y[chosen.at], test.rows[chosen.at], data.classes)
    said = {a.image: a.said for a in listed}
    for entry, why, at in zip(images, chosen.why, chosen.at.tolist(), strict=True):
        entry |= {"why": why, "said": said.get(at)}
    maps = _maps(model, x)
    closed = torch.tensor([image["exact"] for image in images])
    found, drawn = attacks.compute(model, test, order, c.attack_images, c.seed, c.device)
    values = {
        "title": context.title(network),
        "correct": len(correct),
        "candidates": len(unsure),
        "eligible": chosen.eligible,
        "bound": chosen.bound,
        "images": images,
        "zero_maps": {
            rule: int((m == 0).all(-1).all(-1).all(-1).sum()) for rule, m in maps.items()
        },
        "largest": {rule: [float(v) for v in m.amax((0, 2, 3))] for rule, m in maps.items()},
        "growing": {rule: _growing(m) for rule, m in maps.items()},
        "constant": _constancy(maps["exact"], closed, 1e-3),
        "possible": _possible(x.shape[-1], len(data.classes) - 1),
        "attacks": found,
    }
    arrays = {f"maps_{rule}": m.numpy() for rule, m in maps.items()}
    arrays["images"] = test.x[chosen.at].numpy()
    return values, {f"{network}_{k}": v for k, v in {**arrays, **drawn}.items()}


def compute(context: Context, dataset: str) -> Result:
    """Maps of test images, and one-pixel attacks that they guide."""
    networks, arrays = {}, {}
    for network in NETWORKS:
        networks[network], more = _network(context, dataset, network)
        arrays |= more
    whole = len(context.images(dataset, "test")) == WHOLE
    facts = {"scales": list(SCALES), "probability": PROBABILITY, "fi": FI, "whole": whole}
    facts["classes"] = list(context.data(dataset).classes)
    return Result({**facts, **networks}, arrays)


def _caption(image: dict[str, Any], rule: str) -> str:
    """Below an image, three lines; a fourth where the prediction is wrong."""
    kind = {"chosen": "test", "authors": "authors'", "ordinary": "ordinary"}[image["why"]]
    text = f"{kind} image {image['image']}"
    text += f"\nP({image['predicted']}) = {image['probability']:.3g}\nFI = {image[rule]:.2g}"
    return text + (f"\nis {image['label']}" if image["predicted"] != image["label"] else "")


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """Maps by network and rule, the exact ones at the two smallest scales, and the attacks."""
    figures = {}
    for network in NETWORKS:
        values = result.values[network]
        x = result.arrays[f"{network}_images"].astype(np.float32) / 255
        for rule in RULES:
            count = 2 if rule == "exact" else len(SCALES)
            titles = [_caption(image, rule) for image in values["images"]]
            figures[f"{network.lower()}-{rule}"] = figure = fastfi.plot.influence_map(
                x,
                result.arrays[f"{network}_maps_{rule}"][:, :count],
                scales=SCALES[:count],
                titles=titles,
                title=f"{values['title']}: FI of k x k windows, {TITLES[rule]}",
                overlay=None if rule == "exact" else 1,
                panel=PANEL,
            )
            # The panels are a little narrower than asked for, and so are the rows.
            lines = max(title.count("\n") + 1 for title in titles)
            figure.set_figheight(len(titles) * (PANEL + 0.13 * lines + 0.1) + 0.6)
        attack = attacks.draw(network, result, values["title"], result.values["classes"])
        if attack is not None:
            figures[f"{network.lower()}-attack"] = attack
    return figures
