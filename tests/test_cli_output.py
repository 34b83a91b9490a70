"""Score files appear complete or not at all, whatever ends the run."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_project import check_full_disk, make_project, read_scores
from data_files import encoded, pixels

import fastfi.cli._score as scoring
from fastfi.cli._output import ScoreFile, Scores, WriteError
from fastfi.data import Batch, ImageSource
from fastfi.errors import OptionError

OLD = b"an older result"


@pytest.fixture
def project(tmp_path, monkeypatch):
    return make_project(tmp_path, monkeypatch)


def rows(start: int, stop: int) -> Scores:
    n = stop - start
    values = np.random.default_rng(start).lognormal(0, 20, (2, n))
    return Scores(range(start, stop), None, np.zeros(n, int), -values[0], values[1], None)


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_rows_come_back_exactly(tmp_path, name):
    path = tmp_path / name
    with ScoreFile(path, "int", {}) as file:
        for start in range(0, 1000, 100):
            file.write(rows(start, start + 100))
            assert not path.exists()
    scores = read_scores(path)
    assert scores["id"] == list(range(1000))
    fi = np.concatenate([rows(s, s + 100).fi for s in range(0, 1000, 100)])
    assert scores["fi"] == fi.tolist()
    assert scores["label"] == scores["rank"] == [None] * 1000
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_infinite_scores_and_awkward_paths(tmp_path):
    scores = Scores(
        ['a,"b".png', "ü\n.png"],
        np.array([1, 2]),
        np.array([1, 0]),
        np.array([-800.5, -1e-300]),
        np.array([np.inf, 5e-324]),
        np.array([1, 2]),
    )
    for name in ("s.csv", "s.parquet"):
        with ScoreFile(tmp_path / name, "str", {}) as file:
            file.write(scores)
    import csv

    import pyarrow.parquet as pq

    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines[1:] == [
        ['a,"b".png', "1", "1", "-800.5", "inf", "1"],
        ["ü\n.png", "2", "0", "-1e-300", "5e-324", "2"],
    ]
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table["id"] == ['a,"b".png', "ü\n.png"]
    assert table["fi"] == [np.inf, 5e-324]


def test_parquet_is_written_while_scoring(tmp_path):
    import pyarrow.parquet as pq

    with ScoreFile(tmp_path / "s.parquet", "int", {}) as file:
        for start in range(0, 200_000, 20_000):
            file.write(rows(start, start + 20_000))
            part = next(tmp_path.glob(".*.part"))
        assert part.stat().st_size > 1_000_000  # most of it is on the disk already
    groups = pq.ParquetFile(tmp_path / "s.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [
        *(65_536, 65_536, 65_536, 3_392)
    ]
    assert read_scores(tmp_path / "s.parquet")["id"] == list(range(200_000))


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_a_batch_of_scores_is_not_kept(tmp_path, name):
    """Arrays kept until the next row group are small, but fragment the heap by whole batches."""
    with ScoreFile(tmp_path / name, "int", {}) as file:
        scores = rows(0, 100)
        alive = [weakref.ref(a) for a in scores if isinstance(a, np.ndarray)]
        file.write(scores)
        del scores
        assert [r() for r in alive] == [None] * 3


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_leaves_the_old_file(tmp_path, name, error):
    path = tmp_path / name
    path.write_bytes(OLD)
    with pytest.raises(error), ScoreFile(path, "int", {}, overwrite=True) as file:
        file.write(rows(0, 10))
        raise error
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    with ScoreFile(tmp_path / "s.csv", "int", {}) as file:
        file.write(rows(0, 1))
    assert (tmp_path / "s.csv").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "s.csv"
    with (
        pytest.raises(OptionError, match="exists already; --overwrite replaces it"),
        ScoreFile(path, "int", {}) as file,
    ):
        file.write(rows(0, 1))
        path.write_bytes(OLD)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, name):
    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)  # chmod would not stop root
    with pytest.raises(WriteError, match=rf"cannot write .*{name}: Permission denied"):
        ScoreFile(tmp_path / name, "int", {}).__enter__()


# Through the command.


def test_existing_and_impossible_outputs(project):
    Path("s.csv").write_bytes(OLD)
    for out, message in [
        ("s.csv", "s.csv: exists already; --overwrite replaces it"),
        ("s.txt", "s.txt: expected a name ending in .parquet or .csv"),
        ("no/s.csv", "no/s.csv: there is no folder no"),
    ]:
        result = project.score(out=out)
        assert result.exit_code == 2
        assert message in result.stderr
    assert Path("s.csv").read_bytes() == OLD
    Path("d.csv").mkdir()
    assert "d.csv: is a folder" in project.score("--overwrite", out="d.csv").stderr
    assert project.score("--overwrite").exit_code == 0
    assert len(read_scores("s.csv")["id"]) == 50


@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)]
)
def test_interrupted_halfway(project, monkeypatch, out, number, code):
    """Ctrl-C, a polite kill, and a crash of the model, in the fourth of five batches."""
    assert project.score("--limit", "1", out="warm.csv").exit_code == 0  # imports the module
    Path("warm.csv").unlink()
    Path(out).write_bytes(OLD)
    seen: list[set[str]] = []

    def on_call(call: int, x: torch.Tensor) -> None:
        if torch.equal(x[:1], middle[:1]):
            seen.append(project.files())
            if number is None:
                raise ZeroDivisionError("the model's own problem")
            signal.raise_signal(number)

    with np.load(project.data) as arrays:
        middle = torch.from_numpy(arrays["x"][30:40]).float() / 255
    monkeypatch.setattr(project.module, "on_call", on_call)
    result = project.score("--batch-size", "10", "--overwrite", out=out)
    assert result.exit_code == code
    assert len(seen[0]) == 2  # the temporary file was there
    assert project.files() == {out}
    assert Path(out).read_bytes() == OLD
    if number is None:
        assert isinstance(result.exception, ZeroDivisionError)
    if number == signal.SIGINT:
        assert "interrupted, no scores were written" in result.stderr
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_bad_data_halfway(project):
    (project.folder / "img").mkdir()
    content = [encoded(pixels(5, 6, seed=i)) for i in range(30)]
    content[25] = content[25][:50]
    for i, image in enumerate(content):
        (project.folder / "img" / f"{i:02}.png").write_bytes(image)
    for out in ("s.csv", "s.parquet"):
        options = ["--data", "img", "--labels", "predicted", "--batch-size", "10"]
        result = project.score(*options, out=out)
        assert result.exit_code == 2
        assert "25.png: the image cannot be decoded" in result.stderr
    assert project.files() == {"img"}


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("out", ["s.csv", "s.parquet"])
def test_a_full_disk(tmp_path, monkeypatch, out):
    """A real write error, from the largest file size that the process may write."""
    project = make_project(tmp_path, monkeypatch, n=3000)
    arguments = ["score", "--model", f"{project.name}:Net", "--data", str(project.data)]
    check_full_disk(arguments, out)
    assert project.files() == set()


def test_killed_without_notice(tmp_path, monkeypatch):
    """What nothing can clean up is left under a hidden name, never under the one asked for."""
    project = make_project(tmp_path, monkeypatch)
    with (tmp_path / f"{project.name}.py").open("a") as file:
        file.write("\nimport os, signal\n")
        file.write("on_call = lambda n, x: n > 4 and os.kill(os.getpid(), signal.SIGKILL)\n")
    arguments = ["score", "--model", f"{project.name}:Net", "--data", str(project.data)]
    arguments += ["--out", "s.csv", "--batch-size", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "fastfi.cli", *arguments], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = project.files()
    assert left.startswith(".s.csv.")
    assert left.endswith(".part")


class Endless(ImageSource):
    """Batches that count how many of them are alive."""

    format, length, shape, labelled = "test", None, (1, 5, 6), True
    path = Path("endless")

    def __init__(self) -> None:
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def _read(self, batch_size):
        while True:
            self.alive = [r for r in self.alive if r() is not None]
            self.most = max(self.most, len(self.alive))
            x = torch.rand(batch_size, 1, 5, 6)
            self.alive.append(weakref.ref(x))
            yield Batch(range(batch_size), x, torch.zeros(batch_size, dtype=torch.int64))
            del x


@pytest.mark.parametrize("labels", ["true", "predicted"])
def test_no_batch_outlives_the_next_request(project, labels):
    source = Endless()
    options = scoring.ScoreOptions(labels, {}, torch.device("cpu"), batch_size=8, limit=8 * 20)
    count = sum(len(s.ids) for s in scoring.score(project.model(), source, options))
    assert count == 160
    assert source.most == 0  # when a batch is asked for, all earlier ones are gone
