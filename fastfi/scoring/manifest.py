"""The manifest of a score directory: written before the first row, completed after the last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from fastfi.errors import DataError, OptionError, ResumeError, WriteError
from fastfi.scoring.files import held, reporting, sweep_unfinished, write_file
from fastfi.scoring.fingerprint import differences
from fastfi.scoring.stored_parts import FORMAT, MANIFEST, find_parts, gaps, read_manifest

__all__ = ["all_there", "begin", "finish", "resumed"]


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"

    def write(file: BinaryIO) -> None:
        # What is no text, in names of files, becomes JSON's escapes.
        file.write(text.encode("utf-8", "backslashreplace"))

    write_file(folder / MANIFEST, write)


def begin(
    folder: Path, manifest: Mapping[str, Any], resume: bool, overwrite: bool, stack: ExitStack
) -> None:
    """Makes or takes over a directory for the run that the manifest describes, and keeps others
    out of it until ``stack`` ends.

    Args:
        folder: made if only its last part is missing.
        manifest: without "format", "created", "complete" and "rows".
        resume: whether it may hold scores.
        overwrite: whether those are removed.

    Raises:
        OptionError: ``folder`` cannot be the place; it holds scores and may not; another run.
        ResumeError: it holds scores of another run.
        WriteError, DataError: it cannot be written, or its manifest not be read.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"out={folder}: expected a folder, got a file")
    if not folder.parent.is_dir():
        raise OptionError(f"out={folder}: there is no folder {folder.parent}")
    with reporting(folder):
        folder.mkdir(exist_ok=True)
    stack.enter_context(held(folder))
    sweep_unfinished(folder)
    names = sorted(p.name for p in folder.iterdir())
    own = [n for n in names if n == MANIFEST or (n.startswith("part-") and n.endswith(".parquet"))]
    if len(own) < len(names) and MANIFEST not in own:
        other = next(name for name in names if name not in own)
        raise OptionError(f"out={folder}: expected an empty or new folder, or scores; got {other}")
    if own and overwrite:
        # The manifest last: a folder with parts and without it would belong to nobody.
        for name in sorted(own, key=lambda name: name == MANIFEST):
            with reporting(folder / name):
                (folder / name).unlink()
        own = []
    if not own:
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write(folder, {"format": FORMAT, "created": created, **manifest, "complete": False,
                        "rows": None})  # fmt: skip
    elif not resume:
        raise OptionError(
            f"out={folder}: holds scores already; resume=True goes on with them, overwrite=True "
            "replaces them"
        )
    resumed(folder, manifest)


def resumed(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest that a directory holds.

    Raises:
        ResumeError: it describes another run.
        DataError: there is none, or it is damaged.
    """
    found = read_manifest(folder)
    if found is None:
        raise DataError(
            f"{folder}: holds parts but no {MANIFEST}, which tells what they are; choose another "
            "folder, or overwrite"
        )
    lines = differences(found, manifest)
    if not lines and found.get("blocks") != manifest["blocks"]:
        lines = [f"blocks: {found.get('blocks')} there, {manifest['blocks']} now"]
    if lines:
        raise ResumeError(
            f"out={folder}: holds scores of another run:"
            + "".join(f"\n  {line}" for line in lines)
            + "\nchoose another folder, or overwrite"
        )
    return found


def _missing(folder: Path, rows: int) -> tuple[tuple[int, int], ...]:
    parts = find_parts(folder).parts
    return gaps([part.rows for part in parts if part.rows is not None], rows)


def all_there(folder: Path, rows: int) -> bool:
    """Whether no part of a complete directory was removed."""
    return not _missing(folder, rows)


def finish(folder: Path, rows: int) -> None:
    """Marks a directory as complete.

    Args:
        rows: samples of the data.

    Raises:
        WriteError: rows are missing: somebody removed parts meanwhile.
    """
    missing = _missing(folder, rows)
    if missing:
        raise WriteError(
            f"{folder}: expected all rows to be there, {missing[0][0]} to {missing[0][1] - 1} are "
            "not; the same call scores them"
        )
    _write(folder, {**(read_manifest(folder) or {}), "complete": True, "rows": rows})
