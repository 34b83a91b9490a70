"""Image folders, and what becomes of unusual pixel modes."""

from __future__ import annotations

import numpy as np
import pytest
from data_files import assert_scaled, encoded, pixels, read

from fastfi.data import open_dataset
from fastfi.errors import DataError


def test_folder_with_classes(tmp_path):
    images = pixels(5, 4, 6, 3)
    paths = ["b/2.png", "a/1.png", "a/deep/0.PNG", "b/10.png", "a/.hidden.png"]
    for name, image in zip(paths, images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(image))
    (tmp_path / "a" / "notes.txt").write_text("left out")
    (tmp_path / "c").mkdir()  # an empty class keeps its number
    source = open_dataset(tmp_path)
    assert (source.format, source.length, source.id_type) == ("folder", 4, "str")
    assert source.classes == ("a", "b", "c")
    ids, x, y = read(source, 3)
    assert ids == ["a/1.png", "a/deep/0.PNG", "b/10.png", "b/2.png"]
    assert y.tolist() == [0, 0, 1, 1]
    assert_scaled(x, images[[1, 2, 3, 0]].transpose(0, 3, 1, 2))


def test_folder_without_classes_and_splits(tmp_path):
    images = pixels(3, 4, 4)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, image in enumerate(images):
            (tmp_path / split / f"{i}.png").write_bytes(encoded(image))
    ids, x, y = read(open_dataset(tmp_path, "test"))
    assert ids == ["0.png", "1.png", "2.png"]
    assert y is None
    assert_scaled(x, images[:, None])
    with pytest.raises(DataError, match="holds the splits test, train; choose one"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no subfolder 'val' for the split"):
        open_dataset(tmp_path, "val")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"holds both images .*0\.png.* and subfolders .*cat"):
        open_dataset(tmp_path, "train")


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match="no images, in it or in its subfolders"):
        open_dataset(tmp_path)
    (tmp_path / "0.png").write_bytes(encoded(pixels(32, 32)))
    content = encoded(pixels(32, 32))
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    source = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"1\.png: the image cannot be decoded"):
        read(source)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png: the image cannot be decoded"):
        open_dataset(tmp_path)


def test_folder_pixel_modes(tmp_path):
    """Palette and transparency become RGB, 16-bit grey keeps its 16 bits, grey joins RGB."""
    from PIL import Image

    rgb = pixels(4, 4, 3)
    deep = np.random.default_rng(0).integers(0, 65536, (4, 4), np.uint16)

    def one(image, **options):
        image.save(tmp_path / "0.png")
        return read(open_dataset(tmp_path, **options))[1][0]

    alpha = np.concatenate([rgb, pixels(4, 4, 1, seed=2)], 2)
    assert_scaled(one(Image.fromarray(alpha)), rgb.transpose(2, 0, 1))
    palette = Image.fromarray(rgb).quantize(16)
    assert_scaled(one(palette), np.array(palette.convert("RGB")).transpose(2, 0, 1))
    bits = rgb[:, :, 0] > 127
    assert_scaled(one(Image.fromarray(bits)), 255 * bits.astype(np.uint8)[None])
    x = one(Image.fromarray(deep))
    assert np.array_equal(x[0].numpy(), deep.astype(np.float32) / np.float32(65535))
    with pytest.raises(DataError, match="16-bit grey images cannot be read as RGB"):
        one(Image.fromarray(deep), color="rgb")

    Image.fromarray(rgb).save(tmp_path / "0.png")
    Image.fromarray(rgb[:, :, 0]).save(tmp_path / "1.png")
    x = read(open_dataset(tmp_path))[1]
    assert_scaled(x[1], np.repeat(rgb[None, :, :, 0], 3, 0))
    assert open_dataset(tmp_path, color="gray").shape == (1, 4, 4)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "0.tiff")
    with pytest.raises(DataError, match=r"0\.tiff: pixels of mode 'F' are not supported"):
        read(open_dataset(tmp_path))
