"""``fastfi map``: the maps, the choice of images, and every message about a bad call."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_maps import OLD, map_project, read_maps, run, write_images
from cli_project import images
from data_files import encoded, pixels, real_data
from typer.testing import CliRunner

import fastfi
from fastfi.cli._app import app
from fastfi.data import open_dataset, select
from fastfi.errors import DataError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def project(tmp_path, monkeypatch):
    return map_project(tmp_path, monkeypatch)


# What is computed.


@pytest.mark.parametrize("out", ["m.npz", "m.parquet"])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_maps_are_those_of_the_python_interface(project, out, batch_size):
    result = run(project, "--batch-size", batch_size, "--scales", "1,3", out=out)
    assert result.exit_code == 0, result.stderr
    x, y = images(project)
    want = fastfi.influence_map(project.model(), x, scales=(1, 3), full_output=True)
    got = read_maps(out)
    assert got["maps"].shape == (10, 2, 1, 5, 6)
    assert got["maps"].dtype == np.float32
    np.testing.assert_allclose(got["maps"], want.fi, rtol=1e-5)
    assert got["scales"].tolist() == [1, 3]
    assert got["id"].tolist() == list(range(10))
    assert got["label"].tolist() == y.tolist()
    assert got["predicted"].tolist() == want.label.tolist()
    np.testing.assert_allclose(got["log_prob"], want.log_prob, rtol=1e-6)
    assert "rank" not in got
    assert project.files() == {out}
    assert "maps [2, 1, 5, 6] each" in result.stdout
    assert f"in {out}" in result.stdout


@pytest.mark.parametrize("out", ["m.npz", "m.parquet"])
@pytest.mark.parametrize("name", ["exact", "truncated"])
@pytest.mark.parametrize("channels", ["separate", "joint", "mean"])
def test_inverses_and_channels(project, out, name, channels):
    write_images(project.folder / "img", 3, 2, 5, 3)  # 30 numbers, as the model takes
    options = ["--data", "img", "--inverse", name, "--channels", channels, "--scales", "3,1"]
    result = run(project, *options, "--batch-size", 2, out=out)
    assert result.exit_code == 0, result.stderr
    x = next(open_dataset(project.folder / "img").batches()).x
    want = fastfi.influence_map(
        project.model(), x, scales=(3, 1), inverse=name, channels=channels, full_output=True
    )
    got = read_maps(out)
    np.testing.assert_allclose(got["maps"], want.fi, rtol=1e-4)
    assert got["rank"].shape == want.rank.shape
    assert (got["rank"] == want.rank.numpy()).all()
    assert got["id"].tolist() == ["0.png", "1.png", "2.png"]
    assert "label" not in got


def test_labels_of_the_data(project):
    assert run(project, "--labels", "true", "--scales", "3").exit_code == 0
    x, y = images(project)
    model = project.model()
    got = read_maps("m.npz")
    want = fastfi.influence_map(model, x, y, scales=(3,), full_output=True)
    np.testing.assert_allclose(got["maps"], want.fi, rtol=1e-5)
    np.testing.assert_allclose(got["log_prob"], want.log_prob, rtol=1e-6)
    assert got["label"].tolist() == y.tolist()
    assert got["predicted"].tolist() == model(x).argmax(1).tolist() != y.tolist()


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        (["--objective", "entropy"], {"objective": "entropy"}),
        (["--lump", "0.2"], {"lump": 0.2}),
        (["--alpha", "0.5"], {"inverse": fastfi.Damped(0.5)}),
        (["--memory-budget", "1MB"], {"memory_budget": 10**6}),
    ],
)
def test_options_reach_influence_map(project, options, kwargs):
    result = run(project, *options)
    assert result.exit_code == 0, result.stderr
    want = fastfi.influence_map(project.model(), images(project)[0], **kwargs)
    np.testing.assert_allclose(read_maps("m.npz")["maps"], want, rtol=1e-5)


def test_the_archive(project):
    options = ["--scales", "1", "--mean", "0.5", "--inverse", "exact", "--limit", "5"]
    assert run(project, *options).exit_code == 0
    arrays = read_maps("m.npz")
    assert arrays["rank"].dtype == np.int16
    assert {n: a.dtype.str[1:] for n, a in arrays.items() if a.ndim == 1} == {
        **{"scales": "i8", "id": "i8", "predicted": "i8", "label": "i8", "log_prob": "f8"}
    }
    metadata = json.loads(str(arrays["config"]))
    assert metadata["fastfi.torch"] == torch.__version__
    config = metadata["fastfi.config"]
    assert (config["model"], config["data"]) == (f"{project.name}:Net", str(project.data))
    assert (config["scales"], config["mean"], config["limit"]) == ([1], [0.5], 5)
    assert config["inverse"] == repr(fastfi.Exact())
    with zipfile.ZipFile("m.npz") as file:
        kinds = {i.filename: i.compress_type for i in file.infolist()}
        assert file.testzip() is None
    assert kinds["maps.npy"] == zipfile.ZIP_STORED
    assert kinds["rank.npy"] == zipfile.ZIP_DEFLATED


# Which images.


@pytest.mark.parametrize("out", ["m.npz", "m.parquet"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_ids(project, out, batch_size):
    options = ["--ids", "7, 2,9", "--ids", "2", "--scales", "3", "--batch-size", batch_size]
    assert run(project, *options, out=out).exit_code == 0
    got = read_maps(out)
    x, y = images(project)
    assert got["id"].tolist() == [2, 7, 9]
    assert got["label"].tolist() == y[[2, 7, 9]].tolist()
    want = fastfi.influence_map(project.model(), x[[2, 7, 9]], scales=(3,))
    np.testing.assert_allclose(got["maps"], want, rtol=1e-5)


def test_ids_of_a_folder_are_paths_and_nothing_else_is_decoded(project):
    for name in ("cat", "dog"):
        (project.folder / "img" / name).mkdir(parents=True)
        for i in range(2):
            content = encoded(pixels(5, 6, seed=i))
            (project.folder / "img" / name / f"{i},{i}.png").write_bytes(content)
    (project.folder / "img" / "dog" / "2.png").write_bytes(b"damaged")
    options = ["--data", "img", "--ids", "dog/1,1.png", "--labels", "true"]
    assert run(project, *options).exit_code == 0
    got = read_maps("m.npz")
    assert (got["id"].tolist(), got["label"].tolist()) == (["dog/1,1.png"], [1])
    result = run(project, "--data", "img", "--ids", "bird.png,dog/2.png", "--overwrite")
    assert result.exit_code == 2
    assert "--ids: img has no image 'bird.png'; its ids are 'cat/0,0.png'" in result.stderr


def test_a_selection_does_not_change_the_colour(tmp_path):
    """The data's first image says that it is grey, chosen or not."""
    write_images(tmp_path, 1, 5, 6)
    (tmp_path / "1.png").write_bytes(encoded(pixels(5, 6, 3)))
    chosen = select(open_dataset(tmp_path), ["1.png"])
    assert chosen.shape == (1, 5, 6)
    with pytest.raises(DataError, match=r"1\.png: an image in colour"):
        list(chosen.batches())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("3,10,-1,x", "data.npz has no image '10', '-1', 'x'; its ids are 0 to 9"),
        (",", "--ids: expected at least one id, got none"),
    ],
)
def test_unknown_ids(project, ids, message):
    result = run(project, "--ids", ids)
    assert result.exit_code == 2
    assert message in result.stderr
    assert project.files() == set()


