"""Reading that begins anywhere: the same images, and none decoded that was not asked for."""

from __future__ import annotations

import pickle
from contextlib import closing

import numpy as np
import pytest
import torch
from data_files import encoded, pixels, write_idx, write_parquet

from fastfi.data import Batch, ImageSource, open_dataset, select
from fastfi.data._pixels import ImageDecoder
from fastfi.errors import DataError, OptionError

N = 23
KINDS = ["idx", "idx plain", "npz", "npz packed", "parquet", "shards", "folder", "files", "chosen"]
KINDS += ["chosen files", "plain source"]


class Plain(ImageSource):
    """Knows no other way than from the beginning."""

    format, length, shape, labelled, path = "test", None, (1, 4, 5), True, None

    def __init__(self, images):
        self.images = torch.from_numpy(images.astype(np.float32))[:, None] / 255

    def _read(self, batch_size):
        for i in range(0, N, batch_size):
            x = self.images[i : i + batch_size]
            yield Batch(range(i, i + len(x)), x, torch.arange(i, i + len(x)))


def opened(folder, kind):
    """A data set of 23 images (7 where they are chosen)."""
    images, labels = pixels(N, 4, 5), np.arange(N, dtype=np.uint8)
    if kind == "plain source":
        return Plain(images)
    if kind.startswith("idx") or kind == "chosen":
        write_idx(folder, images, labels, compress=kind != "idx plain")
    elif kind.startswith("npz"):
        save = np.savez if kind == "npz" else np.savez_compressed
        save(folder / "d.npz", x=images, y=labels)
        return open_dataset(folder / "d.npz")
    elif kind == "parquet":
        write_parquet(folder / "d.parquet", [encoded(i) for i in images], labels.tolist(), 4)
    elif kind == "shards":
        for k, part in enumerate((slice(0, 7), slice(7, 7), slice(7, 8), slice(8, N))):
            data = [encoded(i) for i in images[part]]
            write_parquet(folder / f"{k}.parquet", data, labels[part].tolist(), 3)
    else:
        for i, image in enumerate(images):
            (folder / f"{i % 3}").mkdir(exist_ok=True)
            (folder / f"{i % 3}" / f"{i:02d}.png").write_bytes(encoded(image))
    if kind == "files":
        return open_dataset(sorted(folder.glob("*/*.png")))
    source = open_dataset(folder)
    if kind == "chosen":
        return select(source, ["2,5,6,7,11,21,22"])
    return select(source, [source.ids()[i] for i in (2, 5, 6, 7, 11, 21, 22)]) if (
        kind == "chosen files"
    ) else source  # fmt: skip


def joined(batches, size):
    batches = list(batches)
    assert all(0 < len(b.ids) <= size for b in batches)
    assert all(len(b.ids) == size for b in batches[:-1]) or not batches
    assert all(not b.errors for b in batches)
    if not batches:
        return [], None, None
    y = None if batches[0].y is None else torch.cat([b.y for b in batches]).tolist()
    return [i for b in batches for i in b.ids], torch.cat([b.x for b in batches]), y


@pytest.mark.parametrize("kind", KINDS)
def test_start_gives_the_rest_of_the_full_reading(tmp_path, kind):
    source = opened(tmp_path, kind)
    ids, x, y = joined(source.batches(100), 100)
    assert len(ids) == (7 if "chosen" in kind else N)
    if source.id_type == "int" and kind != "chosen":
        assert ids == list(range(N))
    for start in range(len(ids) + 3):
        for size, limit in ((5, None), (1, start + 2), (4, 6), (100, len(ids) + 9), (3, 1)):
            reading = source.batches(size, limit, start=start, keep_errors=start % 2 == 1)
            if kind == "plain source":  # whose batches begin where they do
                found = list(reading)
                got = [i for b in found for i in b.ids]
                got_x = torch.cat([b.x for b in found]) if found else None
                got_y = torch.cat([b.y for b in found]).tolist() if found else None
            else:
                got, got_x, got_y = joined(reading, size)
            stop = len(ids) if limit is None else limit
            assert got == ids[start:stop], (start, size, limit)
            if got:
                assert torch.equal(got_x, x[start:stop])
                assert got_y == (None if y is None else y[start:stop])


