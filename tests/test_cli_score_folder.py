"""``fastfi score`` into a folder: what the command adds to ``fastfi.score``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_project import Project, images, make_project
from typer.testing import CliRunner

import fastfi
from fastfi.cli._app import app

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return make_project(tmp_path, monkeypatch)


def column(name: str, folder: str = "s") -> np.ndarray:
    return fastfi.open_scores(folder).to_table([name]).column(name).to_numpy()


def test_a_folder_of_scores(project):
    result = project.score("--part-rows", "20", "--mean", "0.1", "--std", "0.5", out="s")
    assert result.exit_code == 0, result.stderr
    assert "50 images, accuracy " in result.stdout
    assert "FI of the input" in result.stdout
    assert " in s\n" in result.stdout
    x, y = images(project)
    expected = fastfi.influence(project.model(), (x - 0.1) / 0.5, y, dtype=torch.float64)
    np.testing.assert_allclose(column("fi"), expected.numpy(), rtol=1e-4)
    assert sorted(p.name for p in Path("s").iterdir()) == [
        "_fastfi.json",
        "part-000000000000-000000000020.parquet",
        "part-000000000020-000000000040.parquet",
        "part-000000000040-000000000050.parquet",
    ]
    notes = json.loads(Path("s/_fastfi.json").read_text())["notes"]
    assert notes["model"] == f"{project.name}:Net"
    assert notes["mean"] == [0.1]


def test_both_labels_and_several_objectives(project):
    result = project.score("--labels", "both", "--objective", "cross_entropy,entropy", out="s")
    assert result.exit_code == 0, result.stderr
    assert "fi@cross_entropy" in result.stdout
    assert "fi@entropy" in result.stdout
    x, y = images(project)
    model = project.model()
    for name, labels in (("fi@cross_entropy", y), ("predicted_fi@cross_entropy", None)):
        expected = fastfi.influence(model, x, labels, dtype=torch.float64)
        np.testing.assert_allclose(column(name), expected.numpy(), rtol=1e-4)


def test_layers(project):
    result = project.score("--wrt", "layers", "--inverse", "damped", out="s")
    assert result.exit_code == 0, result.stderr
    assert "FI of 2 blocks" in result.stdout
    scores = fastfi.open_scores("s")
    assert scores.blocks == ("hidden", "head")
    assert scores.to_table(["rank:head"]).column(0).null_count == 50


def test_the_same_command_goes_on(project):
    options = ["--part-rows", "20", "--batch-size", "10"]
    assert project.score(*options, out="s").exit_code == 0
    before, shapes = column("fi"), []
    project.module.on_call = lambda number, x: shapes.append(len(x))
    assert project.score(*options, out="s").exit_code == 0
    assert sum(shapes) <= 1  # the sample by which the model is recognised
    Path("s/part-000000000020-000000000040.parquet").unlink()
    assert project.score(*options, out="s").exit_code == 0
    assert 20 <= sum(shapes) < 30
    assert (column("fi") == before).all()


def test_another_run_is_refused(project):
    assert project.score(out="s").exit_code == 0
    result = project.score("--inverse", "damped", out="s")
    assert result.exit_code == 2
    assert "configuration, inverse: 'Exact(rtol=None)' there, 'Damped(alpha=0.01)' now" in (
        result.stderr
    )
    assert project.score("--no-resume", out="s").exit_code == 2
    assert project.score("--inverse", "damped", "--overwrite", out="s").exit_code == 0
    assert fastfi.open_scores("s").config["inverse"] == "Damped(alpha=0.01)"


def test_failing_images_are_noted(project):
    with np.load(project.data) as arrays:
        x, y = arrays["x"].astype(np.float32) / 255, arrays["y"].copy()
    x[3, 0, 0, 0], y[7] = np.nan, 99
    np.savez("bad.npz", x=x, y=y)
    result = project.score("--data", "bad.npz", out="s")
    assert result.exit_code == 0, result.stderr
    assert "2 of 50 images have no score" in result.stderr
    errors = fastfi.open_scores("s").to_table(["id", "error"]).to_pylist()
    assert {r["id"]: r["error"] for r in errors if r["error"]} == {
        3: "x: expected finite pixels, got NaN or infinite ones",
        7: "y: expected labels from 0 to 3, got 99",
    }
    strict = project.score("--data", "bad.npz", "--strict", out="t")
    assert strict.exit_code == 2
    assert "finite" in strict.stderr or "labels" in strict.stderr


@pytest.mark.parametrize(
    ("options", "out", "message"),
    [
        (["--workers", "2"], "s.csv", "--workers: expected --out to be a folder, got the file"),
        (["--strict"], "s.parquet", "--strict: expected --out to be a folder"),
        (["--labels", "both"], "s.csv", "--labels both: expected --out to be a folder"),
        (["--objective", "entropy,margin"], "s.csv", "several objectives: expected --out"),
        (["--batch-size", "0"], "s", "--batch-size: expected a number from 1 up, or auto, got '0'"),
        (["--shard", "2/2"], "s", "--shard: expected K/N with K from 0 to N - 1, got '2/2'"),
        (["--shard", "0/2"], "s.csv", "--shard: expected --out to be a folder"),
        (["--objective", "entropy,entropy"], "s", "'entropy' twice"),
        ([], "no/s", "out=no/s: there is no folder no"),
        ([], "s.txt", "expected a name ending in .parquet or .csv, or a folder"),
    ],
)
def test_what_cannot_be(project, options, out, message):
    result = project.score(*options, out=out)
    assert result.exit_code == 2
    assert message in result.stderr
    assert project.files() == set()


def test_unlabelled_data(project):
    with np.load(project.data) as arrays:
        np.savez("plain.npz", x=arrays["x"])
    result = project.score("--data", "plain.npz", out="s")
    assert result.exit_code == 2
    assert "y='predicted'" in result.stderr
    result = project.score("--data", "plain.npz", "--labels", "predicted", out="t")
    assert result.exit_code == 0, result.stderr
    assert "accuracy" not in result.stdout


def test_shares_of_several_machines(project):
    for k in range(3):
        shares = ["--shard", f"{k}/3", "--part-rows", "8"]
        assert project.score(*shares, out=f"m{k}").exit_code == 0
        assert project.score(*shares, out=f"m{k}").exit_code == 0  # nothing is left to do
    assert [len(fastfi.open_scores(f"m{k}")) for k in range(3)] == [18, 16, 16]
    assert not fastfi.open_scores("m0").complete
    done = CliRunner().invoke(app, ["merge", "m0", "m1", "m2", "--out", "all"])
    assert done.exit_code == 0, done.stderr
    assert fastfi.open_scores("all").complete
    assert project.score("--part-rows", "8", out="one").exit_code == 0
    np.testing.assert_allclose(column("fi", "all"), column("fi", "one"), rtol=1e-6)


def test_under_torchrun(project):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "fastfi.cli", "score", "--model", f"{project.name}:Net", "--out", "s"]
    command += ["--data", str(project.data), "--part-rows", "16", "--no-progress"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("50 images") == 1  # one process tells
    x, y = images(project)
    expected = fastfi.influence(project.model(), x, y, dtype=torch.float64)
    np.testing.assert_allclose(column("fi"), expected.numpy(), rtol=1e-4)
