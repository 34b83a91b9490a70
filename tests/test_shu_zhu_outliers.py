"""Overlapped digits: how they are made, the areas below curves, the part as a whole."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from shu_zhu_small import SmallContext, rendered
from shu_zhu_tiny import tiny_config
from sklearn.metrics import average_precision_score, roc_auc_score

import fastfi
from examples.shu_zhu_2019 import outliers
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.curves import POINTS, Ranking, compared, curve_points
from examples.shu_zhu_2019.data import Images, balanced
from examples.shu_zhu_2019.measures import stands_for
from examples.shu_zhu_2019.overlapped import SHIFT, overlap, shifted
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.training import load_weights, logits


def test_shifted_is_scipys_shift() -> None:
    x = torch.randint(1, 256, (6, 2, 9, 7), generator=torch.Generator().manual_seed(0)).byte()
    offsets = torch.tensor([[0, 0], [4, -3], [-4, 4], [1, 0], [0, -1], [-2, -2]])
    for image, offset, found in zip(x, offsets, shifted(x, offsets), strict=True):
        expected = ndimage.shift(image.numpy(), (0, *offset.tolist()), order=0, mode="constant")
        assert np.array_equal(found.numpy(), expected)


def _marked(count: int) -> Images:
    """Image i is a square of value i + 1 in the middle, 10 pixels wide: no shift moves it out."""
    x = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    x[:, 0, 9:19, 9:19] = (torch.arange(count) + 1).byte()[:, None, None]
    return Images(x, torch.arange(count) % 10, torch.arange(count) + 1_000)


def test_overlapped_images_hold_one_correct_image_of_the_label_and_one_of_another_class() -> None:
    images = _marked(200)
    correct = torch.arange(200) >= 60  # 14 of each class
    for_training, for_validation = overlap(images, correct, 9, seed=3)
    assert (len(for_training), len(for_validation)) == (90, 10)
    assert torch.bincount(for_training.y).tolist() == [9] * 10
    assert torch.bincount(for_validation.y).tolist() == [1] * 10
    firsts, seconds = [], []
    places = set()
    for part in (for_training, for_validation):
        for x, y, row in zip(part.x, part.y, part.rows, strict=True):
            first = int(row) - 1_000
            values = set(x.unique().tolist()) - {0}
            (other,) = {value - 1 for value in values} - {first} or {None}
            assert correct[first] and images.y[first] == y
            firsts.append(first)
            if other is not None:  # else the smaller value lies wholly below
                assert images.y[other] != y
                seconds.append(other)
            larger = max(values)
            at = torch.nonzero(x[0] == larger)
            assert len(at) == 100  # the maximum hides nothing of it
            places.add(tuple((at.min(0).values - 9).tolist()))
    assert len(set(firsts)) == 100
    assert len(seconds) > 80 and not set(firsts) & set(seconds)
    # Shifts of either sign, in both directions, up to SHIFT.
    moves = np.array(sorted(places))
    assert moves.min(0).tolist() == [-SHIFT, -SHIFT] and moves.max(0).tolist() == [SHIFT, SHIFT]


def test_overlapping_is_repeatable_and_says_what_is_missing() -> None:
    images, every = _marked(100), torch.ones(100, dtype=torch.bool)
    a, b, c = (overlap(images, every, 2, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    with pytest.raises(ValueError, match=r"at least 3 correctly classified images of class 0.*0"):
        overlap(images, ~every, 2, 0)
    with pytest.raises(ValueError, match=r"at least 10 images of other classes than 0.*got 0"):
        overlap(images, every, 9, 0)


@pytest.fixture(scope="module")
def scored() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, outliers, weights, and how often each image comes."""
    g = np.random.default_rng(5)
    outlier = g.random(400) < 0.2
    score = np.round(g.normal(size=400) + outlier, 1)
    return score, outlier, g.random(400) + 0.5, g.integers(0, 3, size=400)


def test_areas_are_scikit_learns(scored: tuple[np.ndarray, ...]) -> None:
    score, outlier, weight, counts = scored
    for times in (np.ones(400), counts):
        roc, precision = Ranking(score, outlier, weight).areas(times)
        w = weight * times
        assert roc == pytest.approx(roc_auc_score(outlier, score, sample_weight=w), rel=1e-12)
        expected = average_precision_score(outlier, score, sample_weight=w)
        assert precision == pytest.approx(expected, rel=1e-12)


def test_areas_refuse_what_has_no_order() -> None:
    with pytest.raises(ValueError, match="1 of 3"):
        Ranking(np.array([1.0, np.nan, 2.0]), np.array([True, False, False]), np.ones(3))
    with pytest.raises(ValueError, match="3 outliers among 3"):
        Ranking(np.arange(3.0), np.ones(3, dtype=bool), np.ones(3))