def test_start_is_checked(tmp_path):
    source = opened(tmp_path, "idx")
    with pytest.raises(OptionError, match="start must be at least 0, got -1"):
        source.batches(4, start=-1)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names, original = [], ImageDecoder.__call__

    def recorded(self, data, where):
        names.append(where)
        return original(self, data, where)

    monkeypatch.setattr(ImageDecoder, "__call__", recorded)
    return names


@pytest.mark.parametrize("kind", ["parquet", "shards", "folder", "files", "chosen files"])
def test_no_other_images_are_decoded(tmp_path, kind, decoded):
    source = opened(tmp_path, kind)
    decoded.clear()
    names = next(source.batches(100)).ids
    all_names = list(decoded)
    assert len(all_names) == len(names)
    for start in (0, 3, len(names) - 1, len(names)):
        decoded.clear()
        list(source.batches(2, 6, start=start))
        assert decoded == all_names[start:6], start


def test_skipped_row_groups_and_files_are_not_read(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    source = opened(tmp_path, "shards")
    read, original = [], pq.ParquetFile.iter_batches

    def recorded(self, *args, row_groups, **kwargs):
        read.append((self.metadata.num_rows, list(row_groups)))
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    for start, expected in [
        (0, [(7, [0, 1, 2]), (1, [0]), (15, [0, 1, 2, 3, 4])]),
        (5, [(7, [1, 2]), (1, [0]), (15, [0, 1, 2, 3, 4])]),
        (6, [(7, [2]), (1, [0]), (15, [0, 1, 2, 3, 4])]),
        (7, [(1, [0]), (15, [0, 1, 2, 3, 4])]),
        (16, [(15, [2, 3, 4])]),
        (22, [(15, [4])]),
        (23, []),
    ]:
        read.clear()
        list(source.batches(4, start=start))
        assert read == expected, start


def test_plain_files_are_not_read_from_their_beginning(tmp_path, monkeypatch):
    from fastfi.data import idx

    source = opened(tmp_path, "idx plain")
    sizes, original = [], idx._fill

    def recorded(file, buffer):
        sizes.append((file.tell(), len(buffer)))
        original(file, buffer)

    monkeypatch.setattr(idx, "_fill", recorded)
    list(source.batches(2, start=20))
    assert sizes == [(16 + 20 * 20, 40), (16 + 22 * 20, 20)]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_sources_can_be_pickled(tmp_path, kind):
    source = opened(tmp_path, kind)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.shape == source.shape
    a, b = joined(source.batches(4, start=2), 4), joined(copy.batches(4, start=2), 4)
    assert a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_a_reading_that_is_dropped_closes_its_file(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    source = opened(tmp_path, "parquet")
    closed, original = [], pq.ParquetFile.close
    monkeypatch.setattr(
        pq.ParquetFile, "close", lambda self, *a: (closed.append(self), original(self, *a))[1]
    )
    with closing(source.batches(2, start=3)) as batches:
        next(batches)
        assert not closed
    assert closed


@pytest.mark.parametrize("kind", ["npz", "npz packed"])
def test_archives_are_skipped_in_pieces(tmp_path, kind, monkeypatch):
    """Every byte is read on the way, so that the checksum still holds for all of them."""
    from fastfi.data import npz

    source = opened(tmp_path, kind)
    _, x, _ = joined(source.batches(100), 100)
    monkeypatch.setattr(npz, "_SKIPPED", 7)
    for start in (0, 1, 13, 22):
        assert torch.equal(joined(source.batches(5, start=start), 5)[1], x[start:])
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[content.index(b"x.npy") + 150] ^= 1  # the first image
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="truncated or damaged"):
        list(source.batches(5, start=22))
