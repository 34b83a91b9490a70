"""Parquet in the Hugging Face image layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_files import assert_scaled, encoded, pixels, read, real_data, write_parquet

from fastfi.data import open_dataset
from fastfi.errors import DataError


@pytest.mark.parametrize("row_group", [3, 1000])
def test_parquet(tmp_path, row_group):
    images = pixels(11, 4, 5, 3)
    names = {"info": {"features": {"label": {"names": [f"c{i}" for i in range(11)]}}}}
    path = write_parquet(
        tmp_path / "d.parquet",
        [encoded(i) for i in images],
        list(range(11)),
        row_group,
        {"huggingface": json.dumps(names)},
    )
    source = open_dataset(path)
    assert (source.format, source.length, source.shape) == ("parquet", 11, (3, 4, 5))
    assert source.classes == tuple(f"c{i}" for i in range(11))
    sizes = [len(b.ids) for b in source.batches(4)]
    assert sizes == [4, 4, 3]  # whatever the row groups are
    ids, x, y = read(source)
    assert ids == y.tolist() == list(range(11))
    assert_scaled(x, images.transpose(0, 3, 1, 2))


def test_parquet_flat_column_gray_and_other_names(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pixels(5, 4, 4)
    kinds = [pa.binary(), pa.large_binary()]
    for kind in kinds:
        table = pa.table(
            {
                "scan": pa.array([encoded(i) for i in images], kind),
                "fine_label": pa.array([0, 1, 2, 3, 4], pa.uint8()),
                "coarse": pa.array([9] * 5, pa.int32()),
            }
        )
        pq.write_table(table, tmp_path / "d.parquet")
        source = open_dataset(tmp_path / "d.parquet", image_key="scan")
        _, x, y = read(source)
        assert_scaled(x, images[:, None])
        assert y.tolist() == [0, 1, 2, 3, 4]
    source = open_dataset(tmp_path / "d.parquet", image_key="scan", label_key="coarse", color="rgb")
    _, x, y = read(source)
    assert_scaled(x, np.repeat(images[:, None], 3, 1))
    assert y.tolist() == [9] * 5
    with pytest.raises(DataError, match=r"no column of images \(image or .*it holds scan, fine_l"):
        open_dataset(tmp_path / "d.parquet")
    with pytest.raises(DataError, match="no column 'nope'; it holds scan"):
        open_dataset(tmp_path / "d.parquet", image_key="scan", label_key="nope")
    with pytest.raises(DataError, match=r"column 'coarse': expected binary, or a.*got int32"):
        open_dataset(tmp_path / "d.parquet", image_key="coarse")
    with pytest.raises(DataError, match="column 'scan': expected integer labels, got large_binary"):
        open_dataset(tmp_path / "d.parquet", image_key="scan", label_key="scan")


@pytest.mark.parametrize("folder", ["", "data"])
def test_parquet_folder_of_shards(tmp_path, folder):
    images = pixels(7, 4, 4)
    data = [encoded(i) for i in images]
    where = tmp_path / folder
    where.mkdir(exist_ok=True)
    write_parquet(where / "train-00001-of-00002.parquet", data[3:6], [3, 4, 5])
    write_parquet(where / "train-00000-of-00002.parquet", data[:3], [0, 1, 2])
    write_parquet(where / "test-00000-of-00001.parquet", data[6:], [6])
    source = open_dataset(tmp_path, "train")
    ids, x, y = read(source, 2)
    assert ids == y.tolist() == list(range(6))
    assert_scaled(x, images[:6, None])
    assert open_dataset(tmp_path, "test").length == 1
    with pytest.raises(DataError, match="holds the splits test, train; choose one"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no Parquet file of the split 'validation'"):
        open_dataset(tmp_path, "validation")
    write_parquet(where / "train-00002-of-00002.parquet", data[:1], None)
    with pytest.raises(DataError, match=r"train-00002-of-00002\.parquet: no column 'label'"):
        open_dataset(tmp_path, "train")


def test_parquet_without_labels_and_one_file_with_a_split(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [encoded(pixels(4, 4))], None)
    assert not open_dataset(path).labelled
    assert open_dataset(path, "train").length == 1
    with pytest.raises(DataError, match="the name says split 'train', not 'test'"):
        open_dataset(path, "test")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_parquet_truncated_is_named_on_opening(tmp_path, kept):
    data = [encoded(i) for i in pixels(30, 8, 8)]
    path = write_parquet(tmp_path / "d.parquet", data, [0] * 30)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"d\.parquet: not a Parquet file, truncated or damaged"):
        open_dataset(path)


def test_parquet_bad_rows_are_named(tmp_path):
    good = [encoded(i) for i in pixels(6, 16, 16, seed=1)]
    path = tmp_path / "d.parquet"

    def error(images, labels):
        write_parquet(path, images, labels, row_group=2)
        with pytest.raises(DataError) as caught:
            read(open_dataset(path), 2)
        return str(caught.value)

    labels = list(range(6))
    assert "d.parquet: row 4: the image cannot be decoded" in error(
        [*good[:4], good[4][:60], good[5]], labels
    )
    assert "d.parquet: row 3: the image cannot be decoded" in error(
        [*good[:3], b"not an image", *good[4:]], labels
    )
    assert "d.parquet: row 0: the image cannot be decoded" in error([b"", *good[1:]], labels)
    assert "d.parquet: row 5: no image bytes (null)" in error([*good[:5], None], labels)
    assert "d.parquet: row 2: no label (null)" in error(good, [0, 1, None, 3, 4, 5])
    small = encoded(pixels(8, 16))
    assert (
        "d.parquet: row 1: expected the size of the first image, 16 x 16 (height x width), "
        "got 8 x 16" in error([good[0], small], [0, 1])
    )
    colour = encoded(pixels(16, 16, 3))
    assert "d.parquet: row 1: an image in colour (RGB) where the first image is grey" in error(
        [good[0], colour], [0, 1]
    )
    assert "d.parquet: no rows" in error([], [])


def test_cifar10():
    folder = real_data("cifar10")
    source = open_dataset(folder, "test")
    assert (source.length, source.shape) == (10_000, (3, 32, 32))
    _, x, y = read(source, 128, limit=300)
    assert y.tolist() == [i % 10 for i in range(300)]  # interleaved by class
    assert 0.4 < x.mean() < 0.55
    assert open_dataset(folder / "train.parquet").length == 50_000
