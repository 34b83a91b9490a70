"""Setup 2: FI of the networks' parameters, all together (2.1) and layer by layer (2.2), for the
labels of training images (Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfi
from examples.mnist_layers import FULL, groups, kinds_of
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import balanced
from examples.shu_zhu_2019.drawings import layer_panels, rules_scatter
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.setup_measures import column, finite, influence_of, median, single

__all__ = ["DATASETS", "NAME", "SETTINGS", "compute", "draw"]

NAME = "setup2"
SETTINGS: tuple[str, ...] = ("rule_images", "layer_images", "layer_rule_images")
DATASETS = ("mnist", "cifar10")
RULES = ("exact", "damped", "truncated")
TOP = 5
BATCH = 50  # images between two looks at the clock
DRAWN = 300  # images in a figure


def _all_parameters(
    context: Context, dataset: str, network: str, input_fi: NDArray[np.float64], some: Tensor
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Setup 2.1: the definition beside Setup 1's FI, and the two rules on fewer images.

    Args:
        input_fi: [N] of all training images.
        some: positions for the rules.
    """
    config, train = context.config, context.images(dataset, "train")
    at = balanced(train.y, config.rule_images, 10, config.seed)
    exact = influence_of(context, dataset, network, train, at, wrt="params")
    fi = {"exact": input_fi[some]}
    for rule in RULES[1:]:
        found = influence_of(
            context, dataset, network, train, some, wrt="params", inverse=rule, batch=BATCH,
            note=f"all parameters, {rule}",
        )  # fmt: skip
        fi[rule] = found.fi.numpy()
    values = {
        "images": len(at),
        "proved": "params" in exact.closed_form,
        "difference": finite(np.abs(exact.fi.numpy() / input_fi[at] - 1).max()),
        "rule_images": len(some),
        "median": {rule: median(v) for rule, v in fi.items()},
        "largest": {rule: finite(v.max()) for rule, v in fi.items()},
        "share": {rule: median(fi[rule] / fi["exact"]) for rule in RULES[1:]},
        "zero": int((fi["truncated"] == 0).sum()),
    }
    return values, {f"{network}_all_{rule}": single(v) for rule, v in fi.items()}


def _profiles(
    context: Context, dataset: str, network: str, at: Mapping[str, Tensor]
) -> dict[str, fastfi.Influence]:
    """FI [n, L] under each rule, of its own images."""
    train = context.images(dataset, "train")
    return {
        rule: influence_of(
            context, dataset, network, train, at[rule], wrt="layers", inverse=rule, batch=BATCH,
            note=f"layers, {rule}",
        )
        for rule in RULES
    }  # fmt: skip


def _ranks(exact: fastfi.Influence, closed: NDArray[np.float64]) -> dict[str, Any]:
    """How many (image, layer) pairs have full rank, and FI over the closed form there and
    elsewhere.

    Args:
        closed: [n], the closed form of each image.
    """
    assert exact.rank is not None
    full, share = (exact.rank == FULL).numpy(), exact.fi.numpy() / closed[:, None]
    rest = share[~full]
    return {
        "pairs": full.size,
        "full": int(full.sum()),
        "layers_full": int(full.all(0).sum()),
        "difference": finite(np.abs(share[full] - 1).max()) if full.any() else None,
        "rest_smallest": finite(rest.min()) if rest.size else None,
        "rest_median": median(rest),
    }


