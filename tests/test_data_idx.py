"""IDX folders: splits, labels, truncated and damaged files."""

from __future__ import annotations

import numpy as np
import pytest
from data_files import assert_scaled, pixels, read, real_data, write_idx

from fastfi.data import open_dataset
from fastfi.errors import DataError


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, 100])
def test_idx(tmp_path, compress, batch_size):
    images, labels = pixels(10, 5, 7), np.arange(10, dtype=np.uint8)
    write_idx(tmp_path, images, labels, compress=compress)
    source = open_dataset(tmp_path)
    assert (source.format, source.length, source.shape) == ("idx", 10, (1, 5, 7))
    for _ in range(2):  # a source can be read again
        ids, x, y = read(source, batch_size)
        assert ids == list(range(10))
        assert_scaled(x, images[:, None])
        assert y.tolist() == list(range(10))


def test_idx_splits(tmp_path):
    write_idx(tmp_path, pixels(6, 3, 3), np.zeros(6, np.uint8), "train")
    write_idx(tmp_path, pixels(4, 3, 3), np.ones(4, np.uint8), "t10k", compress=False)
    assert open_dataset(tmp_path, "train").length == 6
    assert open_dataset(tmp_path, "test").length == open_dataset(tmp_path, "t10k").length == 4
    with pytest.raises(DataError, match=r"holds the splits train and test; choose one \(--split\)"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="expected the split train or test, got 'validation'"):
        open_dataset(tmp_path, "validation")


def test_idx_absent_split_and_absent_labels(tmp_path):
    write_idx(tmp_path, pixels(3, 2, 2), None, "train")
    source = open_dataset(tmp_path)
    assert not source.labelled
    assert read(source)[2] is None
    with pytest.raises(DataError, match="no images of the split 'test'"):
        open_dataset(tmp_path, "test")


def test_idx_same_file_plain_and_compressed_and_labels_in_the_other_form(tmp_path):
    images = pixels(3, 2, 2)
    write_idx(tmp_path, images, np.arange(3, dtype=np.uint8), compress=True)
    write_idx(tmp_path, images, None, compress=False)
    _, x, y = read(open_dataset(tmp_path))
    assert_scaled(x, images[:, None])
    assert y.tolist() == [0, 1, 2]


def test_idx_two_files_of_one_split(tmp_path):
    path = write_idx(tmp_path, pixels(3, 2, 2), None)
    (tmp_path / "fashion-train-images-idx3-ubyte.gz").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="several files hold the split 'train': fashion-train"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_idx_truncated_gzip_is_named_on_opening(tmp_path, kept):
    path = write_idx(tmp_path, pixels(50, 8, 8), np.zeros(50, np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=f"{path.name}: the file is truncated"):
        open_dataset(tmp_path)


def test_idx_truncated_labels_are_named(tmp_path):
    path = write_idx(tmp_path, pixels(50, 8, 8), np.arange(50, dtype=np.uint8))
    labels = path.with_name("train-labels-idx1-ubyte.gz")
    labels.write_bytes(labels.read_bytes()[:-4])
    with pytest.raises(DataError, match=f"{labels.name}: the file is truncated"):
        open_dataset(tmp_path)


def test_idx_damaged_gzip(tmp_path):
    path = write_idx(tmp_path, pixels(50, 8, 8), None)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the checksum
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: the file is damaged .*CRC"):
        open_dataset(tmp_path)
    path.write_bytes(b"<html>Not found</html>")
    with pytest.raises(DataError, match=f"{path.name}: the file is damaged .*[Nn]ot a gzipped"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], r"truncated: expected 3 x 2 x 2 = 12 bytes after the header, got 11"),
        (lambda b: b + b"x", r"too long: expected 3 x 2 x 2 = 12 bytes after the header, got 13"),
        (lambda b: b[:9], "the file is truncated .*9 bytes, not even the header's 16"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "expected the magic number 0x00000803 .*0x00000d03"),
        (lambda b: b[:4] + b"\xff" * 4 + b[8:], "truncated|too long"),
        (lambda b: b[:4] + b"\0" * 4 + b[8:16], "expected images, got dimensions 0 x 2 x 2"),
    ],
)
def test_idx_bad_plain_file(tmp_path, change, message):
    path = write_idx(tmp_path, pixels(3, 2, 2), None, compress=False)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path.name}: {message}"):
        open_dataset(tmp_path)


def test_idx_counts_differ(tmp_path):
    write_idx(tmp_path, pixels(3, 2, 2), np.zeros(4, np.uint8))
    with pytest.raises(DataError, match=r"train-labels.*expected 3 labels.*got 4"):
        open_dataset(tmp_path)


def test_idx_truncated_after_it_was_opened(tmp_path):
    path = write_idx(tmp_path, pixels(40, 30, 30), None)
    source = open_dataset(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{path.name}: the file is truncated"):
        read(source)


def test_mnist():
    folder = real_data("mnist")
    source = open_dataset(folder, "train")
    assert (source.length, source.shape) == (60_000, (1, 28, 28))
    _, x, y = read(source, 64, limit=100)
    assert y[:6].tolist() == [5, 0, 4, 1, 9, 2]
    assert x.min() == 0
    assert x.max() == 1
    _, _, y = read(open_dataset(folder, "test"), 256)
    assert len(y) == 10_000
    assert y[:6].tolist() == [7, 2, 1, 0, 4, 1]
