"""Images that cannot be read, kept as errors of their own; and single images by their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_files import assert_scaled, encoded, pixels, write_idx, write_parquet
from torch.utils.data import DataLoader

from fastfi.data import Batch, open_dataset, select
from fastfi.errors import DataError, OptionError

N = 9
PLACES = [(0,), (4,), (8,), (0, 4, 8), (2, 3), tuple(range(8))]


def good(color=False):
    return pixels(N, 6, 7, 3) if color else pixels(N, 6, 7)


def write_folder(folder, data):
    for i, content in enumerate(data):
        if content is not None:
            (folder / f"{i}.png").write_bytes(content)
    return folder


def write_file(folder, data, labels=None):
    return write_parquet(folder / "d.parquet", data, labels or list(range(len(data))), 2)


def check(source, images, bad, message, labels=None, size=4, start=0):
    """Everything but the images ``bad`` is there; those have errors."""
    batches = list(source.batches(size, start=start, keep_errors=True))
    expected = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    position = start
    for batch in batches:
        there = range(position, position + len(batch.ids))
        assert batch.errors.keys() == {i - position for i in there if i in bad}
        assert batch.x.shape == (len(there), *source.shape) and batch.x.dtype == torch.float32
        for k, i in enumerate(there):
            if i in bad:
                assert batch.x[k].count_nonzero() == 0
                assert message in batch.errors[k] and str(i) in batch.errors[k]
            else:
                assert_scaled(batch.x[k], expected[i])
            if labels is not None:
                assert batch.y[k] == (0 if i in bad else labels[i])
        position += len(there)
    assert position == len(images)


@pytest.mark.parametrize("bad", PLACES)
@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "folder", "files"])
def test_damaged_images_are_kept(tmp_path, bad, color, kind):
    images = good(color)
    data = [encoded(image) for image in images]
    paths = [tmp_path / f"{i}.png" for i in range(N)]
    for i in bad:
        data[i] = data[i][: len(data[i]) // 2]
    if kind == "parquet":
        write_file(tmp_path, data)
    else:
        write_folder(tmp_path, data)
    path = paths if kind == "files" else tmp_path
    if 0 in bad or kind == "files":
        with pytest.raises(DataError, match="the image cannot be decoded"):
            open_dataset(path)
    source = open_dataset(path, keep_errors=True)
    assert source.shape == (3 if color else 1, 6, 7)
    labels = list(range(N)) if kind == "parquet" else None
    for size, start in ((1, 0), (4, 0), (100, 0), (4, 3), (2, N - 1)):
        check(source, images, bad, "the image cannot be decoded", labels, size, start)
    with pytest.raises(DataError, match="the image cannot be decoded"):
        list(source.batches(4))
    # Those that are not asked for are neither decoded nor reported.
    first = min(bad)
    if first:
        assert sum(len(b.ids) for b in source.batches(3, limit=first)) == first


def test_other_sizes_and_colours_are_kept(tmp_path):
    images = good()
    data = [encoded(image) for image in images]
    data[3], data[8] = encoded(pixels(7, 6)), encoded(pixels(3, 3))
    source = open_dataset(write_file(tmp_path, data))
    check(source, images, (3, 8), "expected the size of the first image, 6 x 7", list(range(N)))
    data[3] = data[8] = encoded(pixels(6, 7, 3))
    source = open_dataset(write_file(tmp_path, data))
    check(source, images, (3, 8), "an image in colour (RGB) where the first", list(range(N)))


@pytest.mark.parametrize("bad", PLACES)
def test_missing_bytes_and_labels_are_kept(tmp_path, bad):
    images = good()
    data = [encoded(image) for image in images]
    labels = list(range(3, 3 + N))
    without = [None if i in bad else d for i, d in enumerate(data)]
    source = open_dataset(write_file(tmp_path, without, labels), keep_errors=True)
    check(source, images, bad, "no image bytes (null)", labels)
    path = write_file(tmp_path, data, [None if i in bad else k for i, k in enumerate(labels)])
    if 0 in bad:
        with pytest.raises(DataError, match=r"row 0: no label \(null\)"):
            open_dataset(path)
    check(open_dataset(path, keep_errors=True), images, bad, "no label (null)", labels)


def test_a_file_that_vanished_or_cannot_be_read_is_kept(tmp_path):
    images = good()
    source = open_dataset(write_folder(tmp_path, [encoded(i) for i in images]))
    (tmp_path / "0.png").unlink()
    (tmp_path / "5.png").unlink()
    (tmp_path / "5.png").mkdir()  # cannot be read, whoever runs the tests
    check(source, images, (0, 5), "the image cannot be decoded")
    with pytest.raises(DataError, match=r"0\.png: the image cannot be decoded"):
        list(source.batches(4))


def test_errors_name_files_and_rows_across_shards(tmp_path):
    data = [encoded(i) for i in good()]
    data[1] = data[7] = b"no image"
    write_parquet(tmp_path / "a.parquet", data[:4], list(range(4)), 3)
    write_parquet(tmp_path / "b.parquet", data[4:], list(range(4, N)), 3)
    source = open_dataset(tmp_path)
    (batch,) = source.batches(100, keep_errors=True)
    assert batch.errors.keys() == {1, 7}
    assert batch.errors[1].startswith(f"{tmp_path}/a.parquet: row 1: the image cannot be decoded")
    assert batch.errors[7].startswith(f"{tmp_path}/b.parquet: row 3: the image cannot be decoded")
    (batch,) = source.batches(100, start=6, keep_errors=True)
    assert batch.ids == [6, 7, 8] and batch.errors.keys() == {1} and batch.y.tolist() == [6, 0, 8]
    assert "b.parquet: row 3" in batch.errors[1]


def test_chosen_images_keep_their_errors(tmp_path):
    data = [encoded(i) for i in good()]
    data[2] = data[7] = b"no image"
    source = select(open_dataset(write_file(tmp_path, data)), ["1", "2", "7", "8"])
    first, second = source.batches(3, keep_errors=True)
    assert first.ids == [1, 2, 7] and first.errors.keys() == {1, 2}
    assert second.ids == [8] and not second.errors
    (batch,) = source.batches(9, start=1, keep_errors=True)
    assert batch.ids == [2, 7, 8] and batch.errors.keys() == {0, 1}
    with pytest.raises(DataError, match="row 2"):
        list(source.batches(3))
    assert len(list(source.batches(3, start=3))) == 1


def test_no_image_settles_the_shape(tmp_path):
    write_file(tmp_path, [b"no image"] * 5)
    with pytest.raises(DataError, match=r"none of the first 5 images can .*the first: .*row 0"):
        open_dataset(tmp_path, keep_errors=True)
    write_file(tmp_path, [b"no image"] * 100 + [encoded(pixels(3, 3))])
    with pytest.raises(DataError, match="none of the first 100 images can be decoded"):
        open_dataset(tmp_path, keep_errors=True)
    write_file(tmp_path, [b"no image"] * 99 + [encoded(pixels(3, 3))])
    assert open_dataset(tmp_path, keep_errors=True).shape == (1, 3, 3)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_damaged_first_image_does_not_settle_the_colour(tmp_path, start):
    """Cut short after its header, it still says that it is grey."""
    images = good(color=True)
    grey = encoded(pixels(6, 7))
    data = [grey[: len(grey) // 2], *(encoded(i) for i in images[1:])]
    source = open_dataset(write_folder(tmp_path, data), keep_errors=True)
    assert source.shape == (3, 6, 7)
    check(source, images, (0,), "the image cannot be decoded", start=start)


def test_color_follows_the_first_image_wherever_reading_starts(tmp_path):
    rgb, grey = pixels(6, 7, 3), pixels(6, 7)
    source = open_dataset(write_folder(tmp_path, [encoded(rgb), encoded(grey), encoded(grey)]))
    (batch,) = source.batches(9, start=1)
    assert_scaled(batch.x, np.repeat(grey[None, None], 2, 0).repeat(3, 1))
    (tmp_path / "0.png").write_bytes(encoded(grey))
    (tmp_path / "1.png").write_bytes(encoded(rgb))
    source = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"1\.png: an image in colour"):
        list(source.batches(9, start=1))


@pytest.mark.parametrize("start", [0, 25, 39])
def test_what_damages_all_that_follows_is_raised(tmp_path, start):
    write_idx(tmp_path, pixels(40, 30, 30), None)
    source = open_dataset(tmp_path, keep_errors=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="the file is truncated"):
        list(source.batches(4, start=start, keep_errors=True))

    np.savez(tmp_path / "d.npz", x=pixels(40, 64, 64))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "d.npz").write_bytes(content)
    source = open_dataset(tmp_path / "d.npz", keep_errors=True)
    with pytest.raises(DataError, match=r"damaged .*CRC"):
        list(source.batches(4, start=start, keep_errors=True))


def test_a_damaged_parquet_file_is_raised(tmp_path):
    images = pixels(30, 16, 16)
    path = write_parquet(tmp_path / "d.parquet", [encoded(i) for i in images], [0] * 30, 10)
    source = open_dataset(path, keep_errors=True)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"d\.parquet: not a Parquet file, truncated or damaged"):
        list(source.batches(4, keep_errors=True))
    path.unlink()
    with pytest.raises(DataError, match=r"d\.parquet: not a Parquet file, truncated or damaged"):
        list(source.batches(4, start=20, keep_errors=True))


def test_batches_without_errors_have_none(tmp_path):
    source = open_dataset(write_folder(tmp_path, [encoded(i) for i in good()]))
    assert all(not b.errors for b in source.batches(4, keep_errors=True))
    assert Batch([0], torch.zeros(1, 1, 2, 2), None).errors == {}


# Single images


def test_images_by_their_number(tmp_path):
    images = good(color=True)
    for i, image in enumerate(images):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes(encoded(image))
    (tmp_path / "b" / "3.png").write_bytes(b"no image")
    source = open_dataset(tmp_path)
    assert len(source) == N
    (batch,) = source.batches(99, keep_errors=True)
    for i, name in enumerate(batch.ids):
        if name == "b/3.png":
            with pytest.raises(DataError, match=r"b/3\.png: the image cannot be decoded"):
                source[i]
            continue
        got, x, label = source[i]
        assert (got, label) == (name, "ab".index(name[0])) and type(label) is int
        assert x.dtype == torch.float32 and torch.equal(x, batch.x[i])
        assert x.is_contiguous()
    assert source[-1][0] == batch.ids[-1]
    for i in (N, -N - 1):
        with pytest.raises(IndexError, match=f"no image {i} among {N}"):
            source[i]
    (tmp_path / "b" / "3.png").write_bytes(encoded(pixels(3, 3, 3)))
    with pytest.raises(DataError, match=r"b/3\.png: expected the size of the first image, 6 x 7"):
        source[list(batch.ids).index("b/3.png")]


def test_images_without_labels_by_their_number(tmp_path):
    write_folder(tmp_path, [encoded(i) for i in good()])
    assert open_dataset(tmp_path)[3][2] is None
    files = open_dataset([tmp_path / "4.png", tmp_path / "2.png"])
    assert len(files) == 2 and files[1][0].endswith("2.png") and files[1][2] is None
    chosen = select(open_dataset(tmp_path), ["5.png", "7.png"])
    assert len(chosen) == 2 and chosen[0][0] == "5.png"


def test_a_data_loader_with_workers(tmp_path):
    """A worker process of its own, to which the data set is pickled."""
    images = good()
    source = open_dataset(write_folder(tmp_path, [encoded(i) for i in images]))
    loader = DataLoader(
        source, batch_size=None, num_workers=1, multiprocessing_context="spawn", shuffle=False
    )
    found = list(loader)
    assert [name for name, _, _ in found] == [f"{i}.png" for i in range(N)]
    assert_scaled(torch.stack([x for _, x, _ in found]), images[:, None])


def test_options_still_apply(tmp_path):
    write_idx(tmp_path, pixels(3, 2, 2), None)
    assert open_dataset(tmp_path, keep_errors=True).length == 3
    with pytest.raises(DataError, match="no such file"):
        open_dataset([tmp_path / "0.png", tmp_path / "1.png"], keep_errors=True)
    with pytest.raises(OptionError, match="color='rgb' applies to"):
        open_dataset(tmp_path, color="rgb", keep_errors=True)
