"""Map files and figures appear complete or not at all, in bounded memory."""

from __future__ import annotations

import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_maps import OLD, fake_figures, map_project, read_maps, run
from cli_project import check_full_disk, images, make_project
from data_files import encoded, pixels

import fastfi.cli._mapfile as mapfile_module
from fastfi.cli._batches import ScoreOptions
from fastfi.cli._figures import figure_names
from fastfi.cli._map import compute_maps
from fastfi.cli._mapfile import MapFile, MapForm, Maps
from fastfi.data import Batch, ImageSource
from fastfi.errors import DataError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def project(tmp_path, monkeypatch):
    return map_project(tmp_path, monkeypatch)


@pytest.fixture
def drawn(monkeypatch):
    return fake_figures(monkeypatch)


# Figures.


def test_figures(project, drawn):
    result = run(project, "--figures", "fig", "--ids", "3,5", "--mean", "0.4", "--batch-size", 1)
    assert result.exit_code == 0, result.stderr
    assert "fastfi: 2 figures to be drawn in fig" in result.stderr
    assert sorted(p.name for p in Path("fig").iterdir()) == ["3.png", "5.png"]
    assert project.files() == {"fig", "m.npz"}
    maps = read_maps("m.npz")["maps"]
    x, y = images(project)
    predicted = read_maps("m.npz")["predicted"]
    for n, (call, i) in enumerate(zip(drawn, (3, 5), strict=True)):
        assert torch.equal(call[0], x[i])  # as read, not normalised
        assert torch.equal(call[1], torch.from_numpy(maps[n]))
        assert call[2:] == ((1, 3, 5, 7), f"predicted {predicted[n]}, label {y[i]}")


def test_existing_figures_are_kept(project, drawn):
    Path("fig").mkdir()
    Path("fig/7.png").write_bytes(OLD)
    result = run(project, "--figures", "fig")
    assert result.exit_code == 2
    assert "--figures fig: 7.png there already; --overwrite replaces them" in result.stderr
    assert drawn == []
    assert project.files() == {"fig"}
    assert run(project, "--figures", "fig", "--limit", 7).exit_code == 0  # 0 to 6
    assert Path("fig/7.png").read_bytes() == OLD
    assert run(project, "--figures", "fig", "--overwrite").exit_code == 0
    assert Path("fig/7.png").read_bytes() != OLD


def test_impossible_figures(project, drawn, monkeypatch):
    Path("file").touch()
    for folder, message in [
        ("file", "--figures file: expected a folder, got a file"),
        ("no/fig", "--figures no/fig: there is no folder no"),
    ]:
        result = run(project, "--figures", folder)
        assert result.exit_code == 2
        assert message in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(project, "--figures", "fig")
    assert result.exit_code == 2
    assert "drawing figures needs matplotlib" in result.stderr
    assert 'pip install "fastfi[plot]"' in result.stderr
    assert project.files() == {"file"}


def test_figure_names():
    assert figure_names(range(2, 4)) == ["2.png", "3.png"]
    ids = ["cat/1.jpg", "../../etc/x y.png", "/.hidden.png", "ä.b.png", "..", "dog/1.png"]
    names = ["cat_1.png", "etc_x_y.png", "hidden.png", "ä.b.png", "image.png", "dog_1.png"]
    assert figure_names(ids) == names
    clash = figure_names(["a/1.png", "a_1.png", "A_1.jpg", "a_2.png"])
    assert len({n.casefold() for n in clash}) == 4
    assert clash[3] == "a_2.png"
    assert all(n.casefold().startswith("a_1-") for n in clash[:3])
    long = figure_names(["é" * 300 + "1.png", "é" * 300 + "2.png"])
    assert long[0] != long[1]
    assert max(len(n.encode()) for n in long) < 255


def test_real_figures(project):
    pytest.importorskip("fastfi.plot")
    (project.folder / "img").mkdir()
    for i in range(2):
        (project.folder / "img" / f"{i}.png").write_bytes(encoded(pixels(2, 5, 3, seed=i)))
    for channels in ("separate", "joint"):
        result = run(project, "--data", "img", "--figures", f"fig_{channels}",
                     "--channels", channels, out=f"{channels}.npz")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        for i in range(2):
            content = Path(f"fig_{channels}/{i}.png").read_bytes()
            assert content.startswith(b"\x89PNG")


# All or nothing.


@pytest.mark.parametrize("out", ["m.npz", "m.parquet"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)]
)
def test_interrupted_halfway(project, monkeypatch, drawn, out, number, code):
    assert run(project, "--limit", 1, out="warm.npz").exit_code == 0  # imports the module
    Path("warm.npz").unlink()
    Path(out).write_bytes(OLD)
    seen = []

    def on_call(call, x):
        if torch.equal(x[:1], last):
            seen.append(project.files())
            if number is None:
                raise ZeroDivisionError("the model's own problem")
            signal.raise_signal(number)

    last = images(project)[0][9:]
    monkeypatch.setattr(project.module, "on_call", on_call)
    options = ["--batch-size", 3, "--overwrite", "--figures", "fig", "--inverse", "exact"]
    result = run(project, *options, out=out)
    assert result.exit_code == code
    assert len(seen[0]) == 3  # the temporary file and the figures' folder were there
    assert len(drawn) == 9
    assert project.files() == {out}
    assert Path(out).read_bytes() == OLD
    if number == signal.SIGINT:
        assert "interrupted, no maps were written" in result.stderr


