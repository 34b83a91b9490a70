"""Setups 1 to 3 of the experiment on small, untrained networks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from shu_zhu_tiny import tiny_context

import fastfi
from examples.shu_zhu_2019 import drawings, report, setup1, setup2, setup3, setup_measures
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.data import balanced
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.setup1_naive import definition, naive_influence

DATASET = "mnist"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return tiny_context(
        tmp_path_factory.mktemp("setups"), epochs=0, train_images=150, test_images=60,
        rule_images=12, layer_images=6, layer_rule_images=3,
    )  # fmt: skip


def _compute(context: Context, section: Any) -> Result:
    result = section.compute(context, DATASET)
    assert json.loads(json.dumps(result.values, allow_nan=False)) == result.values
    return result


@pytest.fixture(scope="module")
def first(context: Context) -> Result:
    return _compute(context, setup1)


@pytest.fixture(scope="module")
def second(context: Context) -> Result:
    return _compute(context, setup2)


@pytest.fixture(scope="module")
def third(context: Context) -> Result:
    return _compute(context, setup3)


def _log_probs(context: Context, network: str, split: str) -> np.ndarray:
    model = context.model(DATASET, network)
    with torch.no_grad():
        return model(context.images(DATASET, split).pixels()).double().log_softmax(1).numpy()


def _text(context: Context, section: Any, result: Result) -> str:
    drawn = set(section.draw(DATASET, result))

    def figure(dataset: str, name: str, caption: str) -> str:
        assert (dataset, name) == (DATASET, name) and name in drawn
        return f"![{caption}]({name}.png)"

    template = report.environment().get_template(f"{section.NAME}.md.jinja")
    paper = json.loads(setup_measures.PAPER.read_text())
    return template.render(
        parts={DATASET: result.values}, seconds={DATASET: 1.0}, config=context.config, paper=paper,
        NETWORKS=NETWORKS, figure=figure,
    )  # fmt: skip


def _tables(text: str) -> int:
    """The number of Markdown tables, whose lines must have as many cells as their heads."""
    count, width = 0, None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = line.strip().strip("|").count("|")
        if width is None:
            count, width = count + 1, cells
        assert cells == width, line
    return count


@pytest.mark.parametrize("network", NETWORKS)
def test_every_training_image_has_the_fi_of_its_label(context, first, network):
    train = context.images(DATASET, "train")
    log_p = _log_probs(context, network, "train")[np.arange(150), train.y]
    expected = np.expm1(-log_p)
    fi = first.arrays[f"{network}_fi"]
    assert fi.dtype == np.float32
    np.testing.assert_allclose(fi, expected, rtol=1e-4)
    found = first.values[network]
    assert found["above"] == (log_p < np.log(0.5)).sum()
    assert found["class_largest"][3] == pytest.approx(expected[train.y == 3].max(), rel=1e-4)
    positions = [image["position"] for image in found["top"]]
    assert set(positions) == set(np.argsort(-fi)[:5])
    for image, pixels in zip(found["top"], first.arrays[f"{network}_top_images"], strict=True):
        i = image["position"]
        assert (image["row"], image["label"]) == (train.rows[i], train.y[i])
        np.testing.assert_array_equal(pixels, train.x[i])


def test_ranks_costs_and_the_rule(context, first):
    for network in NETWORKS:
        found = first.values[network]
        assert found["rank"]["full"] <= found["rank"]["images"] == 12
        assert found["rank"]["difference"] < 1e-4
        cost = found["cost"]
        assert cost["images"] == 150 + len(context.images(DATASET, "valid")) + 60
        assert cost["naive"] == pytest.approx(cost["naive_each"] * cost["images"])
        # fastfi's Truncated and the rule as the scripts write it; the definition by singular values
        assert cost["rule_close"] == cost["plain_close"] == cost["naive_images"] == 2
        assert cost["plain_away"] < 1e-6


def test_naive_autograd_is_each_rule(context):
    model, train = context.model(DATASET, "ResNet"), context.images(DATASET, "train")
    at = torch.tensor([5, 17])
    plain, closed = definition(model, train, at, "cpu")
    p = torch.softmax(model.double()(train.pixels(at).double()), 1).detach()
    model.float()
    own = p[torch.arange(2), train.y[at]].numpy()
    np.testing.assert_allclose(closed, (1 - own) / own, rtol=1e-10)
    np.testing.assert_allclose(plain, closed, rtol=1e-6)
    # A cut that drops some singular values tells the rule from the definition.
    x, y = train.pixels(at[:1]), train.y[at[:1]]
    rule = fastfi.influence(model, x, y, inverse=fastfi.Truncated(2e-3)).item()
    assert naive_influence(model, x, int(y), 2e-3) == pytest.approx(rule, rel=1e-3)
    assert naive_influence(model, x, int(y), 1e3) == 0


def test_authors_images_are_found_where_the_data_is_theirs():
    fi = np.array([0.5, 3.0, 2.0, 2.0])
    assert setup_measures.authors_ranks(DATASET, "train", fi, ("top5", "ResNet")) is None
    large = np.zeros(54_000)
    large[1601], large[0] = 2.0, 3.0
    found = setup_measures.authors_ranks(DATASET, "train", large, ("top5", "ResNet"))
    assert found is not None and len(found) == 5
    assert found[0] == {"position": 1601, "fi": 2.0, "rank": 2}
    assert found[1]["rank"] == 3  # all others, alike
    assert setup_measures.authors_ranks(DATASET, "train", large, ("top6", "ResNet")) is None


def test_authors_images_come_into_the_text(context, first, monkeypatch):
    monkeypatch.setitem(setup_measures.AUTHORS_IMAGES, (DATASET, "train"), 150)
    file = context.config.out / "paper.json"
    file.write_text(json.dumps({DATASET: {"top5": {"ResNet": [7, 8]}}}))
    monkeypatch.setattr(setup_measures, "PAPER", file)
    found = {("train", "fi"): np.arange(150.0), ("train", "predicted"): np.zeros(150)}
    ours = setup1._authors(context, DATASET, "ResNet", found, [6, 149])
    assert ours is not None and ours["shared"] == 1
    assert [image["rank"] for image in ours["images"]] == [144, 143]
    monkeypatch.undo()
    values = {**first.values, "ResNet": {**first.values["ResNet"], "authors": ours}}
    text = _text(context, setup1, Result(values, first.arrays))
    assert "144 of 150" in text and "1 of 2 are among our five" in text


def test_parameters_have_the_input_s_fi_and_layers_their_own(context, second):
    train = context.images(DATASET, "train")
    for network in NETWORKS:
        found, model = second.values[network], context.model(DATASET, network)
        assert found["all"]["proved"] and found["all"]["difference"] < 1e-4
        assert found["rank"]["pairs"] == (5 + 6) * found["layers"]
        rows = found["table"]
        assert sum(row["layers"] for row in rows) == found["layers"] == len(found["kinds"])
        assert sum(row["parameters"] for row in rows) == found["parameters"]
        assert second.arrays[f"{network}_exact"].shape == (6, found["layers"])
        at = balanced(train.y, 3, 10, 0)
        name = f"network.{found['names'][0]}"
        direct = fastfi.influence(
            model, train.pixels(at), train.y[at], wrt=[name], inverse="truncated"
        )
        np.testing.assert_allclose(
            second.arrays[f"{network}_truncated"][:, 0], direct[:, 0], rtol=1e-3
        )


def test_ranks_of_layers_count_pairs():
    fi = torch.tensor([[2.0, 1.0], [4.0, 4.0]])
    rank = torch.tensor([[9, 8], [9, 9]])
    exact = SimpleNamespace(fi=fi, rank=rank)
    assert setup2._ranks(exact, np.array([2.0, 4.0])) == {
        "pairs": 4, "full": 3, "layers_full": 1, "difference": 0.0, "rest_smallest": 0.5,
        "rest_median": 0.5,
    }  # fmt: skip


def test_predicted_classes_and_percentiles(context, third):
    for network in NETWORKS:
        fi = {}
        for split in ("train", "valid", "test"):
            fi[split] = np.expm1(-_log_probs(context, network, split).max(1))
            np.testing.assert_allclose(third.arrays[f"{network}_{split}_fi"], fi[split], rtol=1e-4)
        found = third.values[network]
        assert found["largest"]["train"] <= 9
        both = np.concatenate([fi["train"], fi["valid"]])
        for name, values in (("train", fi["train"]), ("files", both), ("test", fi["test"])):
            assert found["exact"][name]["98"] == pytest.approx(np.percentile(values, 98), rel=1e-4)
        larger = (fi["test"][:, None] > fi["train"]).mean()
        assert found["apart"]["larger"] == pytest.approx(larger, abs=1e-3)


def test_orderings():
    above = setup3.table({"low": np.arange(100.0), "high": np.arange(100.0) + 1})
    assert setup3._not_above(above["high"], above["low"]) == []
    assert setup3._not_above(above["low"], above["high"]) == [75, 80, 85, 90, 95, 98, 99]
    values = {
        name: {
            "accuracy": {"train": a, "test": 0.5},
            "exact": {"train": above[of], "test": above[of]},
        }
        for name, a, of in (("ResNet", 0.8, "high"), ("DenseNet", 0.9, "low"))
    }
    found = setup3._between(values)
    assert found == {
        "train": {"better": "DenseNet", "not_below": []},
        "test": {"better": None, "not_below": []},
    }


def test_an_image_without_a_score_is_an_error():
    scores = SimpleNamespace(path=Path("a"), values=lambda name: np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="fi of every image, got none of 1, the first of them 1"):
        setup_measures.column(scores, "fi")


def test_numbers_as_they_are_kept():
    assert setup_measures.finite(np.inf) is None and setup_measures.finite(2) == 2.0
    assert setup_measures.median(np.empty(0)) is None
    kept = setup_measures.single(np.array([1e300, np.inf, 0.5]))
    assert kept.dtype == np.float32 and kept.tolist() == [kept.max(), kept.max(), 0.5]


def test_an_axis_has_a_place_for_zero():
    axes = Figure().subplots()
    place = drawings.log_axis(axes, [np.array([0.0, 1e-3, 20.0])])
    low, high = axes.get_ylim()
    assert low < place < 1e-3 and high >= 20
    assert axes.get_yticklabels()[0].get_text() == "0"
    floor = drawings.log_axis(axes, [np.array([2e-3, 20.0])])
    assert floor == axes.get_ylim()[0] == 1e-3


@pytest.mark.parametrize(
    ("section", "names", "tables"),
    [
        (setup1, {"manhattan", "top"}, 6),
        (setup2, {"all", *NETWORKS}, 3),
        (setup3, {"manhattan"}, 3),
    ],
)
def test_figures_and_text(context, request, section, names, tables):
    which = {setup1: "first", setup2: "second", setup3: "third"}[section]
    result = request.getfixturevalue(which)
    figures = section.draw(DATASET, result)
    assert set(figures) == names
    for figure in figures.values():
        figure.canvas.draw()
    text = _text(context, section, result)
    assert text.startswith("## Setup") and _tables(text) == tables
    assert all(f"({name}.png)" in text for name in names)
    assert "None" not in text and "nan" not in text
