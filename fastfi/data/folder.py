"""Image folders (one subfolder per class, or images without labels), and single image files."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Generator, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastfi.data._encoded import Encoded, decode_batches, settled_decoder
from fastfi.data._pixels import Color, stack
from fastfi.data._source import Batch, SeekableSource
from fastfi.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SUFFIXES", "EncodedFiles", "FilesSource", "FolderSource", "is_image"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_SPLITS = ("train", "test", "validation", "valid", "val")


class EncodedFiles(SeekableSource):
    """Compressed images, one per file, whose names are their ids. Only the names are held.

    It can be indexed and pickled, so that ``torch.utils.data.DataLoader`` takes it, with worker
    processes too. Each item is ``(id, x [C, H, W] float32, label)``; the label is an int, or None
    where the data set has none.

    Args:
        root: what the names are relative to.
        items: (name, label) of each image, at least one.
        color: see :class:`~fastfi.data._pixels.ImageDecoder`. The first item decides for "auto".
        keep_errors: the first item that can be decoded decides, among the first 100.

    Raises:
        DataError: the image that decides cannot be decoded.
    """

    id_type = "str"

    def __init__(
        self,
        root: Path,
        items: Sequence[tuple[str, int]],
        color: Color,
        keep_errors: bool = False,
    ) -> None:
        self._root, self._items = root, items
        self.length = len(items)
        self._decoder = settled_decoder(self._encoded(items), self.path, color, keep_errors)
        assert self._decoder.shape is not None
        self.shape = self._decoder.shape

    def ids(self) -> Sequence[str]:
        return [name for name, _ in self._items]

    def only(self, names: Collection[str]) -> Self:
        """The images of these names, in the same order; still of the same colour."""
        chosen = copy.copy(self)
        chosen._items = [item for item in self._items if item[0] in names]
        chosen.length = len(chosen._items)
        return chosen

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> tuple[str, Tensor, int | None]:
        """One image; DataError where it cannot be decoded or has another size than the first."""
        if not -len(self) <= index(i) < len(self):
            raise IndexError(f"{self.path}: no image {i} among {len(self)}")
        name, label = self._items[i]
        x = stack([self._decoder(self._root / name, str(self._root / name))])[0]
        return name, x, label if self.labelled else None

    def _encoded(self, items: Sequence[tuple[str, int]]) -> Iterator[Encoded]:
        for name, label in items:
            path = self._root / name
            yield Encoded(name, str(path), path, label)

    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]:
        images = self._encoded(self._items[start:stop])
        yield from decode_batches(images, self._decoder, batch_size, self.labelled, keep_errors)


class FilesSource(EncodedFiles):
    """Single image files, without labels; their ids are the paths as given.

    Args:
        files: one or several different paths.
        color: see :class:`~fastfi.data._pixels.ImageDecoder`.
        keep_errors: files that cannot be decoded are no error yet: see :class:`EncodedFiles`.

    Raises:
        DataError: no such file, not an image, images of different sizes, or a file given twice.
    """

    format = "files"
    labelled = False

    def __init__(
        self, files: Sequence[Path], color: Color = "auto", keep_errors: bool = False
    ) -> None:
        for file in files:
            if not file.is_file():
                raise DataError(f"{file}: no such image file")
            if files.count(file) > 1:
                raise DataError(f"{file}: given more than once")
        folders = {file.parent for file in files}
        self.path = files[0] if len(files) == 1 else Path(os.path.commonpath(folders))
        super().__init__(Path(), [(file.as_posix(), 0) for file in files], color, keep_errors)
        for file in () if keep_errors else files[1:]:  # now, not halfway
            self._decoder(file, str(file))


class FolderSource(EncodedFiles):
    """Images in the subfolders of a folder, whose sorted names are the classes 0, 1, ...

    Without subfolders, the images in the folder itself are read without labels. Files with other
    suffixes than those of images, and names that start with a dot, are left out.

    Args:
        folder: the folder.
        split: the subfolder (``train``, ``test``, ...) that holds the classes, where there is one.
        color: see :class:`~fastfi.data._pixels.ImageDecoder`.
        keep_errors: see :class:`EncodedFiles`.

    Raises:
        DataError: no images, images beside class folders, or several splits and none chosen.
    """

    format = "folder"

    def __init__(
        self,
        folder: Path,
        split: str | None = None,
        color: Color = "auto",
        keep_errors: bool = False,
    ) -> None:
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
        items = [(name, 0) for name in flat]
        for label, name in enumerate(subfolders):
            items += [(image, label) for image in _walk(self.path, name)]
        if not items:
            raise DataError(
                f"{self.path}: no images, in it or in its subfolders (suffixes "
                f"{' '.join(SUFFIXES)})"
            )
        self.labelled = bool(subfolders)
        self.classes = tuple(subfolders) or None
        super().__init__(self.path, items, color, keep_errors)


def is_image(name: str) -> bool:
    """Whether a file of that name is taken for an image."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the images and of the subfolders directly in a folder."""
    images, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                subfolders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
    return sorted(images), sorted(subfolders)


def _walk(root: Path, subfolder: str) -> list[str]:
    """Sorted paths, relative to ``root`` and with "/", of all images below a subfolder."""
    found = []
    for folder, _, names in os.walk(root / subfolder):
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in names if is_image(name)]
    return sorted(found)