def test_differences_are_paired(scored: tuple[np.ndarray, ...]) -> None:
    score, outlier, _, _ = scored
    noise = np.random.default_rng(1).normal(size=400)
    scores = {"a": score, "same": np.exp(score), "noise": noise, "opposite": -score}
    found = compared(scores, outlier, reference="a", resamples=200, seed=0)
    assert found == compared(scores, outlier, reference="a", resamples=200, seed=0)
    same, worse = found["differences"]["same"], found["differences"]["noise"]
    assert same["roc"] == 0 and same["roc_interval"] == [0, 0] == same["precision_interval"]
    assert worse["roc_interval"][0] > 0
    a, opposite = found["scores"]["a"], found["scores"]["opposite"]
    assert a["roc"] + opposite["roc"] == pytest.approx(1)
    assert a["roc_interval"][0] < a["roc"] < a["roc_interval"][1]
    assert found["prevalence"] == outlier.mean()
    none = compared(scores, outlier, reference="a", resamples=0, seed=0)
    assert none["scores"]["a"]["roc"] == a["roc"]
    assert none["scores"]["a"]["roc_interval"] is None


def test_interval_of_the_area_is_as_wide_as_hanley_and_mcneils() -> None:
    # Their standard error of the area of exponential scores (Radiology 143, 1982).
    g = np.random.default_rng(0)
    outlier = np.arange(900) < 300
    score = g.exponential(np.where(outlier, 3.0, 1.0))
    found = compared({"a": score}, outlier, reference="a", resamples=600, seed=1)["scores"]["a"]
    a = found["roc"]
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = (a * (1 - a) + 299 * (q1 - a**2) + 599 * (q2 - a**2)) / (300 * 600)
    low, high = found["roc_interval"]
    # A quantile of 600 resamples errs by a tenth of the half width; the exponential model besides.
    assert (high - low) / (2 * 1.96 * variance**0.5) == pytest.approx(1, abs=0.2)


def test_kept_curves_have_the_areas() -> None:
    g = np.random.default_rng(0)
    outlier = g.random(20_000) < 0.1
    score = g.normal(size=20_000) + 2 * outlier
    roc, precision = curve_points(score, outlier)
    assert roc.shape[1] <= POINTS + 2 and precision.shape[1] <= POINTS + 2
    # Trapezoids between at most POINTS points of a monotone curve err by less than 1 / POINTS.
    x, y = roc.astype(float)
    area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
    assert area == pytest.approx(roc_auc_score(outlier, score), abs=1 / POINTS)
    assert roc[:, 0].tolist() == [0, 0] and roc[:, -1].tolist() == [1, 1]
    assert (np.diff(precision[0]) >= 0).all() and precision[0, -1] == 1
    assert precision[1, -1] == pytest.approx(outlier.mean(), rel=0.2)


def test_chosen_images_stand_for_all() -> None:
    y = torch.tensor([0] * 30 + [1] * 10)
    weight = stands_for(y, torch.tensor([0, 1, 2, 30, 31]))
    assert weight.tolist() == [10, 10, 10, 5, 5]
    assert stands_for(y, torch.tensor([0, 1])).sum() == 40  # no image of a class


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> SmallContext:
    root = tmp_path_factory.mktemp("outliers")
    sizes = {"train_images": 1_100, "outlier_images": 900, "cook_images": 20, "rule_images": 50}
    return SmallContext(tiny_config(root, epochs=6, **sizes))


@pytest.fixture(scope="module")
def before(context: SmallContext) -> dict[str, Any]:
    return {n: copy.deepcopy(context.model("mnist", n).state_dict()) for n in NETWORKS}


@pytest.fixture(scope="module")
def result(context: SmallContext, before: dict[str, Any]) -> Result:
    return outliers.compute(context, "mnist")


def test_trained_networks_stay_as_they_were(
    context: SmallContext, before: dict[str, Any], result: Result
) -> None:
    for network in NETWORKS:
        model = context.model("mnist", network)
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[network][name])


def test_areas_of_the_part_are_those_of_the_loss(context: SmallContext, result: Result) -> None:
    images = context.images("mnist", "train")
    assert (len(images), result.values["available"], result.values["ordinary"]) == (1100, 1100, 900)
    assert result.values["outliers"] == 90 and result.values["valid_outliers"] == 10
    ordinary = images.take(balanced(images.y, 900, 10, context.config.seed))
    correct = torch.ones(len(ordinary), dtype=torch.bool)
    for network in NETWORKS:
        z = logits(context.model("mnist", network), ordinary, "cpu")
        correct &= z.argmax(1) == ordinary.y
    extra, _ = overlap(ordinary, correct, 9, context.config.seed)
    outlier = np.r_[np.zeros(len(ordinary), bool), np.ones(90, bool)]
    for network in NETWORKS:
        model, found = context.new_model("mnist", network), result.values["networks"][network]
        load_weights(model, context.weights(f"mnist-{network}-outliers"))
        loss, norm = [], []
        for part in (ordinary, extra):
            log_prob = logits(model, part, "cpu").double().log_softmax(1)
            loss.append(-log_prob.gather(1, part.y[:, None])[:, 0])
            norm.append(fastfi.baselines.jacobian_norm(model, part.pixels(), part.y))
        scores = found["whole"]["scores"]
        for name, parts in (("exact", loss), ("jacobian", norm)):
            score = torch.cat(parts).double().numpy()
            # Float32 logits of other batch sizes may swap a few neighbours.
            assert scores[name]["roc"] == pytest.approx(roc_auc_score(outlier, score), abs=1e-4)
            expected = average_precision_score(outlier, score)
            assert scores[name]["precision"] == pytest.approx(expected, abs=1e-3)
        assert found["whole"]["prevalence"] == pytest.approx(90 / (90 + len(ordinary)))
        first, both = context.model("mnist", network), (ordinary, extra)
        log_probs = [logits(first, part, "cpu").double().log_softmax(1) for part in both]
        lost = [-z.gather(1, p.y[:, None]) for z, p in zip(log_probs, both, strict=True)]
        expected = roc_auc_score(outlier, torch.cat(lost)[:, 0].numpy())
        assert found["before"]["scores"]["exact"]["roc"] == pytest.approx(expected, abs=1e-4)
        assert scores["exact"]["roc"] > 0.9  # two digits in one image are hard for a digit network


