"""Weights files: what is accepted, what is refused, and that none of them runs code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from cli_project import make_project
from torch import nn

from fastfi.cli._weights import load_weights
from fastfi.errors import WeightsError


class Net(nn.Module):
    """Weights, buffers, a list and a reused prefix: names as real models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def trained():
    """A state dict that differs from a new model's everywhere."""
    model = Net()
    with torch.no_grad():
        for i, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(i + 1)
    return model.state_dict()


def assert_loaded(path: Path, state: dict[str, torch.Tensor]) -> None:
    model = Net()
    load_weights(model, path)
    for key, value in model.state_dict().items():
        if key in state:
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors(tmp_path, trained, suffix):
    from safetensors.torch import save_file

    save_file(trained, tmp_path / f"w{suffix}")  # recognised by its content as well
    assert_loaded(tmp_path / f"w{suffix}", trained)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_torch_files(tmp_path, trained, wrapper, zipped):
    content = trained if wrapper is None else {"epoch": 3, wrapper: trained, "lr": 0.1}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert_loaded(tmp_path / "w.pt", trained)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_removed(tmp_path, trained, prefix):
    torch.save({prefix + k: v for k, v in trained.items()}, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", trained)


def test_submodules_compiled_one_by_one(tmp_path, trained):
    renamed = {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in trained.items()}
    torch.save(renamed, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", trained)


def test_a_model_whose_own_names_begin_with_a_prefix(tmp_path):
    """Removing "module." is not done where the keys fit as they are."""
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.module.weight, state["module.weight"])


def test_half_precision_weights_are_converted(tmp_path, trained):
    torch.save({k: v.half() for k, v in trained.items()}, tmp_path / "w.pt")
    model = Net()
    load_weights(model, tmp_path / "w.pt")
    assert model.conv.weight.dtype == torch.float32
    assert torch.equal(model.conv.weight, trained["conv.weight"])


def test_harmless_absences(tmp_path, trained):
    del trained["bn.num_batches_tracked"]
    torch.save(trained, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", trained)
    weight = torch.arange(9.0).reshape(3, 3)
    torch.save({"embed.weight": weight}, tmp_path / "tied.pt")
    model = Tied()
    load_weights(model, tmp_path / "tied.pt")
    assert torch.equal(model.head.weight, weight)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_misfit_is_named_and_nothing_is_loaded(tmp_path, trained, prefix):
    del trained["bn.running_mean"], trained["conv.bias"]
    trained["extra.weight"] = torch.zeros(4, 5)
    trained["blocks.1.weight"] = torch.zeros(3, 2)
    torch.save({prefix + k: v for k, v in trained.items()}, tmp_path / "w.pt")
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "w.pt")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'w.pt'} does not fit the model Net:",
        "  2 missing (in the model, not in the file): conv.bias [2], bn.running_mean [2]",
        "  1 wrong shape: blocks.1.weight: expected [2, 2], got [3, 2]",
        "  1 unexpected (in the file, not in the model): extra.weight [4, 5]",
    ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_long_lists_are_cut(tmp_path, trained):
    trained |= {f"extra.{i}": torch.zeros(1) for i in range(20)}
    torch.save(trained, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"20 unexpected .*extra\.7 \[1\], and 12 more"):
        load_weights(Net(), tmp_path / "w.pt")


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["pickle", "legacy", "zip", "inside"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_malicious_pickle_does_not_run(tmp_path, monkeypatch, trained, form, forced):
    if forced:  # an environment that asks torch to unpickle everything
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, path = tmp_path / "ran", tmp_path / "w.pt"
    trap = Trap(target)
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif form == "inside":
        torch.save({"state_dict": trained, "hook": trap}, path)
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="refused: not a PyTorch file of plain tensors"):
        load_weights(Net(), path)
    assert not target.exists()
    # the trap is real: an ordinary load springs it
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()


def test_a_malicious_pickle_through_the_command(tmp_path, monkeypatch):
    project = make_project(tmp_path, monkeypatch)
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    result = project.score("--weights", "w.pt")
    assert result.exit_code == 2
    assert "w.pt: refused" in result.stderr
    assert project.files() == {"w.pt"}


def test_whole_models_are_refused(tmp_path):
    torch.save(Net(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"refused.*save model\.state_dict\(\)"):
        load_weights(Net(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "expected a state dict .names and tensors., got Tensor"),
        ({}, "expected a state dict"),
        ({"epoch": 3, "lr": 0.1}, r"these entries are not tensors: epoch \(int\), lr \(float\)"),
    ],
)
def test_files_that_are_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(Net(), tmp_path / "w.pt")


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_files_are_named(tmp_path, trained, form, kept):
    from safetensors.torch import save_file

    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(trained, path)
    else:
        torch.save(trained, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(WeightsError, match=path.name):
        load_weights(Net(), path)


def test_other_files_are_named(tmp_path):
    for name, content in [("page.pt", b"<html>not found</html>"), ("w.safetensors", b"x" * 50)]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            load_weights(Net(), tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(WeightsError, match=r"other\.pt"):
        load_weights(Net(), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"nowhere\.pt: cannot be read: No such file"):
        load_weights(Net(), tmp_path / "nowhere.pt")
