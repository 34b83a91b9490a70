"""Maps and one-pixel attacks of the experiment, on networks that train in seconds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

import fastfi
from examples.shu_zhu_2019 import setup4, setup4_attacks
from examples.shu_zhu_2019.config import NETWORKS
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.report import environment
from examples.shu_zhu_2019.section import Result
from fastfi.attack import one_pixel
from tests.shu_zhu_tiny import tiny_context


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return tiny_context(tmp_path_factory.mktemp("setup4"), epochs=1, map_images=2, attack_images=2)


@pytest.fixture(scope="module")
def result(context: Context) -> Result:
    return setup4.compute(context, "mnist")


def test_wilson() -> None:
    # Newcombe (1998), Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert setup4_attacks.wilson(successes / count, count) == pytest.approx(
            [low, high], abs=6e-5
        )
    with pytest.raises(ValueError, match="at least 1 image"):
        setup4_attacks.wilson(0.0, 0)


def test_choose_takes_the_largest_and_says_the_bound() -> None:
    candidates, fi = torch.tensor([7, 3, 9, 5]), torch.tensor([0.7, 0.9, 0.5, 0.61])
    authors, ordinary = torch.tensor([3, 1]), torch.tensor([8])
    chosen = setup4.choose(2, candidates, fi, authors, ordinary)
    assert chosen.at.tolist() == [3, 7, 1, 8]  # 3 once
    assert chosen.why == ["chosen", "chosen", "authors", "ordinary"]
    assert chosen.bound == pytest.approx(0.7) and chosen.eligible == 3
    lowered = setup4.choose(4, candidates, fi, authors, ordinary)
    assert lowered.bound == pytest.approx(0.5) and len(lowered.at) == 6
    none = setup4.choose(2, candidates[:0], fi[:0], authors, ordinary)
    assert none.bound is None and none.at.tolist() == [3, 1, 8]


def test_images_are_as_the_table_says(context: Context, result: Result) -> None:
    test = context.images("mnist", "test")
    for network in NETWORKS:
        values, model = result.values[network], context.model("mnist", network)
        rows = torch.tensor([image["image"] for image in values["images"]])
        x = test.pixels(rows)  # all test images are used: rows are positions
        p, predicted = model(x).detach().double().softmax(1).max(1)
        assert [image["why"] for image in values["images"]][-1] == "ordinary"
        for i, image in enumerate(values["images"]):
            assert image["label"] == str(int(test.y[rows[i]]))
            assert image["predicted"] == image["label"] == str(int(predicted[i]))
            assert image["probability"] == pytest.approx(float(p[i]), rel=1e-5)
            if image["why"] == "chosen":
                assert image["probability"] > setup4.PROBABILITY
                assert image["truncated"] >= values["bound"] * (1 - 1e-4)
        np.testing.assert_array_equal(result.arrays[f"{network}_images"], test.x[rows].numpy())


def test_maps_are_those_of_single_windows(context: Context, result: Result) -> None:
    test = context.images("mnist", "test")
    for network in NETWORKS:
        values, model = result.values[network], context.model("mnist", network)
        x = test.pixels(torch.tensor([values["images"][0]["image"]]))
        regions = torch.zeros(28, 28, dtype=torch.int64)
        regions[9:14, 13:18] = 1  # the 5 x 5 window around (11, 15)
        for rule in setup4.RULES:
            maps = result.arrays[f"{network}_maps_{rule}"]
            assert maps.shape == (len(values["images"]), 4, 28, 28) and maps.dtype == np.float32
            window = fastfi.region_influence(model, x, None, regions, inverse=rule)[0, 1]
            assert maps[0, 2, 11, 15] == pytest.approx(float(window), rel=2e-3)
        assert values["growing"]["damped"]
        assert values["possible"][0] == 0 and values["possible"][2:] == [1, 1]
        assert values["possible"][1] == pytest.approx((26 / 28) ** 2)


def test_attacks(context: Context, result: Result) -> None:
    test = context.images("mnist", "test")
    for network in NETWORKS:
        found, model = result.values[network]["attacks"], context.model("mnist", network)
        for group in ("highest", "random"):
            assert set(setup4_attacks.METHODS) < set(found[group])
            for name in setup4_attacks.METHODS:
                one = found[group][name]
                # log P may rise: the attack widens the margin of another class.
                assert one["images"] == 2 and np.isfinite(one["fall_mean"])
                assert one["draws"] == (setup4_attacks.DRAWS if name == "random" else 1)
                low, high = one["interval"]
                assert low <= one["changed"] <= high
            for name in ("lift", "gain"):
                assert found[group]["random"][name] == pytest.approx(0, abs=1e-12)
        a = {
            name.removeprefix(f"{network}_attack_"): torch.from_numpy(array)
            for name, array in result.arrays.items()
            if name.startswith(f"{network}_attack_")
        }
        before, after = test.x[a["rows"]], a["x"]
        assert torch.equal(a["before"], before)
        different = (before != after).any(1)  # [n, H, W]
        for i, (row, column) in enumerate(a["positions"][:, 0].tolist()):
            assert different[i].sum() <= 1 and int(different[i].sum()) == int(
                different[i, row, column]
            )
            assert a["map"][i, row, column] == a["map"][i].max() > 0
        if len(after):
            p = model(after.float()).detach().double().log_softmax(1)
            assert torch.equal(p.argmax(1), a["label_after"])
            own = p.gather(1, a["label"][:, None])[:, 0]
            torch.testing.assert_close(own, a["log_prob_after"], rtol=1e-4, atol=1e-5)


def test_a_map_of_zeros_names_no_pixel(context: Context) -> None:
    model = context.model("mnist", "ResNet")
    x = context.images("mnist", "test").pixels(slice(0, 2))
    scores = torch.zeros(2, 28, 28)
    scores[1, 14, 14] = 1
    attacked = one_pixel(model, x, None, scores, bounds=(0, 255), steps=2)
    done = setup4_attacks.outcome(
        attacked._replace(success=torch.ones(2, dtype=torch.bool)), scores
    )
    assert done.marked.tolist() == done.changed.tolist() == [False, True]
    assert done.fall[0] == 0 and done.fall[1] == (
        attacked.log_prob_before[1] - attacked.log_prob_after[1]
    )
    nothing = done._replace(changed=torch.zeros(2, dtype=torch.bool), fall=0 * done.fall)
    summed = setup4_attacks.summary([done], [nothing])
    assert summed["changed"] == summed["lift"] == 0.5 and summed["marked"] == 1
    assert summed["gain"] == pytest.approx(float(done.fall[1]) / 2)


def test_attacks_are_compared_within_images() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> setup4_attacks.Outcome:
        changed = torch.rand(30, generator=generator) < 0.4
        fall = torch.rand(30, generator=generator, dtype=torch.float64)
        return setup4_attacks.Outcome(changed, fall, torch.ones(30, dtype=torch.bool))

    one, chance = drawn(), [drawn() for _ in range(5)]
    found = setup4_attacks.summary([one], chance)
    for name, interval, field in (
        ("lift", "lift_interval", "changed"), ("gain", "gain_interval", "fall"),
    ):  # fmt: skip
        own = getattr(one, field).double().numpy()
        other = np.mean([getattr(each, field).double().numpy() for each in chance], 0)
        test = ttest_rel(own, other)
        assert found[name] == pytest.approx((own - other).mean())
        assert found[interval] == pytest.approx(list(test.confidence_interval(0.95)))
    alone = [each._replace(changed=each.changed[:1], fall=each.fall[:1]) for each in [one, *chance]]
    assert setup4_attacks.summary(alone[:1], alone[1:])["lift_interval"] is None


def test_figures_and_text(context: Context, result: Result) -> None:
    figures = setup4.draw("mnist", result)
    assert all(isinstance(figure, Figure) for figure in figures.values())
    kinds = [*setup4.RULES] + ["attack"] * bool(len(result.arrays["ResNet_attack_rows"]))
    assert [f"resnet-{kind}" for kind in kinds] == [k for k in figures if k.startswith("resnet")]
    asked = []

    def figure(dataset: str, name: str, caption: str) -> str:
        asked.append(name)
        return f"![{caption}]({name}.png)"

    text = environment().get_template("setup4.md.jinja").render(
        parts={"mnist": result.values}, seconds={"mnist": 1.0}, config=context.config, paper={},
        NETWORKS=NETWORKS, figure=figure,
    )  # fmt: skip
    assert sorted(asked) == sorted(figures)
    for network in NETWORKS:
        for image in result.values[network]["images"]:
            assert f"| {result.values[network]['title']} | {image['image']} |" in text


def test_text_follows_the_values(context: Context, result: Result) -> None:
    def told(dataset: str = "mnist", gain: float = 0.1, **facts: object) -> str:
        values = copy.deepcopy(result.values)
        values["ResNet"] |= facts
        values["ResNet"]["attacks"]["highest"]["damped"] |= {
            "lift": gain, "lift_interval": [gain - 0.05, gain + 0.05], "gain": gain,
            "gain_interval": [gain - 0.05, gain + 0.05],
        }  # fmt: skip
        return environment().get_template("setup4.md.jinja").render(
            parts={dataset: values}, seconds={}, config=context.config, paper={},
            NETWORKS=NETWORKS, figure=lambda dataset, name, caption: caption,
        )  # fmt: skip

    assert "more often than by chance" in told() and "0.1 more than by chance" in told()
    fewer = told(gain=-0.1)
    assert "less often than by chance" in fewer and "falls by 0.1 less than by chance" in fewer
    assert "no image is classified correctly with" in told(candidates=0, bound=None)
    assert "images of the largest exact FI with" in told(candidates=9, bound=0.9)
    assert "their own image" in told() and "another order" in told("cifar10")


def test_the_authors_images() -> None:
    # The authors' files of CIFAR-10 have another order.
    assert set(setup4.AUTHORS) == {("mnist", n) for n in NETWORKS}
    assert all(0 <= a.image < setup4.WHOLE for listed in setup4.AUTHORS.values() for a in listed)