def test_subset_compares_all_measures_at_the_whole_sets_prevalence(result: Result) -> None:
    for network in NETWORKS:
        found = result.values["networks"][network]
        assert found["sample"] is None and result.values["everywhere"]
        subset = found["subset"]
        assert set(subset["scores"]) == {
            "exact", "truncated", "truncated_small", "damped", "jacobian", "cook",
        }  # fmt: skip
        assert (subset["images"], subset["outliers"]) == (40, 20)
        assert subset["prevalence"] == pytest.approx(found["whole"]["prevalence"])
        assert found["not_converged"] == 0


def test_a_sample_where_backward_passes_are_dear(
    context: SmallContext, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "_everywhere", lambda config: False)
    fewer = outliers.compute(context, "mnist")  # with the weights kept by the first
    for network in NETWORKS:
        found, all_of = (r.values["networks"][network] for r in (fewer, result))
        assert list(found["whole"]["scores"]) == ["exact"]
        assert found["whole"]["scores"]["exact"] == all_of["whole"]["scores"]["exact"]
        assert (found["sample"]["images"], found["sample"]["outliers"]) == (100, 50)
        assert found["sample"]["prevalence"] == pytest.approx(found["whole"]["prevalence"])
        assert found["subset"]["scores"] == all_of["subset"]["scores"]
    assert "curves" in outliers.draw("mnist", fewer)
    text = rendered(context, "outliers", {"mnist": fewer})
    assert "a sample of both kinds" in text
    # A weighted sample's average precision has no interval that holds what it promises.
    claims = [line for line in text.splitlines() if "claim that FI beats" in line]
    assert len(claims) == 2
    assert all(line.startswith("By the area under ROC") for line in claims)


def test_result_is_small_json_and_drawn(result: Result) -> None:
    json.dumps(result.values, allow_nan=False)
    assert sum(array.nbytes for array in result.arrays.values()) < 1_000_000
    figures = outliers.draw("mnist", result)
    assert list(figures) == ["curves", "measures", "images"]
    assert all(isinstance(figure, Figure) for figure in figures.values())


def test_text_follows_the_values(context: SmallContext, result: Result) -> None:
    result = copy.deepcopy(result)

    def claim(roc: list[float] | None, precision: list[float] | None) -> str:
        for network in NETWORKS:
            difference = result.values["networks"][network]["whole"]["differences"]["jacobian"]
            difference |= {"roc_interval": roc, "precision_interval": precision}
        text = rendered(context, "outliers", {"mnist": result})
        (line,) = {line for line in text.splitlines() if "claim that FI beats" in line}
        return line

    assert "holds for this network." in claim([0.1, 0.2], [0.1, 0.2])
    assert "the other way round" in claim([-0.2, -0.1], [-0.2, -0.1])
    assert "only in part, or not clearly" in claim([0.1, 0.2], [-0.1, 0.2])
    assert "Without resamples" in claim(None, None)
    for network in NETWORKS:
        damped = result.values["networks"][network]["subset"]["differences"]["damped"]
        # An interval of the subset's average precision holds less than it says: no verdict.
        damped |= {"roc_interval": [-0.2, -0.1], "precision_interval": [0.1, 0.2]}
    text = rendered(context, "outliers", {"mnist": result})
    lines = [line for line in text.splitlines() if "Damped FI as an outlier" in line]
    assert len(lines) == len(NETWORKS)
    assert all("area under ROC is smaller" in line and "larger" not in line for line in lines)


def test_text_without_resamples(context: SmallContext, result: Result) -> None:
    def bare(values: Any) -> Any:
        if isinstance(values, dict):
            return {k: None if k.endswith("_interval") else bare(v) for k, v in values.items()}
        return values

    values = bare(result.values) | {"resamples": 0}
    text = rendered(context, "outliers", {"mnist": Result(values, result.arrays)})
    assert "no bootstrap resamples" in text and "(-)" not in text and "None" not in text
    assert "area under ROC differs by" in text
