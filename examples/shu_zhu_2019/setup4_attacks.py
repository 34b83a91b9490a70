"""One-pixel attacks (Figure 7): how often does the prediction follow the pixel that a map marks?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.data import Images
from examples.shu_zhu_2019.section import Result
from fastfi.attack import OnePixel, one_pixel

__all__ = ["DRAWS", "METHODS", "Outcome", "compute", "draw", "gradient", "summary", "wilson"]

RULES = ("truncated", "damped", "exact")
METHODS = (*RULES, "gradient", "random")
DRAWS = 5  # of the random pixel
STEPS = 16  # 0, 17, ..., 255: whole numbers, both ends among them
PIXELS = (0.0, 255.0)
Z = 1.959964  # two-sided 95 %
SHOWN = 4  # columns of the figure


class Outcome(NamedTuple):
    """Attacks on n images.

    Attributes:
        changed: [n] bool, the prediction changed; False where the map marks no pixel.
        fall: [n] float64, of log P of the class predicted before; 0 where it marks none.
        marked: [n] bool, the map is not zero everywhere.
    """

    changed: Tensor
    fall: Tensor
    marked: Tensor


def wilson(share: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share of ``count`` independent images."""
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"expected a share in 0..1 of at least 1 image, got {share} of {count}")
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """|d cross-entropy of the predicted class / d pixel|, summed over channels: [B, H, W]."""
    x = x.clone().requires_grad_()
    z = model(x).double()  # 1 - P_y of confident images needs it
    loss = nn.functional.cross_entropy(z, z.argmax(1), reduction="sum")
    return torch.autograd.grad(loss, x)[0].abs().sum(1)


