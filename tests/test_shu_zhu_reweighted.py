"""Training with influential images weighted down: wrong labels, weights, tests, the part as a
whole."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from shu_zhu_small import SmallContext, rendered
from shu_zhu_tiny import tiny_config
from sklearn.metrics import roc_auc_score

from examples.shu_zhu_2019 import reweighted
from examples.shu_zhu_2019.data import Images
from examples.shu_zhu_2019.section import Result
from examples.shu_zhu_2019.training import load_weights, logits


def _images(count: int) -> Images:
    y = torch.arange(count) % 10
    return Images(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), y, torch.arange(count))


def test_wrong_labels_are_wrong_and_the_others_are_not() -> None:
    images = _images(2_000)
    data = reweighted.mislabelled(images, 0.3, 10, seed=1)
    assert int(data.flipped.sum()) == 600
    assert torch.equal(data.images.y != images.y, data.flipped)
    assert torch.equal(images.y, torch.arange(2_000) % 10)  # the images given keep their labels
    moved = (data.images.y - images.y)[data.flipped] % 10
    assert sorted(set(moved.tolist())) == list(range(1, 10))  # every other class comes up
    assert torch.equal(reweighted.mislabelled(images, 0.3, 10, 1).images.y, data.images.y)
    assert not torch.equal(reweighted.mislabelled(images, 0.3, 10, 2).images.y, data.images.y)
    with pytest.raises(ValueError, match="share below 1 of 2000 images, got 1"):
        reweighted.mislabelled(images, 1.0, 10, 1)


def test_weights_give_cross_entropy_the_gradient_of_a_bounded_loss() -> None:
    z = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (4 * z).requires_grad_()
    y = torch.arange(50) % 7
    log_prob = z.log_softmax(1)[torch.arange(50), y]
    weight = reweighted.weights((1 / log_prob.detach().exp() - 1).numpy())
    (found,) = torch.autograd.grad((weight.double() * -log_prob).sum(), z, retain_graph=True)
    (expected,) = torch.autograd.grad((1 - log_prob.exp()).sum(), z)
    # The weights are float32: 6e-8 of each.
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-12)
    assert weight.min() > 0 and weight.max() <= 1


def test_mcnemars_test() -> None:
    first = torch.tensor([True] * 90 + [False] * 10)
    second = first.clone()
    second[:1] = False
    second[90:97] = True
    found = reweighted.paired(first, second)
    assert (found["lost"], found["won"]) == (1, 7)
    assert found["p"] == pytest.approx(2 * (1 + 8) / 2**8)  # two tails of eight fair coins
    assert found["gain"] == pytest.approx(0.06)
    # Standard error of the mean of the paired differences, from the differences themselves.
    each = (second.double() - first.double()).numpy()
    half = 1.96 * each.std() / 10
    assert found["interval"] == pytest.approx([0.06 - half, 0.06 + half])
    back = reweighted.paired(second, first)
    assert back["p"] == found["p"] and back["gain"] == -found["gain"]
    same = reweighted.paired(first, first)
    assert same == {"lost": 0, "won": 0, "gain": 0, "interval": [0, 0], "p": 1}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> SmallContext:
    root = tmp_path_factory.mktemp("reweighted")
    return SmallContext(
        tiny_config(root, flipped_images=900, flipped_epochs=6, flipped=0.1, rule_images=60)
    )


@pytest.fixture(scope="module")
def result(context: SmallContext) -> Result:
    return reweighted.compute(context, "mnist")


def test_values_are_those_of_the_networks(context: SmallContext, result: Result) -> None:
    test, values = context.images("mnist", "test"), result.values
    starts = context.new_model("mnist", "ResNet").state_dict()
    for name in reweighted.TRAININGS:
        model = context.new_model("mnist", "ResNet")
        load_weights(model, context.weights(f"mnist-ResNet-flipped-{name}"))
        right = logits(model, test, "cpu").argmax(1) == test.y
        assert values["accuracy"][name] == pytest.approx(float(right.double().mean()))
        assert values["error"][name] == pytest.approx(
            float(right.double().numpy().std() / 297**0.5)
        )
        assert not torch.equal(model.state_dict()["network.2.weight"],
                               starts["network.2.weight"])  # fmt: skip
    assert values["weighted"]["gain"] == pytest.approx(
        values["accuracy"]["weighted"] - values["accuracy"]["equal"]
    )


def test_fi_is_the_given_labels_and_finds_wrong_ones(context: SmallContext, result: Result) -> None:
    train, values = context.images("mnist", "train"), result.values
    fi, flipped = result.arrays["fi"], result.arrays["flipped"].astype(bool)
    assert len(fi) == values["images"] == 900 and flipped.sum() == values["flipped"] == 90
    at = reweighted.balanced(train.y, 900, 10, context.config.seed)
    data = reweighted.mislabelled(train.take(at), 0.1, 10, context.config.seed)
    model = context.new_model("mnist", "ResNet")
    load_weights(model, context.weights("mnist-ResNet-flipped-equal"))
    p = logits(model, data.images, "cpu").double().softmax(1)
    p_y = p.gather(1, data.images.y[:, None])[:, 0].numpy()
    # Logits of float32: 1 - P errs by its epsilon times logits of up to about 30.
    np.testing.assert_allclose(1 / (1 + fi.astype(float)), p_y, rtol=1e-4, atol=1e-6)
    assert values["weight"]["flipped"] == pytest.approx(p_y[flipped].mean(), rel=1e-4)
    found = values["all"]["scores"]["exact"]
    assert found["roc"] == pytest.approx(roc_auc_score(flipped, fi), abs=1e-6)
    assert found["roc"] > 0.9  # a network of 95 % accuracy contradicts most wrong labels
    top = np.argsort(-fi)[:45]
    assert values["most"]["images"] == 45
    assert values["most"]["precision"] == pytest.approx(flipped[top].mean())
    assert values["most"]["recall"] == pytest.approx(flipped[top].sum() / 90)
    subset = values["subset"]
    assert (subset["images"], subset["outliers"]) == (60, 30)
    assert subset["prevalence"] == pytest.approx(0.1)
    assert set(subset["scores"]) == {"exact", "damped"}


def test_weights_change_training_and_a_second_run_reads_what_the_first_kept(
    context: SmallContext, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [context.weights(f"mnist-ResNet-flipped-{name}") for name in reweighted.TRAININGS]
    assert len({path.read_bytes() for path in paths}) == 3
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing is trained again
    again = reweighted.compute(context, "mnist")
    assert again.values == result.values


def test_result_is_json_drawn_and_told(context: SmallContext, result: Result) -> None:
    json.dumps(result.values, allow_nan=False)
    figures = reweighted.draw("mnist", result)
    assert list(figures) == ["scores"] and isinstance(figures["scores"], Figure)
    text = rendered(context, "reweighted", {"mnist": result, "cifar10": result})
    assert "### MNIST" in text and "### CIFAR-10" in text and "figure cifar10 scores" in text


def test_text_follows_the_values(context: SmallContext, result: Result) -> None:
    def told(gain: float, p: float, memorised: float, oracle: float = 1.0) -> str:
        changed = copy.deepcopy(result)
        changed.values["oracle"]["p"] = oracle
        changed.values["weighted"] |= {"gain": gain, "p": p}
        changed.values["memorised"] = memorised
        return rendered(context, "reweighted", {"mnist": changed})

    assert "weights by FI is more accurate than" in told(0.01, 0.01, 0.0)
    assert "weights by FI is less accurate than" in told(-0.01, 0.01, 0.0)
    assert "weights by FI is not clearly different from" in told(0.01, 0.2, 0.0)
    assert "Even the oracle" in told(0.01, 0.2, 0.0)
    worse = told(-0.01, 0.01, 0.0)
    assert "Even the oracle" not in worse and "clearly less accurate with them" in worse
    assert "oracle makes no" not in told(-0.01, 0.01, 0.0, oracle=0.01)
    assert "memorised most" in told(0.0, 1.0, 0.8)
    assert "memorised some" in told(0.0, 1.0, 0.3)
    assert "memorised few" in told(0.0, 1.0, 0.05)
