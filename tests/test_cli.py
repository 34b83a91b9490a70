"""``fastfi score``: the scores, the options, and every message about a bad call."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_project import CLASSES, images, make_project, read_scores
from data_files import encoded, pixels, real_data
from typer.testing import CliRunner

import fastfi
from fastfi.cli._app import app, parse_bytes
from fastfi.cli._summary import percentile, percentile_table
from fastfi.errors import OptionError


@pytest.fixture
def project(tmp_path, monkeypatch):
    return make_project(tmp_path, monkeypatch)


def expected(project, y, batch_size=256, **options):
    """The same scores through the Python interface."""
    x, _ = images(project)
    parts = [
        fastfi.influence(project.model(), *b, full_output=True, dtype=torch.float64, **options)
        for b in zip(
            x.split(batch_size),
            [None] * math.ceil(len(x) / batch_size) if y is None else y.split(batch_size),
            strict=True,
        )
    ]
    return [torch.cat([getattr(p, f) for p in parts]).tolist() for f in ("fi", "log_prob", "rank")]


@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
@pytest.mark.parametrize("batch_size", [16, 256])
def test_scores_are_those_of_the_python_interface(project, out, batch_size):
    result = project.score("--batch-size", batch_size, out=out)
    assert result.exit_code == 0, result.stderr
    x, y = images(project)
    scores = read_scores(out)
    assert list(scores) == ["id", "label", "predicted", "log_prob", "fi", "rank"]
    assert scores["id"] == list(range(50))
    assert scores["label"] == y.tolist()
    with torch.no_grad():
        z = project.model()(x)
    assert scores["predicted"] == z.argmax(1).tolist()
    fi, log_prob, rank = expected(project, y, batch_size)
    np.testing.assert_allclose(scores["fi"], fi, rtol=1e-12)
    np.testing.assert_allclose(scores["log_prob"], log_prob, rtol=1e-12)
    assert scores["rank"] == rank
    # and log_prob is what it says, independently of fastfi
    truth = z.double().log_softmax(1).gather(1, y[:, None])[:, 0]
    np.testing.assert_allclose(scores["log_prob"], truth, rtol=1e-5)


def test_predicted_labels(project):
    assert project.score("--labels", "predicted").exit_code == 0
    scores = read_scores("s.csv")
    x, y = images(project)
    assert scores["label"] == y.tolist()  # the data's own, for comparison
    fi, log_prob, _ = expected(project, None)
    np.testing.assert_allclose(scores["fi"], fi, rtol=1e-12)
    np.testing.assert_allclose(scores["log_prob"], log_prob, rtol=1e-12)
    assert scores["predicted"] == project.model()(x).argmax(1).tolist()


def test_csv_and_parquet_are_equal_to_the_last_bit(project):
    for out in ("s.csv", "s.parquet"):
        assert project.score("--labels", "predicted", out=out).exit_code == 0
    assert read_scores("s.csv") == read_scores("s.parquet")


@pytest.mark.parametrize(
    ("options", "inverse"),
    [
        (["--inverse", "exact", "--rtol", "1e-5"], fastfi.Exact(rtol=1e-5)),
        (["--inverse", "truncated"], fastfi.Truncated()),
        (["--inverse", "truncated", "--eps", "0.01"], fastfi.Truncated(eps=0.01)),
        (["--inverse", "damped"], fastfi.Damped()),
        (["--inverse", "damped", "--alpha", "0.1"], fastfi.Damped(alpha=0.1)),
    ],
)
def test_inverses(project, options, inverse):
    import pyarrow.parquet as pq

    result = project.score(*options, out="s.parquet")
    assert result.exit_code == 0, result.stderr
    x, y = images(project)
    want = fastfi.influence(
        project.model(), x, y, inverse=inverse, dtype=torch.float64, full_output=True
    )
    scores = read_scores("s.parquet")
    np.testing.assert_allclose(scores["fi"], want.fi, rtol=1e-12)
    assert scores["rank"] == ([None] * 50 if want.rank is None else want.rank.tolist())
    assert (want.rank is None) == isinstance(inverse, fastfi.Damped)
    config = json.loads(pq.read_schema("s.parquet").metadata[b"fastfi.config"])
    assert config["inverse"] == repr(inverse)


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        (["--objective", "entropy"], {"objective": "entropy"}),
        (["--lump", "0.2"], {"lump": 0.2}),
        (["--assume-full-rank"], {"assume_full_rank": True}),
        (["--memory-budget", "1MB"], {"memory_budget": 10**6}),
        (["--outputs", "logits"], {}),
    ],
)
def test_options_reach_influence(project, options, kwargs):
    result = project.score(*options)
    assert result.exit_code == 0, result.stderr
    fi, _, _ = expected(project, images(project)[1], **kwargs)
    np.testing.assert_allclose(read_scores("s.csv")["fi"], fi, rtol=1e-12)


def test_mean_and_std(project):
    assert project.score("--mean", "0.3", "--std", "0.25").exit_code == 0
    x, y = images(project)
    want = fastfi.influence(project.model(), (x - 0.3) / 0.25, y, dtype=torch.float64)
    np.testing.assert_allclose(read_scores("s.csv")["fi"], want, rtol=1e-5)
    result = project.score("--mean", "0.3,0.4", out="t.csv")
    assert result.exit_code == 2
    assert "--mean: expected 1 number or 1, one per channel, got 2" in result.stderr
    result = project.score("--std", "0", out="t.csv")
    assert "--std: expected positive numbers, got [0.0]" in result.stderr
    result = project.score("--std", "a,b", out="t.csv")
    assert "--std: expected numbers separated by commas, got 'a,b'" in result.stderr
    assert project.files() == {"s.csv"}


def test_limit(project):
    assert project.score("--limit", "7", "--batch-size", "3").exit_code == 0
    assert read_scores("s.csv")["id"] == list(range(7))


def test_metadata(project):
    import pyarrow.parquet as pq

    assert project.score("--mean", "0.5", "--limit", "5", out="s.parquet").exit_code == 0
    schema = pq.read_schema("s.parquet")
    assert [(f.name, str(f.type), f.nullable) for f in schema] == [
        ("id", "int64", False),
        ("label", "int64", True),
        ("predicted", "int64", False),
        ("log_prob", "double", False),
        ("fi", "double", False),
        ("rank", "int64", True),
    ]
    assert schema.metadata[b"fastfi.version"].decode()
    assert schema.metadata[b"fastfi.torch"].decode() == torch.__version__
    config = json.loads(schema.metadata[b"fastfi.config"])
    assert config["model"] == f"{project.name}:Net"
    assert config["data"] == str(project.data)
    assert (config["mean"], config["limit"], config["labels"]) == ([0.5], 5, "true")


def test_image_folder_has_paths_as_ids_and_unlabelled_data_needs_predicted(project):
    (project.folder / "img").mkdir()
    for i in range(3):
        (project.folder / "img" / f"{i}.png").write_bytes(encoded(pixels(5, 6, seed=i)))
    result = project.score("--data", "img", out="s.parquet")
    assert result.exit_code == 2
    assert "img has no labels; --labels predicted uses the model's predictions" in result.stderr
    for out in ("s.csv", "s.parquet"):
        result = project.score("--data", "img", "--labels", "predicted", out=out)
        assert result.exit_code == 0
        assert "accuracy" not in result.stdout
    assert (project.folder / "s.csv").read_text().splitlines()[1].startswith("0.png,,")
    scores = read_scores("s.parquet")
    assert scores["id"] == ["0.png", "1.png", "2.png"]
    assert scores["label"] == [None] * 3


def test_summary_and_progress(project):
    result = project.score("--batch-size", "10")
    x, y = images(project)
    accuracy = (project.model()(x).argmax(1) == y).double().mean()
    assert f"50 images, accuracy {accuracy:.2%}" in result.stdout
    assert "images/s, in s.csv" in result.stdout
    fi = read_scores("s.csv")["fi"]
    assert percentile_table(np.array(fi)) in result.stdout
    assert "no --weights" in result.stderr
    assert "scored" not in result.stderr  # quiet, as stderr is no terminal here
    result = project.score("--progress", "--overwrite")
    assert "scored 50 of 50, 0 s left" in result.stderr


def test_progress_bar_on_a_terminal(project, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "150")
    result = project.score("--batch-size", "10")
    assert result.exit_code == 0
    assert "50/50" in result.stderr
    assert "images/s" in result.stderr
    assert "left" in result.stderr
    result = project.score("--no-progress", out="t.csv")
    assert "50/50" not in result.stderr


def test_percentiles_are_numpys_and_allow_infinity():
    values = np.random.default_rng(0).normal(size=101)
    for size in (1, 2, 3, 100, 101):
        ordered = np.sort(values[:size])
        for q in (0, 1, 5, 25, 50, 75, 95, 99, 100):
            assert percentile(ordered, q) == pytest.approx(np.percentile(ordered, q), rel=1e-12)
    table = percentile_table(np.array([1.0, 2.0, math.inf]))
    assert [c.strip() for c in table.splitlines()[2].split("|")[1:-1]] == [
        *("FI", "1", "1.02", "1.1", "1.5", "2"),
        *("inf", "inf", "inf", "inf"),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1000", 1000), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("4k", 4000), ("1e9", 10**9)],
)
def test_parse_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2XB", "1.2.3", "nan"])
def test_parse_bytes_refuses(text):
    with pytest.raises(OptionError, match="expected an amount of memory such as 2GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "1"], "--eps belongs to --inverse truncated, not to exact"),
        (["--inverse", "damped", "--rtol", "1"], "--rtol belongs to --inverse exact, not to damp"),
        (["--inverse", "truncated", "--alpha", "1"], "--alpha belongs to --inverse damped"),
        (["--device", "nonsense"], "--device nonsense: torch cannot use it here"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--weights", "nowhere.pt"], "nowhere.pt: cannot be read: No such file"),
        (["--memory-budget", "much"], "expected an amount of memory such as 2GB"),
        (["--objective", "nothing"], "objective"),
        (["--image-key", "z"], "data.npz: no array of images (z)"),
        (["--color", "rgb"], "color='rgb' applies to parquet and folder data"),
    ],
)
def test_bad_options(project, options, message):
    result = project.score(*options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    assert project.files() == set()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("failing", "calling it without arguments failed (RuntimeError: the factory's own problem"),
        ("not_a_model", "expected an nn.Module, got int"),
        ("number", "expected a callable, got int"),
        ("absent", "cannot be imported (AttributeError"),
    ],
)
def test_bad_models(project, model, message):
    result = project.score(model=model)
    assert result.exit_code == 2
    assert message in result.stderr


def test_model_specifications(project):
    assert project.score(model="instance").exit_code == 0
    for spec in ("net", "net:", ":Net"):
        result = project.score("--model", spec, "--overwrite")
        assert result.exit_code == 2
        assert f"--model: expected package.module:factory, got {spec!r}" in result.stderr
    result = project.score("--model", "no_such_module:Net", "--overwrite")
    assert "cannot be imported (ModuleNotFoundError" in result.stderr
    assert str(project.folder) in result.stderr


def test_a_model_that_does_not_fit_the_images(project):
    np.savez(project.data, x=pixels(5, 1, 7, 7), y=np.zeros(5, int))
    result = project.score()
    assert result.exit_code == 2
    assert "the model fails on an image of shape [1, 1, 7, 7]" in result.stderr
    assert "RuntimeError" in result.stderr


def test_traceback_on_request(project):
    result = project.score("--data", "nowhere", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: nowhere: no such file" in result.stderr


@pytest.mark.parametrize("bad", [CLASSES, 255, -1])
def test_labels_out_of_range_are_named(project, bad):
    y = np.arange(50) % CLASSES
    y[37] = bad
    np.savez(project.data, x=pixels(50, 1, 5, 6), y=y)
    result = project.score("--batch-size", "16", out="s.parquet")
    assert result.exit_code == 2
    assert "data.npz, image 37:" in result.stderr
    assert str(bad) in result.stderr
    assert project.files() == set()
    assert project.score("--labels", "predicted").exit_code == 0


def test_non_finite_pixels_are_named(project):
    x = np.random.default_rng(0).random((50, 1, 5, 6), np.float32)
    x[20, 0, 1, 1] = np.nan
    x[30, 0, 0, 0] = np.inf
    np.savez(project.data, x=x, y=np.zeros(50, int))
    result = project.score("--batch-size", "16")
    assert result.exit_code == 2
    assert "data.npz, images 20, 30:" in result.stderr
    assert project.files() == set()


def test_mnist_from_end_to_end(project):
    folder = real_data("mnist")
    (project.folder / "digits.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 5, 2), nn.ReLU(inplace=True), nn.Flatten(),\n"
        "                         nn.Linear(576, 10))\n"
    )
    torch.manual_seed(0)
    state = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 5, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10)
    ).state_dict()
    torch.save(state, "digits.pt")
    arguments = ["--model", "digits:net", "--weights", "digits.pt", "--data", str(folder)]
    arguments += ["--split", "test", "--limit", "300", "--batch-size", "128"]
    result = CliRunner().invoke(app, ["score", *arguments, "--out", "mnist.parquet"])
    assert result.exit_code == 0, result.stderr
    scores = read_scores("mnist.parquet")
    assert scores["label"][:6] == [7, 2, 1, 0, 4, 1]
    assert set(scores["rank"]) == {9}
    p = np.exp(scores["log_prob"])
    np.testing.assert_allclose(scores["fi"], (1 - p) / p, rtol=1e-9)  # fact F2: full rank


def test_cifar10_parquet_from_end_to_end(project):
    path = real_data("cifar10") / "test.parquet"
    (project.folder / "small.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))\n"
    )
    arguments = ["score", "--model", "small:net", "--data", str(path), "--limit", "100"]
    arguments += ["--mean", "0.49,0.48,0.45", "--std", "0.25,0.24,0.26", "--out", "c.csv"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert read_scores("c.csv")["label"] == [i % 10 for i in range(100)]


def test_help_and_usage_errors():
    result = CliRunner().invoke(app, ["score", "--help"])
    assert result.exit_code == 0
    for option in ("--weights", "--memory-budget", "--assume-full-rank", "--overwrite"):
        assert option in result.stdout
    result = CliRunner().invoke(app, ["score"])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "solve_exact" in result.stdout


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from fastfi.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the command line needs typer" in done.stderr
    assert 'pip install "fastfi[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
