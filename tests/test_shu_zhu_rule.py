"""The authors' rule, transcribed once more from their scripts, against ``fastfi.Truncated``; the
parts of the experiment about it and about lumping."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019 import lumping, rule
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.report import environment
from examples.shu_zhu_2019.rule import UnitPixels
from fastfi.classes import sort_classes
from tests.shu_zhu_tiny import tiny_config


def transcribed(model: nn.Module, x: Tensor, y: int, eps: float) -> tuple[float, int]:
    """FI of one image [1, ...] in numpy, as the scripts compute it: gradients of the probabilities,
    scaled by sqrt(P) + eps; the singular value decomposition; what exceeds eps. Returns also how
    many singular values do."""
    x = x.clone().requires_grad_()
    p = model(x).softmax(1)[0]
    each = [torch.autograd.grad(p[k], x, retain_graph=True)[0].flatten() for k in range(len(p))]
    slopes, p = torch.stack(each, 1).numpy(), p.detach().numpy()  # [pixels, K], [K]
    left, singular, _ = np.linalg.svd(slopes / (np.sqrt(p) + eps), full_matrices=False)
    kept = singular > eps
    objective = -slopes[:, y] / (p[y] + eps)  # [pixels]
    return float((((objective @ left)[kept] / singular[kept]) ** 2).sum()), int(kept.sum())


def small_model(spread: float, pixels: int = 16, classes: int = 5) -> nn.Module:
    """A float64 network for pixels 0..255 whose logits spread by ``spread``."""
    torch.manual_seed(3)
    layers = nn.Linear(pixels, 12), nn.Tanh(), nn.Linear(12, classes)
    model = nn.Sequential(nn.Flatten(), *layers).double()
    with torch.no_grad():
        layers[0].weight /= 255
        layers[2].weight *= spread
    return model.eval()


@pytest.mark.parametrize("spread", [1.0, 20.0, 60.0])
@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("unit", [False, True])
def test_truncated_is_the_authors_formula(spread: float, eps: float, unit: bool) -> None:
    model = small_model(spread)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, network = (x, UnitPixels(model).eval()) if unit else (255 * x, model)
    y = model(255 * x if unit else x).argmax(1)
    y[::2] = (y[::2] + 1) % 5  # true labels of little probability too
    found = fastfi.influence(network, x, y, inverse=fastfi.Truncated(eps), full_output=True)
    for i in range(len(x)):
        fi, kept = transcribed(network, x[i : i + 1], int(y[i]), eps)
        assert found.rank[i] == kept
        assert float(found.fi[i]) == pytest.approx(fi, rel=1e-7, abs=1e-300)
    assert found.fi.max() <= rule.ceiling(eps) * (1 + 1e-9)


def test_the_cases_above_hold_all_there_is() -> None:
    """Confident and uncertain images, ranks from none to full."""
    x = 255 * torch.rand(
        6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    ranks = set()
    probabilities = []
    for spread in (1.0, 20.0, 60.0):
        for eps in (1e-1, 1e-3, 1e-5):
            found = fastfi.influence(
                small_model(spread), x, inverse=fastfi.Truncated(eps), full_output=True
            )
            ranks |= set(found.rank.tolist())
            probabilities.append(found.log_prob.exp())
    assert {0, 4} <= ranks and len(ranks) >= 4
    p = torch.cat(probabilities)
    assert p.min() < 0.5 and p.max() > 0.999


@pytest.mark.parametrize("eps", [1e-1, 1e-3])
def test_ceiling_is_the_largest_factor(eps: float) -> None:
    p = np.logspace(-12, 0, 200_001)
    factor = ((np.sqrt(p) + eps) / (p + eps)) ** 2
    assert rule.ceiling(eps) == pytest.approx(factor.max(), rel=1e-6)


def test_band_values() -> None:
    exact, found = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 6.0, 4.0])
    values = rule.band_values(exact, found, np.array([0, 1, 2, 3]))
    assert values["images"] == 4 and values["zero"] == 0.25 and values["kept"] == 1.5
    assert values["ratio"][1] == 1.0 and values["largest"] == [4.0, 6.0]
    assert values["kendall"] == pytest.approx(4 / 6)  # five pairs agree, one does not
    assert values["spearman"] == pytest.approx(0.8)
    flat = rule.band_values(exact, np.zeros(4), np.zeros(4))
    assert flat["spearman"] is None and flat["ratio"] is None and flat["zero"] == 1
    empty = rule.band_values(np.zeros(0), np.zeros(0), np.zeros(0))
    assert empty["images"] == 0 and empty["zero"] is None and empty["largest"] is None


class Untrained(Context):
    """Linear networks in place of trained ones: quick, and of every confidence."""

    def model(self, dataset: str, network: str) -> nn.Module:
        torch.manual_seed(len(network))
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).eval()
        with torch.no_grad():
            model[1].weight *= 0.1
        return model


def rendered(section, values: dict, context) -> str:
    return environment().get_template(f"{section.NAME}.md.jinja").render(
        parts={"mnist": values}, seconds={"mnist": 1.0}, config=context.config, paper={},
        NETWORKS=NETWORKS, figure=lambda dataset, name, caption: f"![{caption}]({name}.png)",
    )  # fmt: skip


def test_parts_on_linear_networks(tmp_path: Path) -> None:
    context = Untrained(tiny_config(tmp_path, rule_images=12))
    result = rule.compute(context, "mnist")
    for network in NETWORKS:
        model = context.model("mnist", network)
        for split in rule.SPLITS:
            name = f"{network}_{split}"
            images = context.images("mnist", split)
            rows = torch.from_numpy(result.arrays[f"{name}_row"]).long()
            at = torch.searchsorted(images.rows, rows)
            assert len(rows) == 12 and torch.equal(images.rows[at], rows)
            p = model(images.pixels(at)).double().softmax(1)
            p = p.gather(1, images.y[at][:, None]).detach().numpy()[:, 0]
            full = result.arrays[f"{name}_rank"] == 9
            exact = result.arrays[f"{name}_exact"]
            assert full.any()
            np.testing.assert_allclose(exact[full], ((1 - p) / p)[full], rtol=2e-3)
            values = result.values[network][split]
            # Full rank in float32 rows: the change of scale moves rounding alone.
            if values["full_rank"] == 1:
                assert values["exact_change"] < 1e-3
            zero = (result.arrays[f"{name}_rule_255"] == 0).mean()
            assert values["rules"]["255"][0]["zero"] == pytest.approx(zero)
            for scale in rule.SCALES:
                bands = values["rules"][scale]
                assert bands[0]["images"] == 12 == sum(band["images"] for band in bands[1:])
                kept = result.arrays[f"{name}_kept_{scale}"]
                assert ((result.arrays[f"{name}_rule_{scale}"] > 0) <= (kept > 0)).all()
            # Gradients are 255 times as large in 0..1: at least as many values exceed the cut.
            kept = [result.arrays[f"{name}_kept_{scale}"] for scale in ("255", "1")]
            assert (kept[0] <= kept[1]).all()
    assert list(rule.draw("mnist", result)) == ["scatter"]
    text = rendered(rule, result.values, context)
    assert "SmallResNet" in text and f"{rule.ceiling():.0f}" in text

    lumped = lumping.compute(context, "mnist")
    check_lumping(lumped.values)
    assert list(lumping.draw("mnist", lumped)) == ["cost"]
    assert "1e-08" in rendered(lumping, lumped.values, context)
    for network in NETWORKS:
        for rows in lumped.values[network]["rules"].values():
            for row in rows:
                row |= {"median": 0.1, "rise": 0.1, "fall": 0.0}
    assert "rounding of" not in rendered(lumping, lumped.values, context)
    lumped.values["ResNet"]["rules"]["damped"][2]["rise"] = 1e-6
    assert "rounding of" in rendered(lumping, lumped.values, context)


def check_lumping(values: dict) -> None:
    for network in NETWORKS:
        for name, rows in values[network]["rules"].items():
            assert [row["lump"] for row in rows] == [None, *lumping.LUMPS]
            assert rows[0]["passes"] == 9 and not rows[0]["largest"]  # None where all are 0
            passes = [row["passes"] for row in rows[1:]]
            assert passes == sorted(passes) and passes[0] >= 1 and passes[-1] <= 9
            if name == "damped":  # G only shrinks, FI only grows; the rest is float32
                assert all(row["fall"] < 1e-4 for row in rows)
            if name == "exact":
                assert rows[0]["full_rank"] > 0
                for row in rows:
                    if row["full_rank"] == rows[0]["full_rank"] == 1:
                        assert row["largest"] < 1e-12


@pytest.mark.parametrize("lump", [None, 1e-1, 1e-4, 1e-12])
def test_passes_are_those_of_the_library(lump: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 6 * torch.randn(300, 10, dtype=torch.float64, generator=generator)
    y = torch.randint(10, (300,), generator=generator)
    found = lumping.passes(z.log_softmax(1), y, lump)
    classes = sort_classes(z, y, lump)
    used = (classes.log_prob > -math.inf).sum(1) - 1
    assert torch.equal(found, used)
    if lump is not None and lump > 1e-12:
        assert len(found.unique()) > 2


def test_changes() -> None:
    values = lumping.changes(np.array([1.0, 3.0, 0.0, 1.0]), np.array([1.0, 2.0, 1.0, 0.0]))
    assert values == {"median": 0.5, "largest": 1.0, "rise": 0.5, "fall": 1.0, "zero_alone": 2}
    assert lumping.changes(np.zeros(2), np.zeros(2))["median"] is None
