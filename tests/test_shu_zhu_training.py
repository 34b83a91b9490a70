"""Training of the reproduction: what is interrupted goes on to the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.shu_zhu_2019 import training
from examples.shu_zhu_2019.data import Images
from examples.shu_zhu_2019.networks import Dropout, Scaled
from examples.shu_zhu_2019.training import Plan, accuracy, load_weights, prepared, train

PLAN = Plan(epochs=3, batch=16, rate=1e-2, checkpoint_seconds=0)


def _images(count: int = 100) -> Images:
    """Two classes told apart by which half is bright."""
    y = torch.arange(count) % 2
    x = torch.randint(0, 100, (count, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    x[y == 1, :, :3] += 120
    return Images(x.byte(), y, torch.arange(count))


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Dropout()
    # Weights of several channels: they lie otherwise in memory, channels last.
    deeper = nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2)
    return prepared(Scaled(nn.Sequential(*layers, *deeper)), "cpu")


def _same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_training_learns_and_is_kept(tmp_path: Path) -> None:
    model, images = _model(), _images()
    notes = train(model, images, images, PLAN, tmp_path / "a" / "w.safetensors", label="two")
    assert not model.training
    assert accuracy(model, images, "cpu") == 1.0
    assert [line["epoch"] for line in notes["history"]] == [1, 2, 3]
    assert notes["history"][-1]["validation_accuracy"] == 1.0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["w.safetensors"]
    other = _model()
    again = train(other, images, images, PLAN, tmp_path / "a" / "w.safetensors", label="two")
    assert again == notes and _same(model, other) and not other.training


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 8, 13, 20])
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    images = _images()  # seven steps an epoch
    whole = _model()
    train(whole, images, None, PLAN, tmp_path / "whole.safetensors")
    real, steps = training._step, iter(range(1, 1_000))

    def step(*given: object) -> float:
        if next(steps) == at:
            raise _Killed
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_step", step)
    with pytest.raises(_Killed):
        train(_model(), images, None, PLAN, tmp_path / "cut.safetensors")
    assert not (tmp_path / "cut.safetensors").exists()
    monkeypatch.setattr(training, "_step", real)
    resumed = _model()
    torch.manual_seed(99)  # what came before in the process does not matter
    notes = train(resumed, images, None, PLAN, tmp_path / "cut.safetensors")
    assert _same(whole, resumed)
    assert [line["epoch"] for line in notes["history"]] == [1, 2, 3]


def test_a_checkpoint_left_beside_finished_weights_goes(tmp_path: Path) -> None:
    images, path = _images(), tmp_path / "w.safetensors"
    train(_model(), images, None, PLAN, path)
    left = tmp_path / "w.training.safetensors"
    left.write_bytes(b"of a process killed before it could remove it")
    train(_model(), images, None, PLAN, path)
    assert not left.exists()


def test_other_settings_are_refused_not_mixed(tmp_path: Path) -> None:
    images, path = _images(), tmp_path / "w.safetensors"
    train(_model(), images, None, PLAN, path)
    with pytest.raises(SystemExit, match="weights of another training"):
        train(_model(), images, None, replace(PLAN, rate=1e-3), path)


def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path, real = _images(), tmp_path / "w.safetensors", training._step
    calls = iter(range(1_000))

    def step(*given: object) -> float:
        if next(calls) == 3:
            raise _Killed
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_step", step)
    with pytest.raises(_Killed):
        train(_model(), images, None, PLAN, path)
    with pytest.raises(SystemExit, match="checkpoint of another training"):
        train(_model(), images, None, replace(PLAN, epochs=4), path)


def test_weights_of_zero_leave_images_out(tmp_path: Path) -> None:
    images = _images()
    wrong = images.y.clone()
    wrong[:40] = 1 - wrong[:40]
    weight = torch.ones(100)
    weight[:40] = 0
    noisy = Images(images.x, wrong, images.rows)
    plan = replace(PLAN, epochs=8)
    model = _model()
    train(model, noisy, None, plan, tmp_path / "w.safetensors", weight=weight)
    assert accuracy(model, images, "cpu") == 1.0


def test_a_step_s_loss_is_the_weighted_mean() -> None:
    model, images = _model().eval(), _images()
    at, weight = torch.tensor([3, 4, 8]), torch.rand(100)
    z: Tensor = model(images.pixels(at)).detach()
    each = nn.functional.cross_entropy(z, images.y[at], reduction="none")
    expected = float((each * weight[at]).sum() / weight[at].sum())
    assert training._step(model, images, at, weight, "cpu") == pytest.approx(expected, rel=1e-5)


def test_settled_norms_have_the_statistics_without_dropout() -> None:
    model, images = _model(), _images()
    inner = model.network
    inner[3].rate = 0.5
    with torch.no_grad():
        after = inner[0](images.pixels() / 255)  # [100, 4, 4, 4], what the norm sees
    # A second norm, behind the dropout.
    inner.insert(4, nn.BatchNorm2d(4))
    after = after.contiguous()
    training.settle(model, images, 0, "cpu")
    assert not model.training and not inner[3].training
    norm, second = inner[1], inner[4]
    torch.testing.assert_close(norm.running_mean, after.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, after.var((0, 2, 3)))
    with torch.no_grad():
        behind = inner[2](norm(after))  # in eval mode: as the images are normalised in the end
    torch.testing.assert_close(second.running_mean, behind.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(second.running_var, behind.var((0, 2, 3)), rtol=2e-2, atol=1e-3)
    assert norm.momentum == second.momentum == 0.1
    assert norm.num_batches_tracked == 1


def test_the_rate_grows_then_falls_to_zero() -> None:
    rates = [PLAN.rate_at(step, 50) for step in range(50)]
    assert max(rates) == pytest.approx(1e-2) and rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 1e-4


def test_weights_files_are_safetensors_with_notes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model = _model()
    train(model, _images(), None, PLAN, path)
    other = _model()
    assert load_weights(other, path)["seconds"] > 0
    assert _same(model, other)
