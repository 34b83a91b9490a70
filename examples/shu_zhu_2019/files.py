"""Files that are complete or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["replace", "replace_text"]


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` gets a hidden path in the same folder, with the same suffix, which then takes the
    place of ``path``; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.stem}.tmp{path.suffix}")
    write(hidden)
    os.replace(hidden, path)


def replace_text(path: Path, text: str) -> None:
    """The same, of a text in UTF-8."""
    replace(path, lambda hidden: hidden.write_text(text, encoding="utf-8"))
