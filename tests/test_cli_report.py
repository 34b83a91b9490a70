"""``fastfi report``: options, messages, and what it does not leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_data import columns, write_scores
from typer.testing import CliRunner, Result

from fastfi.cli._app import app


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_scores(Path("train"), columns(60))
    write_scores(Path("test"), columns(30, seed=1))


def report(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments])


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(Path().glob("*.html"))


def test_one_page() -> None:
    result = report("train")
    assert result.exit_code == 0, result.output
    size = Path("report.html").stat().st_size / 1e6
    assert result.stdout == f"60 samples, {size:.1f} MB, in report.html\n"
    assert "<title>FI of train</title>" in Path("report.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in Path().iterdir()) == ["report.html", "test", "train"]


def test_two_sets_with_names_images_and_maps() -> None:
    pixels = np.zeros((60, 5, 4), np.uint8)
    np.savez("data.npz", x_train=pixels)
    np.savez("maps.npz", maps=np.ones((60, 1, 5, 4), np.float32), id=np.arange(60), scales=[3])
    result = report(
        "train", "test", "-o", "a.html", "--images", "data.npz", "--split", "train",
        "--maps", "maps.npz", "--names", "old, new", "--top", "3", "--title", "A <title>",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("60 and 30 samples, ")
    page = Path("a.html").read_text(encoding="utf-8")
    assert "<title>A &lt;title&gt;</title>" in page
    assert page.count("<span><img class") == 6 and "<bdi>old</bdi>" in page and "KS:" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: there is no such file or folder"),
        (["train", "-o", "r.pdf"], "expected a name ending in .html or .htm"),
        (["train", "test", "--names", "a"], "--names: expected two different names"),
        (["train", "test", "--names", "a,a"], "--names: expected two different names"),
        (["train", "--names", " "], "--names: expected a name, got ' '"),
        (["train", "--maps", "m.npz"], "--maps: expected --images too"),
        (["train", "--split", "test"], "belong to --images, which was not given"),
        (["train", "--images", "none.npz"], "none.npz: no such file or folder"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    refused(report(*arguments), message)


def test_existing_pages_are_kept() -> None:
    Path("report.html").write_text("mine")
    result = report("train")
    assert result.exit_code == 2 and "--overwrite replaces it" in result.stderr
    assert Path("report.html").read_text() == "mine"
    assert report("train", "--overwrite").exit_code == 0


def test_unfinished_scores_are_said_to_be() -> None:
    write_scores(Path("train"), columns(60), complete=False)
    assert "train is unfinished" in report("train").stderr


def test_the_libraries_come_late() -> None:
    code = (
        "import sys, fastfi.report, fastfi.cli._app;"
        "print([m for m in ('plotly', 'jinja2', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("module", ["plotly", "jinja2"])
def test_without_the_libraries(module: str, monkeypatch: Any) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    refused(report("train"), f"needs {module}, which cannot be imported")
