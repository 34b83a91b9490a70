"""Recognising formats, limits, and memory that does not grow with the data."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import encoded, pixels, read, write_idx, write_parquet

import fastfi._extras
from fastfi.data import open_dataset
from fastfi.errors import DataError, OptionError


def test_unknown_paths_and_options(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "d.mat").touch()
    with pytest.raises(DataError, match=r"expected a folder, an \.npz file .*suffix '\.mat'"):
        open_dataset(tmp_path / "d.mat")
    write_idx(tmp_path, pixels(3, 2, 2), None)
    with pytest.raises(OptionError, match="color='rgb' applies to parquet and folder data"):
        open_dataset(tmp_path, color="rgb")
    with pytest.raises(OptionError, match="image_key='x' applies to npz and parquet data"):
        open_dataset(tmp_path, image_key="x")


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (4, [4]), (6, [4, 2]), (99, [4, 4, 2])])
def test_limit(tmp_path, limit, sizes):
    write_idx(tmp_path, pixels(10, 2, 2), np.arange(10, dtype=np.uint8))
    source = open_dataset(tmp_path)
    batches = list(source.batches(4, limit))
    assert [len(b.ids) for b in batches] == [len(b.x) for b in batches] == sizes
    assert torch.cat([b.y for b in batches]).tolist() == list(range(sum(sizes)))


def test_batches_checks_its_arguments(tmp_path):
    write_idx(tmp_path, pixels(3, 2, 2), None)
    source = open_dataset(tmp_path)
    with pytest.raises(OptionError, match="batch_size must be at least 1, got 0"):
        source.batches(0)
    with pytest.raises(OptionError, match="limit must be at least 1, got 0"):
        source.batches(4, 0)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "d.parquet", [encoded(pixels(4, 4))], None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = r'reading Parquet files needs pyarrow.*pip install "fastfi\[cli\]"'
    with pytest.raises(fastfi._extras.MissingExtraError, match=message):
        open_dataset(path)
    with pytest.raises(ImportError):
        open_dataset(path)


# Memory


def _write_npz(folder: Path, n: int) -> Path:
    np.savez_compressed(folder / f"{n}.npz", x=np.zeros((n, 28, 28), np.uint8))
    return folder / f"{n}.npz"


def _write_idx_folder(folder: Path, n: int) -> Path:
    (folder / str(n)).mkdir()
    write_idx(folder / str(n), np.zeros((n, 28, 28), np.uint8), None)
    return folder / str(n)


@pytest.mark.parametrize("write", [_write_npz, _write_idx_folder])
def test_peak_memory_does_not_grow_with_the_data(tmp_path, write):
    """numpy's and Python's own allocations (the stored pixels), from opening to the last batch."""
    peaks = []
    for n in (500, 8_000):
        path = write(tmp_path, n)
        tracemalloc.start()
        count = sum(len(b.ids) for b in open_dataset(path).batches(100))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == n
    assert 100 * 28 * 28 < peaks[1] < 8_000 * 28 * 28 / 4
    assert peaks[1] < 1.2 * peaks[0] + 100_000


@pytest.mark.parametrize("kind", ["idx", "npz", "parquet", "folder"])
def test_at_most_one_batch_is_alive(tmp_path, kind):
    """A reader keeps no reference to the tensors that it has handed out."""
    images = pixels(40, 4, 4)
    if kind == "idx":
        write_idx(tmp_path, images, None)
    elif kind == "npz":
        np.savez(tmp_path / "d.npz", x=images)
    elif kind == "parquet":
        write_parquet(tmp_path / "d.parquet", [encoded(i) for i in images], None)
    else:
        for i, image in enumerate(images):
            (tmp_path / f"{i}.png").write_bytes(encoded(image))
    path = tmp_path / "d.npz" if kind == "npz" else tmp_path
    source = open_dataset(path)
    assert source.format == kind
    alive: list[weakref.ref] = []
    for batch in source.batches(4):
        alive.append(weakref.ref(batch.x))
        assert sum(r() is not None for r in alive) == 1
        del batch
    assert len(alive) == 10


def test_gzip_is_not_held_whole(tmp_path, monkeypatch):
    """Nothing asks a compressed file for everything at once."""
    write_idx(tmp_path, pixels(300, 28, 28), None)
    sizes = []
    read_original, readinto_original = gzip.GzipFile.read, gzip.GzipFile.readinto

    def read_recorded(self, size=-1):
        sizes.append(size)
        return read_original(self, size)

    def readinto_recorded(self, buffer):
        sizes.append(len(buffer))
        return readinto_original(self, buffer)

    monkeypatch.setattr(gzip.GzipFile, "read", read_recorded)
    monkeypatch.setattr(gzip.GzipFile, "readinto", readinto_recorded)
    read(open_dataset(tmp_path), 10)
    assert len(sizes) > 30
    assert all(0 < s <= 1 << 20 for s in sizes)