def _table(
    model: nn.Module, found: Mapping[str, fastfi.Influence], closed: Mapping[str, NDArray[Any]]
) -> list[dict[str, Any]]:
    """One row for each stage and type of layer: medians over its layers and the images, the first
    TOP of which are those of the largest FI."""
    names = found["exact"].names
    fi = {rule: found[rule].fi.numpy() for rule in RULES}
    share = {rule: fi[rule] / closed[rule][:, None] for rule in RULES}
    rank, kept = found["exact"].rank, found["truncated"].rank
    assert rank is not None
    assert kept is not None
    rows = []
    for (stage, kind), at in groups(_short(names), kinds_of(model, names)).items():
        layers = [model.get_submodule(names[i]) for i in at]
        rows.append({
            "stage": stage,
            "kind": kind,
            "layers": len(at),
            "parameters": sum(p.numel() for m in layers for p in m.parameters(recurse=False)),
            "full": float((rank[:, at] == FULL).double().mean()),
            "exact": median(fi["exact"][TOP:, at]),
            "damped": median(share["damped"][TOP:, at]),
            "damped_top": median(share["damped"][:TOP, at]),
            "truncated": median(share["truncated"][TOP:, at]),
            "truncated_top": median(share["truncated"][:TOP, at]),
            "whole": float((kept[TOP:, at] >= FULL).double().mean()),
            "zero": float((fi["truncated"][TOP:, at] == 0).mean()),
        })  # fmt: skip
    return rows


def _short(names: Sequence[str]) -> list[str]:
    """Without the wrapper that scales pixels."""
    return [name.removeprefix("network.") for name in names]


def compute(context: Context, dataset: str) -> Result:
    """Both halves of Setup 2 for both networks."""
    config, train = context.config, context.images(dataset, "train")
    usual = {
        rule: balanced(
            train.y,
            config.layer_rule_images if rule == "truncated" else config.layer_images,
            10,
            config.seed,
        )
        for rule in RULES
    }
    values: dict[str, Any] = {
        "top": TOP,
        "images": {rule: len(at) for rule, at in usual.items()},
        "drawn": min(DRAWN, len(usual["exact"])),
    }
    arrays: dict[str, NDArray[Any]] = {}
    for network in NETWORKS:
        input_fi = column(context.scores(dataset, network, "train"), "fi")
        top = torch.from_numpy(np.argsort(-input_fi, kind="stable")[:TOP].copy())
        at = {rule: torch.cat([top, chosen]) for rule, chosen in usual.items()}
        closed = {rule: input_fi[chosen] for rule, chosen in at.items()}
        both, scattered = _all_parameters(context, dataset, network, input_fi, usual["truncated"])
        found = _profiles(context, dataset, network, at)
        names, model = found["exact"].names, context.model(dataset, network)
        rank = found["truncated"].rank
        assert rank is not None
        kept = rank[TOP:]  # singular values
        values[network] = {
            "title": context.title(network),
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": len(names),
            "names": _short(names),
            "kinds": kinds_of(model, names),
            "all": both,
            "top": [{"position": int(i), "fi": finite(input_fi[i])} for i in top],
            "rank": _ranks(found["exact"], closed["exact"]),
            "zero": float((found["truncated"].fi[TOP:] == 0).double().mean()),
            "whole": float((kept >= FULL).double().mean()),
            "table": _table(model, found, closed),
        }
        arrays |= scattered
        for rule in RULES:
            fi = found[rule].fi
            drawn = np.linspace(TOP, len(fi) - 1, min(DRAWN, len(fi) - TOP)).round().astype(int)
            arrays[f"{network}_{rule}"] = single(fi[drawn])
            arrays[f"{network}_{rule}_top"] = single(fi[:TOP])
            arrays[f"{network}_{rule}_median"] = single(fi[TOP:].median(0).values)
    return Result(values, arrays)


def draw(dataset: str, result: Result) -> Mapping[str, Figure]:
    """Figure 4: all parameters together, and for each network its layers."""
    values, arrays = result
    figures = {
        "all": rules_scatter([
            (values[n]["title"], {rule: arrays[f"{n}_all_{rule}"] for rule in RULES})
            for n in NETWORKS
        ])
    }  # fmt: skip
    for n in NETWORKS:
        panels = [
            (rule, arrays[f"{n}_{rule}"], arrays[f"{n}_{rule}_top"], arrays[f"{n}_{rule}_median"])
            for rule in RULES
        ]
        figures[n] = layer_panels(values[n]["title"], panels, values[n]["names"],
                                  values[n]["kinds"])  # fmt: skip
    return figures
