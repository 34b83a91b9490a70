"""Image folders: one subfolder per class, or images without labels."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from fastfi.data._pixels import Color, ImageDecoder, stack
from fastfi.data._source import Batch, ImageSource
from fastfi.errors import DataError

__all__ = ["FolderSource"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_SPLITS = ("train", "test", "validation", "valid", "val")


class FolderSource(ImageSource):
    """Images in the subfolders of a folder, whose sorted names are the classes 0, 1, ...

    Without subfolders, the images in the folder itself are read without labels. Only the names are
    held in memory. Files with other suffixes than those of images, and names that start with a dot,
    are left out.

    Args:
        folder: the folder.
        split: the subfolder (``train``, ``test``, ...) that holds the classes, where there is one.
        color: see :class:`~fastfi.data._pixels.ImageDecoder`.

    Raises:
        DataError: no images, images beside class folders, or several splits and none chosen.
    """

    format = "folder"
    id_type = "str"

    def __init__(self, folder: Path, split: str | None = None, color: Color = "auto") -> None:
        self._color = color
        if split is not None and not (folder / split).is_dir():
            raise DataError(f"{folder}: no subfolder {split!r} for the split")
        self.path = folder if split is None else folder / split
        flat, subfolders = _listing(self.path)
        if subfolders and set(subfolders) <= set(_SPLITS):
            raise DataError(
                f"{self.path}: holds the splits {', '.join(subfolders)}; choose one (--split)"
            )
        if flat and subfolders:
            raise DataError(
                f"{self.path}: holds both images ({flat[0]}, ...) and subfolders "
                f"({subfolders[0]}, ...); expected one subfolder per class, or images alone"
            )
        self._items = [(name, 0) for name in flat]  # (path relative to the folder, label)
        for label, name in enumerate(subfolders):
            self._items += [(image, label) for image in _walk(self.path, name)]
        if not self._items:
            raise DataError(
                f"{self.path}: no images, in it or in its subfolders (suffixes "
                f"{' '.join(_SUFFIXES)})"
            )
        self.labelled = bool(subfolders)
        self.classes = tuple(subfolders) or None
        self.length = len(self._items)
        decoder = ImageDecoder(color)
        first = self.path / self._items[0][0]
        decoder(first, str(first))
        assert decoder.shape is not None
        self.shape = decoder.shape

    def _read(self, batch_size: int) -> Generator[Batch, None, None]:
        decoder = ImageDecoder(self._color)
        for start in range(0, len(self._items), batch_size):
            items = self._items[start : start + batch_size]
            images: list[Any] = [decoder(self.path / n, str(self.path / n)) for n, _ in items]
            y = torch.tensor([label for _, label in items]) if self.labelled else None
            yield Batch([name for name, _ in items], stack(images), y)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(_SUFFIXES)


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the images and of the subfolders directly in a folder."""
    images, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                subfolders.append(entry.name)
            elif _is_image(entry.name):
                images.append(entry.name)
    return sorted(images), sorted(subfolders)


def _walk(root: Path, subfolder: str) -> list[str]:
    """Sorted paths, relative to ``root`` and with "/", of all images below a subfolder."""
    found = []
    for folder, _, names in os.walk(root / subfolder):
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in names if _is_image(name)]
    return sorted(found)