def choices(model: nn.Module, x: Tensor, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Scores [B, H, W] of the pixels by method; more than one where the method draws them."""
    scores = {
        rule: [
            fastfi.influence_map(
                model, x, scales=(1,), inverse=rule, channels="mean", dtype=torch.float64
            )[:, 0]
        ]
        for rule in RULES
    }
    scores["gradient"] = [gradient(model, x)]
    shape = len(x), *x.shape[2:]
    scores["random"] = [torch.rand(shape, generator=generator) for _ in range(DRAWS)]
    return scores


def outcome(result: OnePixel, scores: Tensor) -> Outcome:
    """What an attack by ``scores`` [n, H, W] came to. Scores that are zero everywhere name no
    pixel: such an image counts as not changed."""
    marked = (scores > 0).flatten(1).any(1).cpu()
    fall = (result.log_prob_before - result.log_prob_after).cpu()
    return Outcome(result.success.cpu() & marked, torch.where(marked, fall, 0.0), marked)


def mean_interval(each: Tensor) -> list[float] | None:
    """Student's 95 % interval of the mean of values [n] of independent images; None of one."""
    count = len(each)
    if count < 2:
        return None
    half = float(student.ppf(0.975, count - 1)) * float(each.std()) / math.sqrt(count)
    return [float(each.mean()) - half, float(each.mean()) + half]


def summary(draws: Sequence[Outcome], chance: Sequence[Outcome]) -> dict[str, Any]:
    """Rates over images and draws. The interval counts images, not draws: the draws of one image
    depend on each other.

    Args:
        chance: draws of random pixels on the same images. The means over draws are compared within
            images: "lift", how much more often the prediction changed, and "gain", how much
            further log P fell, with intervals of these means.
    """
    count = len(draws[0].changed)
    changed, by_chance = (
        torch.stack([d.changed for d in some]).double() for some in (draws, chance)
    )
    fall = torch.stack([d.fall for d in draws])  # [draws, n]
    rate = float(changed.mean())
    lift = changed.mean(0) - by_chance.mean(0)  # [n]
    gain = fall.mean(0) - torch.stack([d.fall for d in chance]).mean(0)  # [n]
    return {
        "images": count,
        "draws": len(draws),
        "changed": rate,
        "interval": wilson(rate, count),
        "marked": int(draws[0].marked.sum()),
        "fall_mean": float(fall.mean()),
        "fall_median": float(fall.median()),
        "lift": float(lift.mean()),
        "lift_interval": mean_interval(lift),
        "gain": float(gain.mean()),
        "gain_interval": mean_interval(gain),
    }


def _joined(parts: list[tuple[OnePixel, Tensor]]) -> tuple[OnePixel, Tensor]:
    fields = zip(*(result for result, _ in parts), strict=True)
    return OnePixel(*(torch.cat([f.cpu() for f in field]) for field in fields)), torch.cat(
        [scores.cpu() for _, scores in parts]
    )


def _attacked(
    model: nn.Module, images: Images, at: Tensor, seed: int, device: str
) -> dict[str, list[tuple[OnePixel, Tensor]]]:
    """By method, one result for each draw, with the scores that chose the pixel."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[list[tuple[OnePixel, Tensor]]]] = {name: [] for name in METHODS}
    for some in at.split(500):
        x = images.pixels(some).to(device)
        for name, draws in choices(model, x, generator).items():
            parts[name].append(
                [
                    (one_pixel(model, x, None, scores, bounds=PIXELS, steps=STEPS), scores)
                    for scores in draws
                ]
            )
    return {
        name: [_joined(list(draw)) for draw in zip(*batches, strict=True)]
        for name, batches in parts.items()
    }


def compute(
    model: nn.Module, images: Images, order: Tensor, count: int, seed: int, device: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Attacks on the images of the largest FI and on random ones.

    Args:
        order: positions of the correctly classified images, by descending FI.
        count: images in each group.
        seed: of the random images and pixels.

    Returns:
        Rates by group and method, and for the figure what the authors' rule did to the images of
        the largest FI that follow it: those whose prediction changed, by FI, then the others by
        how far log P fell.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = {
        "highest": order[:count],
        "random": order[torch.randperm(len(order), generator=generator)[:count]],
    }
    values: dict[str, Any] = {"steps": STEPS, "draws": DRAWS}
    arrays: dict[str, NDArray[Any]] = {}
    for group, at in groups.items():
        attacked = _attacked(model, images, at, seed, device)
        outcomes = {name: [outcome(*r) for r in draws] for name, draws in attacked.items()}
        chance = outcomes["random"]
        values[group] = {name: summary(draws, chance) for name, draws in outcomes.items()}
        values[group]["probability"] = [
            float(p) for p in attacked["random"][0][0].log_prob_before.exp().aminmax()
        ]
        if group == "highest":
            arrays = _drawn(images, at, *attacked["truncated"][0])
    return values, arrays


def _drawn(images: Images, at: Tensor, result: OnePixel, maps: Tensor) -> dict[str, NDArray[Any]]:
    """The figure's columns: images, what the attack did to them, maps, by the name of OnePixel's
    field or "before", "map", "rows"."""
    done = outcome(result, maps)
    changed = torch.nonzero(done.changed).flatten()
    rest = torch.nonzero(~done.changed & done.marked).flatten()
    rest = rest[done.fall[rest].argsort(descending=True, stable=True)]
    shown = torch.cat([changed, rest])[:SHOWN]
    fields = {name: getattr(result, name)[shown] for name in OnePixel._fields if name != "x"}
    fields |= {
        "x": result.x[shown].round().byte(),
        "before": images.x[at[shown]],
        "map": maps[shown].float(),
        "rows": images.rows[at[shown]],
    }
    return {f"attack_{name}": value.numpy() for name, value in fields.items()}


def draw(network: str, result: Result, title: str, classes: Sequence[str]) -> Figure | None:
    """Images, maps of the authors' rule, attacked images; None where no map marks a pixel."""
    arrays = {
        name: torch.from_numpy(np.asarray(result.arrays[f"{network}_attack_{name}"]))
        for name in (*OnePixel._fields, "before", "map", "rows")
    }
    if len(arrays["rows"]) == 0:
        return None
    done = OnePixel(*(arrays[name] for name in OnePixel._fields))
    return fastfi.plot.attack(
        arrays["before"] / 255,
        done._replace(x=done.x / 255),
        maps=arrays["map"],
        classes=list(classes),
        titles=[f"test image {row}" for row in arrays["rows"].tolist()],
        title=f"{title}: the pixel of the largest FI under the authors' rule",
        panel=2.0,
    )