def test_image_files(project):
    write_images(project.folder / "img", 3, 5, 6)
    assert run(project, "--data", "img/1.png").exit_code == 0
    got = read_maps("m.npz")
    x = next(open_dataset(project.folder / "img").batches()).x
    np.testing.assert_allclose(
        got["maps"], fastfi.influence_map(project.model(), x[1:2]), rtol=1e-5
    )
    assert got["id"].tolist() == ["img/1.png"]
    result = run(project, "--data", "img/2.png", "--data", "img/0.png", "--overwrite")
    assert result.exit_code == 0
    assert read_maps("m.npz")["id"].tolist() == ["img/2.png", "img/0.png"]
    config = json.loads(str(read_maps("m.npz")["config"]))["fastfi.config"]
    assert config["data"] == ["img/2.png", "img/0.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a/0.png", "a/none.png"], "a/none.png: no such image file"),
        (["a/0.png", "a/0.png"], "a/0.png: given more than once"),
        (["a/0.png", "b/1.png"], "b/1.png: expected the size of the first image, 5 x 6"),
        (["a/0.png", "data.npz"], "data.npz: expected one data set, or several image files"),
        (["a", "b"], "a: expected one data set, or several image files"),
        (["none.png"], "none.png: no such file"),
        (["a/0.png", "--split=test"], "split='test' applies to"),
        (["a/0.png", "--labels=true"], "0.png has no labels; --labels predicted uses"),
    ],
)
def test_bad_image_files(project, options, message):
    write_images(project.folder / "a", 1, 5, 6)
    write_images(project.folder / "b", 2, 6, 5)
    paths = [o for o in options if not o.startswith("-")]
    others = [o for o in options if o.startswith("-")]
    result = run(project, *(part for p in paths for part in ("--data", p)), *others)
    assert result.exit_code == 2
    assert message in result.stderr
    assert project.files() == {"a", "b"}