def test_a_run_with_old_figures_that_fails_leaves_them(project, drawn):
    Path("fig").mkdir()
    Path("fig/0.png").write_bytes(OLD)
    with np.load(project.data) as arrays:
        x = arrays["x"].astype(np.float32)
    x[8, 0, 0, 0] = np.nan
    np.savez(project.data, x=x)
    result = run(project, "--figures", "fig", "--overwrite", "--batch-size", 3)
    assert result.exit_code == 2
    assert "data.npz, image 8:" in result.stderr
    assert len(drawn) == 6
    assert [p.name for p in Path("fig").iterdir()] == ["0.png"]
    assert Path("fig/0.png").read_bytes() == OLD
    assert project.files() == {"fig"}


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("out", ["m.npz", "m.parquet"])
def test_a_full_disk(tmp_path, monkeypatch, out):
    project = make_project(tmp_path, monkeypatch, n=200)
    arguments = ["map", "--model", f"{project.name}:Net", "--data", str(project.data)]
    check_full_disk(arguments, out)
    assert project.files() == set()


# The file alone.


def form(count, rank=True):
    rank_shape = (2, 1, 4, 5) if rank else None
    return MapForm(count, "int", True, (1, 3), (2, 1, 4, 5), rank_shape, np.int16, {"a": "b"})


def rows(start, stop):
    n, rng = stop - start, np.random.default_rng(start)
    return Maps(
        ids=range(start, stop),
        label=np.arange(start, stop),
        predicted=np.zeros(n, np.int64),
        log_prob=-rng.random(n),
        fi=rng.lognormal(0, 9, (n, 2, 1, 4, 5)).astype(np.float32),
        rank=rng.integers(0, 9, (n, 2, 1, 4, 5)),
    )


@pytest.mark.parametrize("count", [30, None])
def test_rows_come_back_exactly(tmp_path, count):
    path = tmp_path / "m.npz"
    with MapFile(path, form(count)) as file:
        for start in (0, 7, 14):
            file.write(rows(start, start + 7))
        file.write(rows(21, 30))
        assert not path.exists()
    got = read_maps(path)
    parts = [rows(0, 7), rows(7, 14), rows(14, 21), rows(21, 30)]
    assert (got["maps"] == np.concatenate([p.fi for p in parts])).all()
    assert (got["rank"] == np.concatenate([p.rank for p in parts])).all()
    assert (got["log_prob"] == np.concatenate([p.log_prob for p in parts])).all()
    assert got["id"].tolist() == got["label"].tolist() == list(range(30))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["m.npz", "m.parquet"])
@pytest.mark.parametrize("count", [6, 8])
def test_a_wrong_number_of_images(tmp_path, name, count):
    with (
        pytest.raises(DataError, match=rf"expected {count} images, .*, got (7|more)"),
        MapFile(tmp_path / name, form(count)) as file,
    ):
        file.write(rows(0, 7))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.npz", "m.parquet"])
def test_maps_are_written_while_they_are_computed(tmp_path, monkeypatch, name):
    """Batches are not kept: after each, its maps are on the disk, but for a row group."""
    monkeypatch.setattr(mapfile_module, "_GROUP", 100 * 160)  # bytes; a row has 40 numbers
    with MapFile(tmp_path / name, form(1000)) as file:
        for start in range(0, 1000, 250):
            batch = rows(start, start + 250)
            alive = [weakref.ref(a) for a in batch if isinstance(a, np.ndarray)]
            file.write(batch)
            del batch
            assert [r() for r in alive] == [None] * 5
            part = next(tmp_path.glob(".*.part"))
            assert part.stat().st_size > (start + 150 - 60) * 160
    if name == "m.parquet":
        import pyarrow.parquet as pq

        assert pq.ParquetFile(tmp_path / name).metadata.num_row_groups == 10
    got = read_maps(tmp_path / name)
    assert (got["maps"][250:500] == rows(250, 500).fi).all()
    assert (got["rank"][250:500] == rows(250, 500).rank).all()


class Endless(ImageSource):
    """Batches that count how many of them are alive."""

    format, length, shape, labelled = "test", None, (1, 5, 6), True
    path = Path("endless")

    def __init__(self):
        self.alive, self.most = [], 0

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
    influence = {"outputs": "logits", "memory_budget": None, "scales": (1,)}
    options = ScoreOptions(labels, influence, torch.device("cpu"), batch_size=8, limit=8 * 5)
    count = 0
    for maps, x in compute_maps(project.model(), source, options):
        count += len(x)
        del maps, x
    assert count == 40
    assert source.most == 0  # when a batch is asked for, all earlier ones are gone
