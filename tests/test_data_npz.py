"""NumPy archives: names, layouts, pixel types, bad arrays, pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_files import assert_scaled, pixels, read

from fastfi.data import open_dataset
from fastfi.errors import DataError, OptionError


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((9, 6, 5), None), ((9, 3, 6, 5), (0, 1, 2, 3)), ((9, 6, 5, 3), (0, 3, 1, 2))],
)
def test_npz(tmp_path, save, shape, axes):
    images, labels = pixels(*shape), np.arange(9)
    save(tmp_path / "d.npz", x=images, y=labels)
    source = open_dataset(tmp_path / "d.npz")
    assert (source.format, source.length) == ("npz", 9)
    ids, x, y = read(source)
    assert ids == list(range(9))
    assert_scaled(x, images[:, None] if axes is None else images.transpose(axes))
    assert y.tolist() == list(range(9))


def test_npz_pixel_types(tmp_path):
    path = tmp_path / "d.npz"
    integers = np.random.default_rng(0).integers(0, 65536, (3, 2, 2), np.uint16)
    floats = np.random.default_rng(0).normal(size=(3, 2, 2))
    cases = [
        (integers, integers.astype(np.float32) / np.float32(65535)),
        (integers.astype(">u2"), integers.astype(np.float32) / np.float32(65535)),
        (floats, floats.astype(np.float32)),
        (floats.astype(">f4"), floats.astype(np.float32)),
        (floats.astype(np.float16), floats.astype(np.float16).astype(np.float32)),
        (floats > 0, (floats > 0).astype(np.float32)),
    ]
    for stored, expected in cases:
        np.savez(path, images=stored)
        _, x, y = read(open_dataset(path))
        assert y is None
        assert np.array_equal(x[:, 0].numpy(), expected)


def test_npz_names(tmp_path):
    path = tmp_path / "d.npz"
    a, b = pixels(3, 2, 2), pixels(4, 2, 2, seed=1)
    np.savez(
        path, x_train=a, y_train=np.arange(3), test_images=b, test_labels=np.arange(4)[:, None]
    )
    assert_scaled(read(open_dataset(path, "train"))[1], a[:, None])
    _, x, y = read(open_dataset(path, "test"))
    assert_scaled(x, b[:, None])
    assert y.tolist() == [0, 1, 2, 3]  # [N, 1] too
    _, x, y = read(open_dataset(path, image_key="x_train", label_key="y_train"))
    assert_scaled(x, a[:, None])
    with pytest.raises(DataError, match=r"no array of images \(x or images\); it holds x_tr"):
        open_dataset(path)
    with pytest.raises(DataError, match="no array 'z'; it holds x_train"):
        open_dataset(path, "train", label_key="z")
    np.savez(path, x=a, images=a)
    with pytest.raises(DataError, match="both x and images are there"):
        open_dataset(path)


def test_npz_layout(tmp_path):
    path = tmp_path / "d.npz"
    images = pixels(2, 3, 5, 3)
    np.savez(path, x=images)
    with pytest.raises(DataError, match=r"cannot tell which axis of \[2, 3, 5, 3\] holds the col"):
        open_dataset(path)
    assert_scaled(read(open_dataset(path, layout="chw"))[1], images)
    assert_scaled(read(open_dataset(path, layout="hwc"))[1], images.transpose(0, 3, 1, 2))
    with pytest.raises(OptionError, match="layout: expected 'chw' or 'hwc', got 'nchw'"):
        open_dataset(path, layout="nchw")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 4))}, r"'x': expected images \[N, H, W\].*got the shape \[3, 4\]"),
        ({"x": np.zeros((0, 4, 4))}, r"got the shape \[0, 4, 4\]"),
        ({"x": np.zeros((3, 4, 4), np.int64)}, "'x': expected pixels of dtype uint8.*got int64"),
        ({"x": np.zeros((3, 4, 4), object)}, "'x' holds Python objects"),
        ({"x": np.asfortranarray(np.zeros((3, 4, 4)))}, "'x' is in Fortran order"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros(3)}, "'y': expected integer labels, got dtype f"),
        (
            {"x": np.zeros((3, 4, 4)), "y": np.zeros((3, 10), int)},
            r"'y': expected the shape \[3\], one label per image, got \[3, 10\]",
        ),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros(2, int)}, r"expected the shape \[3\].*got \[2\]"),
        ({}, "no array of images .*it holds none"),
    ],
)
def test_npz_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "d.npz")


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "d.npz", x=np.array([Trap()]), y=np.array([Trap()]))
    with pytest.raises(DataError, match="holds Python objects"):
        open_dataset(tmp_path / "d.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_npz_truncated_is_named_on_opening(tmp_path, kept):
    path = tmp_path / "d.npz"
    np.savez(path, x=pixels(30, 8, 8))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"d.npz: not an npz file, truncated or damaged"):
        open_dataset(path)


def test_npz_damaged_is_named_when_it_is_reached(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=pixels(30, 64, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d.npz: .*damaged .*CRC"):
        read(open_dataset(path))
