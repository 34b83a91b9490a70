"""A user's folder: a module with models, a data set, and the fastfi command run in it."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import pixels
from torch import nn
from typer.testing import CliRunner, Result

from fastfi.cli._app import app

__all__ = ["CLASSES", "Project", "check_full_disk", "make_project", "read_scores"]

CLASSES = 4
_COUNT = itertools.count()

# The module that the tests import by --model. `on_call` runs in every forward pass.
_MODULE = """
import torch
from torch import nn

on_call = lambda number, x: None

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(30, 16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        on_call(self.calls, x)
        return self.head(self.drop(torch.tanh(self.hidden(x.flatten(1)))))

def failing():
    raise RuntimeError("the factory's own problem")

def not_a_model():
    return 3

instance = Net()
number = 5
"""


@dataclass
class Project:
    """What :func:`make_project` made.

    Attributes:
        folder: the current directory.
        name: of the module with the models.
        data: an npz file of [n, 1, 5, 6] images and labels.
    """

    folder: Path
    name: str
    data: Path

    @property
    def module(self) -> Any:
        """The imported module."""
        return sys.modules[self.name]

    def model(self) -> nn.Module:
        """The model as the command makes it, without weights."""
        spec = importlib.util.spec_from_file_location("apart", self.folder / f"{self.name}.py")
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model: nn.Module = module.Net().eval()
        return model

    def score(self, *options: str | Path, out: str = "s.csv", model: str = "Net") -> Result:
        """Runs ``fastfi score``; ``options`` may repeat --data to replace the default."""
        arguments = ["score", "--model", f"{self.name}:{model}", "--out", out]
        if "--data" not in options:
            arguments += ["--data", str(self.data)]
        return CliRunner().invoke(app, arguments + [str(o) for o in options])

    def files(self) -> set[str]:
        """Names of all files in the folder, hidden ones too, but those it began with."""
        names = {p.name for p in self.folder.iterdir() if p.name != "__pycache__"}
        return names - {self.data.name, f"{self.name}.py"}


def make_project(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 50) -> Project:
    """Makes a project in ``folder`` and changes into it."""
    name = f"net_{next(_COUNT)}"
    (folder / f"{name}.py").write_text(_MODULE)
    data = folder / "data.npz"
    labels = np.random.default_rng(1).integers(0, CLASSES, n)
    np.savez(data, x=pixels(n, 1, 5, 6), y=labels)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return Project(folder, name, data)


def read_scores(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a score file; numbers as numbers, absent ones as None."""
    if str(path).endswith(".parquet"):
        import pyarrow.parquet as pq

        columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
        return columns
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [json.loads(r[name]) if r[name] else None for r in rows] for name in rows[0]}


def images(project: Project) -> tuple[torch.Tensor, torch.Tensor]:
    """The project's images in 0..1 and labels."""
    with np.load(project.data) as arrays:
        return torch.from_numpy(arrays["x"]).float() / 255, torch.from_numpy(arrays["y"])


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.argv = ["fastfi", *sys.argv[1:]]
from fastfi.cli import main
main()
"""


def check_full_disk(arguments: list[str], out: str) -> None:
    """Runs a command that meets a real write error, from the largest file that it may write."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LIMITED, *arguments, "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"fastfi: error: cannot write {out}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr  # no exception in a destructor either
