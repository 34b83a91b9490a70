"""A context whose networks are small perceptrons, which learn the tiny data in a second; the parts
of the experiment use them as they use the large networks."""

from __future__ import annotations

import jinja2
import torch
from torch import nn

from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.networks import Scaled
from examples.shu_zhu_2019.report import environment
from examples.shu_zhu_2019.section import Result

__all__ = ["SmallContext", "rendered"]


class SmallContext(Context):
    """The two networks differ in their first weights only."""

    def new_model(self, dataset: str, network: str, seed: int | None = None) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(NETWORKS.index(network) + (seed or 0))
            layers = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10)
            return Scaled(nn.Sequential(*layers))


def rendered(context: Context, name: str, parts: dict[str, Result]) -> str:
    """The text of a part, with the names of its figures."""
    template: jinja2.Template = environment().get_template(f"{name}.md.jinja")
    return template.render(
        parts={dataset: result.values for dataset, result in parts.items()},
        seconds=dict.fromkeys(parts, 1.0),
        config=context.config,
        paper={},
        NETWORKS=NETWORKS,
        figure=lambda dataset, name, caption: f"figure {dataset} {name}: {caption}",
    )
