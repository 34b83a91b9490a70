"""The files of a score directory: which there are, which rows they hold, what the manifest says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastfi.errors import DataError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Part",
    "Stored",
    "find_parts",
    "gaps",
    "overlap",
    "part_name",
    "row_words",
]
__all__ += ["read_manifest"]

MANIFEST = "_fastfi.json"
FORMAT = 1  # of the manifest
_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")


class Part(NamedTuple):
    """A file of scores.

    Attributes:
        path: a .parquet or .csv file.
        rows: the range [start, stop) of the data that it holds; None where its name does not tell.
    """

    path: Path
    rows: tuple[int, int] | None


class Stored(NamedTuple):
    """What is stored under a path: its manifest, if it has one, and its parts in order."""

    manifest: dict[str, Any] | None
    parts: tuple[Part, ...]


def part_name(start: int, stop: int) -> str:
    """The file name of rows [start, stop)."""
    return f"part-{start:012}-{stop:012}.parquet"


def row_words(first: int, stop: int) -> str:
    """ "rows 0..8191" for 0 and 8192."""
    return f"row {first}" if stop == first + 1 else f"rows {first}..{stop - 1}"


def gaps(ranges: Sequence[tuple[int, int]], length: int | None) -> tuple[tuple[int, int], ...]:
    """What ranges [start, stop), in increasing order, leave out of [0, length); without a length,
    out of what comes before the last one's end."""
    left, at = [], 0
    for start, stop in ranges:
        if start > at:
            left.append((at, start))
        at = max(at, stop)
    if length is not None and at < length:
        left.append((at, length))
    return tuple(left)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a manifest: {error}") from error
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != FORMAT:
        raise DataError(
            f"{path}: expected a manifest of format {FORMAT}, got "
            f"{'no object' if not isinstance(manifest, dict) else f'format {form!r}'}"
        )
    return manifest


def find_parts(path: Path) -> Stored:
    """The manifest and the parts of a score directory, of a folder of Parquet files, or of one
    file. Parts are in the order of their rows, other files in that of their names.

    Raises:
        DataError: nothing is there, or no scores; a broken manifest; rows that two parts hold.
    """
    if path.is_file():
        if path.suffix.lower() not in (".parquet", ".csv"):
            raise DataError(
                f"{path}: expected a folder of scores, or a file ending in .parquet or .csv"
            )
        return Stored(None, (Part(path, None),))
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder")
    # The manifest first: where it says that all is there, the parts that are found next are all.
    manifest = read_manifest(path)
    try:
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".parquet")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    names = [name for name in names if not name.startswith((".", "_"))]  # pyarrow's rule, too
    if not names and manifest is None:
        raise DataError(f"{path}: holds no scores: no {MANIFEST} and no .parquet file")
    matches = [_NAME.fullmatch(name) for name in names]
    if manifest is None and not any(matches):
        return Stored(None, tuple(Part(path / name, None) for name in names))
    parts = []
    for name, match in zip(names, matches, strict=True):
        if match is None:
            raise DataError(
                f"{path}: holds {name}, which is none of its parts (part-START-STOP.parquet); "
                "move it elsewhere"
            )
        start, stop = int(match[1]), int(match[2])
        if start > stop:
            raise DataError(f"{path / name}: the name ends before it starts")
        parts.append(Part(path / name, (start, stop)))
    parts.sort(key=lambda part: (part.rows, part.path.name))
    twice = overlap(parts)
    if twice is not None:
        first, second, both = twice
        raise DataError(
            f"{path}: holds {row_words(*both)} twice, in {first.path.name} and in "
            f"{second.path.name}"
        )
    return Stored(manifest, tuple(parts))


def overlap(parts: Sequence[Part]) -> tuple[Part, Part, tuple[int, int]] | None:
    """Two parts that hold the same rows, and these; None if there are none.

    Args:
        parts: with rows, in increasing order.
    """
    last: Part | None = None
    end = 0
    for part in parts:
        assert part.rows is not None
        start, stop = part.rows
        if last is not None and start < min(stop, end):
            return last, part, (start, min(stop, end))
        if last is None or stop > end:
            last, end = part, stop
    return None
