"""``fastfi score --wrt``: FI of parameters and of layers, a column for each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cli_project import images, make_project, read_scores

import fastfi

LAYERS = ("hidden", "head")


@pytest.fixture
def project(tmp_path, monkeypatch):
    return make_project(tmp_path, monkeypatch)


def expected(project, **options):
    x, y = images(project)
    return fastfi.influence(project.model(), x, y, full_output=True, dtype=torch.float64, **options)


@pytest.mark.parametrize("wrt", ["input", "params", "all"])
@pytest.mark.parametrize("inverse", ["exact", "damped"])
@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
def test_one_block(project, wrt, inverse, out):
    result = project.score("--wrt", wrt, "--inverse", inverse, "--batch-size", 20, out=out)
    assert result.exit_code == 0, result.stderr
    words = {"input": "the input", "params": "all parameters"}
    assert f", FI of {words.get(wrt, 'the input and all parameters')}, " in result.stdout
    assert "|  FI | " in result.stdout
    want = expected(project, wrt=wrt, inverse=inverse)
    scores = read_scores(out)
    assert list(scores) == ["id", "label", "predicted", "log_prob", "fi", "rank"]
    # float32 rows, in batches of other sizes
    np.testing.assert_allclose(scores["fi"], want.fi, rtol=1e-4)
    assert scores["rank"] == ([None] * 50 if want.rank is None else want.rank.tolist())


@pytest.mark.parametrize(
    ("given", "wrt", "names"),
    [
        (["layers"], "layers", LAYERS),
        (["head"], ["head"], ("head",)),
        (["head.weight", "hidden"], ["head.weight", "hidden"], ("head.weight", "hidden")),
    ],
)
@pytest.mark.parametrize("inverse", ["exact", "damped"])
@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
def test_a_column_for_each_block(project, given, wrt, names, inverse, out):
    options = [o for name in given for o in ("--wrt", name)]
    result = project.score(*options, "--inverse", inverse, "--batch-size", 20, out=out)
    assert result.exit_code == 0, result.stderr
    assert f"FI of {len(names)} blocks of parameters, " in result.stdout
    want = expected(project, wrt=wrt, inverse=inverse)
    scores = read_scores(out)
    fi, rank = [f"fi:{n}" for n in names], [f"rank:{n}" for n in names]
    assert list(scores) == ["id", "label", "predicted", "log_prob", *fi, *rank]
    for i in range(len(names)):
        np.testing.assert_allclose(scores[fi[i]], want.fi[:, i], rtol=1e-4)
        ranks = [None] * 50 if want.rank is None else want.rank[:, i].tolist()
        assert scores[rank[i]] == ranks


@pytest.mark.parametrize(
    ("given", "stored"),
    [([], "input"), (["params"], "params"), (["head", "hidden"], ["head", "hidden"])],
)
def test_metadata_say_what_was_perturbed(project, given, stored):
    import pyarrow.parquet as pq

    options = [o for name in given for o in ("--wrt", name)]
    assert project.score(*options, out="s.parquet").exit_code == 0
    schema = pq.read_schema("s.parquet")
    assert json.loads(schema.metadata[b"fastfi.config"])["wrt"] == stored
    if isinstance(stored, list):
        kinds = {f.name: (str(f.type), f.nullable) for f in schema}
        assert kinds["fi:head"] == ("double", False)
        assert kinds["rank:head"] == ("int64", True)


def test_the_closed_form_of_all_parameters(project):
    assert project.score("--wrt", "params", "--assume-full-rank").exit_code == 0
    scores = read_scores("s.csv")
    p = np.exp(scores["log_prob"])
    np.testing.assert_allclose(scores["fi"], (1 - p) / p, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--wrt", "haed"],
            "wrt: expected names of modules or parameters of the model, got 'haed'",
        ),
        (["--wrt", "drop"], "wrt: expected a module with parameters, got 'drop', without any"),
        (["--wrt", "head", "--wrt", "params"], "parameters, got 'params' in a list; did you mean"),
        (["--wrt", "head", "--wrt", "head"], "--wrt: expected different names, got 'head' more"),
        (["--wrt", "layers", "--assume-full-rank"], "assume_full_rank: expected wrt to be 'input'"),
    ],
)
def test_errors(project, options, message):
    result = project.score(*options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert project.files() == set()


def test_models_without_trainable_parameters(project):
    with (project.folder / f"{project.name}.py").open("a") as file:
        file.write("\ndef frozen():\n    return Net().requires_grad_(False)\n")
        file.write("\ndef half_frozen():\n    net = Net()\n")
        file.write("    net.head.requires_grad_(False)\n    return net\n")
    for wrt in ("params", "layers", "all", "head"):
        result = project.score("--wrt", wrt, model="frozen")
        assert result.exit_code == 2
        assert "trainable parameters, got none with requires_grad=True" in result.stderr
        result = project.score("--wrt", wrt, model="not_a_model")
        assert "expected an nn.Module, got int" in result.stderr
    assert project.score(model="frozen").exit_code == 0  # the input is perturbed all the same
    assert project.score("--wrt", "layers", model="half_frozen", out="t.csv").exit_code == 0
    assert [name for name in read_scores("t.csv") if ":" in name] == ["fi:hidden", "rank:hidden"]


def test_weights_are_perturbed_where_they_were_loaded(project):
    model = project.model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    torch.save(model.state_dict(), "w.pt")
    result = project.score("--wrt", "layers", "--inverse", "damped", "--weights", "w.pt")
    assert result.exit_code == 0, result.stderr
    x, y = images(project)
    want = fastfi.influence(model, x, y, wrt="layers", inverse="damped")
    scores = read_scores("s.csv")
    for i, name in enumerate(LAYERS):
        np.testing.assert_allclose(scores[f"fi:{name}"], want[:, i], rtol=1e-4)
