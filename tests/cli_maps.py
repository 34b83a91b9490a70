"""``fastfi map`` run in a user's folder, and its files read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_project import Project, make_project
from data_files import encoded, pixels
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import fastfi.cli._figures as figure_module
from fastfi.cli._app import app

__all__ = ["OLD", "fake_figures", "map_project", "read_maps", "run", "write_images"]

OLD = b"an older result"


def map_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of ten images."""
    return make_project(folder, monkeypatch, n=10)


def run(project: Project, *options: Any, out: str = "m.npz") -> Result:
    """Runs ``fastfi map``; ``options`` may hold --data to replace the project's own."""
    arguments = ["map", "--model", f"{project.name}:Net", "--out", out]
    if "--data" not in options:
        arguments += ["--data", str(project.data)]
    return CliRunner().invoke(app, arguments + [str(o) for o in options])


def read_maps(path: str | Path) -> dict[str, NDArray[Any]]:
    """The arrays of a map file; Parquet's rows in the shape of the npz arrays."""
    if str(path).endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    names = ("fastfi.scales", "fastfi.shape", "fastfi.rank_shape")
    stored = table.schema.metadata
    given = {n: json.loads(stored[n.encode()]) for n in names if n.encode() in stored}
    arrays = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    arrays["maps"] = arrays.pop("map").reshape(-1, *given["fastfi.shape"]).astype(np.float32)
    if "rank" in arrays:
        arrays["rank"] = arrays["rank"].reshape(-1, *given["fastfi.rank_shape"]).astype(np.int16)
    return {**arrays, "scales": np.array(given["fastfi.scales"])}


def write_images(folder: Path, n: int, *shape: int) -> None:
    """n images of that shape, as PNG files 0.png, 1.png, ... in a folder."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(encoded(pixels(*shape, seed=i)))


def fake_figures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces drawing by files of text; returns the list of what is to be drawn."""
    calls: list[tuple[Any, ...]] = []

    def draw(x: Any, maps: Any, scales: Any, caption: str) -> Any:
        calls.append((x.clone(), maps.clone(), scales, caption))
        return SimpleNamespace(savefig=lambda path, format: Path(path).write_text("a figure"))

    monkeypatch.setattr(figure_module, "draw", draw)
    return calls
