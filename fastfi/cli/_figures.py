"""A folder of figures, one per image, that appear together when all are drawn."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fastfi._extras import require
from fastfi.cli._atomic import reporting
from fastfi.errors import OptionError

__all__ = ["FigureFolder", "figure_names"]

_LONGEST = 50  # characters of a name: at most 200 bytes in UTF-8, where file systems allow 255
_LISTED = 8  # files that an error lists


def draw(x: Tensor, maps: Tensor, scales: Sequence[int], caption: str) -> Any:
    """The figure of one image: x [C, H, W], maps [S, C, H, W] or [S, H, W]."""
    from fastfi import plot  # it imports matplotlib only when it draws

    return plot.influence_map(x, maps, scales=scales, titles=[caption])


def figure_names(ids: Sequence[int] | Sequence[str]) -> list[str]:
    """A different, safe file name for each id.

    ``17`` becomes ``17.png``, ``cat/1.jpg`` becomes ``cat_1.png``: letters, digits, "-", "_" and
    "." are kept. Names that would be equal, on file systems that ignore case too, or too long get a
    hash of their id.
    """
    every: list[int | str] = [*ids]
    plain = [_plain(i) for i in every]
    count = Counter(p.casefold() for p in plain)

    def name(p: str, i: int | str) -> str:
        alone = count[p.casefold()] == 1 and len(p) <= _LONGEST
        return f"{p}.png" if alone else f"{p[:_LONGEST]}-{_hash(i)}.png"

    return [name(p, i) for p, i in zip(plain, every, strict=True)]


def _plain(name: int | str) -> str:
    stem = os.path.splitext(name)[0] if isinstance(name, str) else str(name)
    return re.sub(r"[^\w.-]+", "_", stem).lstrip("._") or "image"


def _hash(name: int | str) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()[:12]


class FigureFolder:
    """A context manager that fills a folder with one figure per image, all or none.

    Figures go to a hidden folder in it. When the block ends without an exception they are moved to
    their names; otherwise they are removed, and the folder too if it was made here.

    Args:
        folder: made when the block begins.
        ids: of all images, in order.
        overwrite: whether figures may be replaced.

    Raises:
        OptionError: from the constructor: not a folder, or figures are there already.
        MissingExtraError: from the constructor: no matplotlib.
        WriteError: the disk is full, no permission, ...
    """

    def __init__(
        self, folder: Path, ids: Sequence[int] | Sequence[str], overwrite: bool = False
    ) -> None:
        require("matplotlib", "drawing figures", "plot")
        self._folder, self._overwrite = folder, overwrite
        self._names = figure_names(ids)
        self._done = 0
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"--figures {folder}: expected a folder, got a file")
        if not folder.parent.is_dir():
            raise OptionError(f"--figures {folder}: there is no folder {folder.parent}")
        self.check()

    def check(self) -> None:
        """OptionError if figures of these names are there and may not be replaced."""
        if self._overwrite or not self._folder.is_dir():
            return
        present = set(os.listdir(self._folder))
        old = [name for name in self._names if name in present]
        if old:
            more = f" and {len(old) - _LISTED} more" if len(old) > _LISTED else ""
            raise OptionError(
                f"--figures {self._folder}: {', '.join(old[:_LISTED])}{more} there already; "
                "--overwrite replaces them"
            )

    def __enter__(self) -> FigureFolder:
        with reporting(self._folder):
            self._made = not self._folder.exists()
            self._folder.mkdir(exist_ok=True)
            self._part = self._folder / f".figures.{secrets.token_hex(4)}.part"
            self._part.mkdir()
        return self

    def add(self, x: Tensor, maps: Tensor, scales: Sequence[int], caption: str) -> None:
        """Draws the next image.

        Args:
            x: [C, H, W], as it was read.
            maps: [S, C, H, W] or [S, H, W].
            scales: the S sizes.
            caption: printed below the image.
        """
        name = self._names[self._done]
        figure = draw(x, maps, scales, caption)
        with reporting(self._folder / name):
            figure.savefig(self._part / name, format="png")
        self._done += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.check()  # again: hours may have passed
                with reporting(self._folder):
                    for name in self._names[: self._done]:
                        os.replace(self._part / name, self._folder / name)
        finally:
            shutil.rmtree(self._part, ignore_errors=True)
            if self._made and not any(self._folder.iterdir()):
                self._folder.rmdir()