# Messages.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "1,2"], "scales: expected distinct odd numbers of pixels"),
        (["--scales", "1,a"], "--scales: expected integers separated by commas, got '1,a'"),
        (["--ids", "1", "--limit", "2"], "expected --ids or --limit, got both"),
        (["--eps", "1"], "--eps belongs to --inverse truncated, not to damped"),
        (["--mean", "1,2"], "--mean: expected 1 number or 1, one per channel, got 2"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--objective", "nothing"], "objective"),
        (["--weights", "nowhere.pt"], "nowhere.pt: cannot be read: No such file"),
        (["--out", "m.csv"], "--out m.csv: expected a name ending in .npz or .parquet"),
    ],
)
def test_bad_options(project, options, message):
    result = run(project, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    assert project.files() == set()


def test_an_existing_file_is_kept(project):
    Path("m.npz").write_bytes(OLD)
    result = run(project)
    assert result.exit_code == 2
    assert "--out m.npz: exists already; --overwrite replaces it" in result.stderr
    assert Path("m.npz").read_bytes() == OLD
    assert run(project, "--overwrite").exit_code == 0
    assert len(read_maps("m.npz")["id"]) == 10


def test_labels_out_of_range_are_named(project):
    np.savez(project.data, x=pixels(10, 1, 5, 6), y=np.array([0] * 6 + [9] + [0] * 3))
    result = run(project, "--labels", "true", "--batch-size", 4)
    assert result.exit_code == 2
    assert "data.npz, image 6:" in result.stderr
    assert project.files() == set()


def test_progress(project):
    result = run(project, "--progress")
    assert "mapped 10 of 10, 0 s left" in result.stderr
    assert "mapped" not in run(project, "--overwrite").stderr


def test_help():
    result = CliRunner().invoke(app, ["map", "--help"])
    assert result.exit_code == 0
    for option in ("--figures", "--ids", "--scales", "--channels", "--labels", "--overwrite"):
        assert option in result.stdout
    assert "[default: predicted]" in result.stdout
    assert CliRunner().invoke(app, ["map"]).exit_code == 2


def test_select_refuses_nothing(project):
    with pytest.raises(OptionError, match="expected at least one id"):
        select(open_dataset(project.data), [])


def test_mnist_from_end_to_end(project):
    folder = real_data("mnist")
    (project.folder / "digits.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 5, 2), nn.Flatten(), nn.Linear(576, 10))\n"
    )
    arguments = ["map", "--model", "digits:net", "--data", str(folder), "--split", "test"]
    arguments += ["--ids", "17,29,3", "--out", "mnist.npz"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    got = read_maps("mnist.npz")
    assert got["maps"].shape == (3, 4, 1, 28, 28)
    assert got["label"].tolist() == [0, 7, 1]
    assert np.isfinite(got["maps"]).all()
