"""Recognises the format of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastfi.data import folder, idx, npz, parquet
from fastfi.data._pixels import Color
from fastfi.data._source import ImageSource
from fastfi.errors import DataError, OptionError

__all__ = ["open_dataset"]


def open_dataset(
    path: str | Path | Sequence[str | Path],
    split: str | None = None,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    layout: str | None = None,
    color: Color = "auto",
    keep_errors: bool = False,
) -> ImageSource:
    """Opens an image data set, recognising its format.

    | what ``path`` is | read as |
    |---|---|
    | a folder with ``train-images-idx3-ubyte[.gz]`` or ``t10k-...`` | MNIST-style IDX |
    | an ``.npz`` file | NumPy arrays ``x`` or ``images``, ``y`` or ``labels`` |
    | a ``.parquet`` file, or a folder of them | the Hugging Face image layout |
    | an image file (PNG, JPEG, ...), or several | images without labels |
    | any other folder | one subfolder per class, or images without labels |

    Args:
        path: file or folder; or several image files.
        split: "train", "test", ... where the data set has several. None takes the only one.
        image_key: the array (npz) or column (Parquet) of the images. None looks for usual names.
        label_key: the same for the labels.
        layout: axis order of 4-dimensional npz arrays, "chw" or "hwc". None infers it from the
            axis that can be the colours.
        color: "gray" or "rgb" converts compressed images (Parquet, folder, files); "auto" keeps
            what the first image has.
        keep_errors: do not insist on the first image, which settles the colour and the shape of
            all: where it cannot be decoded, the next one that can does, up to the 100th. For
            reading with :meth:`ImageSource.batches`' ``keep_errors``.

    Returns:
        The data set. Its structure is checked: a truncated file is reported here, not halfway.

    Raises:
        DataError: nothing there, an unknown format, a damaged or truncated file, or several
            splits and none chosen.
        OptionError: an option that the format does not have.
        MissingExtraError: Parquet without pyarrow, compressed images without Pillow.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
    others = [p for p in paths if p.is_dir() or not folder.is_image(p.name)]
    if len(paths) > 1 and others:
        raise DataError(
            f"{others[0]}: expected one data set, or several image files (suffixes "
            f"{' '.join(folder.SUFFIXES)}), got {len(paths)} paths and this is not an image file"
        )
    path = paths[0]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        kind = "idx" if idx.recognises(path) else "folder"
        kind = "parquet" if parquet.recognises(path) else kind
    elif not others:
        kind = "files"
    else:
        kind = path.suffix.lower().removeprefix(".")
        if kind not in ("npz", "parquet"):
            raise DataError(
                f"{path}: expected a folder, an .npz file or a .parquet file, or an image, got the "
                f"suffix {path.suffix!r}"
            )
    given = {
        "image_key": (image_key, ("npz", "parquet")),
        "label_key": (label_key, ("npz", "parquet")),
        "layout": (layout, ("npz",)),
        "color": (
            None if color == "auto" or kind == "files" else color,
            ("parquet", "folder"),
        ),
        "split": (split, ("idx", "npz", "parquet", "folder")),
    }
    for option, (value, kinds) in given.items():
        if value is not None and kind not in kinds:
            raise OptionError(
                f"{option}={value!r} applies to {' and '.join(kinds)} data, but {path} is "
                f"{'an image file' if kind == 'files' else kind}"
            )
    if kind == "idx":
        return idx.IdxSource(path, split)
    if kind == "npz":
        return npz.NpzSource(path, split, image_key, label_key, layout)
    if kind == "parquet":
        return parquet.ParquetSource(path, split, image_key, label_key, color, keep_errors)
    if kind == "files":
        return folder.FilesSource(paths, color, keep_errors)
    return folder.FolderSource(path, split, color, keep_errors)
