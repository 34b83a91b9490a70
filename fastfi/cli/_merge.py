"""``fastfi merge``: parts of one run, scored on several machines, put together."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, BinaryIO, final

import typer

from fastfi._extras import require
from fastfi.cli import _options as o
from fastfi.cli._atomic import AtomicFile, Table, check_output, reporting
from fastfi.cli._guard import reported, terminable
from fastfi.cli._show import one_line
from fastfi.cli._summary_command import state
from fastfi.errors import DataError, OptionError
from fastfi.scoring.fingerprint import differences
from fastfi.scoring.result import Scores, open_scores
from fastfi.scoring.stored_parts import (
    MANIFEST,
    Part,
    Stored,
    find_parts,
    gaps,
    overlap,
    row_words,
)

__all__ = ["join", "merge_command"]

# Of a manifest: what the files say about themselves.
_ABOUT = {"fastfi": "version", "torch": "torch", "config": "config", "model": "model",
          "data": "data"}  # fmt: skip
_FILES = (".parquet", ".csv")


def _complete(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with every entry that is compared, None where it has none."""
    config, model, data = (_mapping(manifest, key) for key in ("config", "model", "data"))
    return {
        "fastfi": None,
        **manifest,
        "config": config,
        "model": {"class": None, "digest": None, **model},
        "data": {"length": None, "digest": None, "probes": [], **data},
    }


def _mapping(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _check_same_run(first: Scores, other: Scores, manifests: Sequence[Mapping[str, Any]]) -> None:
    a, b = map(_complete, manifests)
    words = f"in {first.path}", f"in {other.path}"
    lines = differences(a, b, words)
    lines += [
        f"{key}: {a.get(key)!r} {words[0]}, {b.get(key)!r} {words[1]}"
        for key in ("id_type", "blocks")
        if a.get(key) != b.get(key)
    ]
    if not lines and first.columns and other.columns and first.columns != other.columns:
        columns = [f"{', '.join(s.columns)} in {s.path}" for s in (first, other)]
        lines.append("columns: " + "; ".join(columns))
    if lines:
        raise DataError(
            f"{other.path}: expected scores of the same run as {first.path}, but they differ:"
            + "".join(f"\n  {line}" for line in lines)
        )


def _rows(manifests: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of rows when all are there; None if nobody knows."""
    for manifest in manifests:  # a finished one knows best, of streams and with limit
        if manifest.get("complete") is True and isinstance(manifest.get("rows"), int):
            return int(manifest["rows"])
    length = _mapping(manifests[0], "data").get("length")
    return length if isinstance(length, int) else None


def join(folders: Sequence[Path]) -> tuple[Scores, dict[str, Any]]:
    """Score directories of one run as one.

    Returns:
        The scores, whose parts lie in different folders, and the manifest of a folder with them.

    Raises:
        DataError: no score directory; another run's; rows that two of them hold.
    """
    opened: list[Scores] = []
    manifests: list[dict[str, Any]] = []
    parts: list[Part] = []
    for folder in folders:
        if any(folder.resolve() == scores.path.resolve() for scores in opened):
            raise OptionError(f"{folder}: was given more than once")
        stored = find_parts(folder)
        if stored.manifest is None:
            raise DataError(
                f"{folder}: expected a score directory, got one without {MANIFEST}: nothing tells "
                "which rows these are"
                if folder.is_dir()
                else f"{folder}: expected a score directory, got a file"
            )
        scores = Scores(folder, stored)
        manifests.append(stored.manifest)
        if opened:
            _check_same_run(opened[0], scores, (manifests[0], stored.manifest))
        opened.append(scores)
        parts += stored.parts
    parts.sort(key=lambda part: (part.rows or (0, 0), str(part.path)))
    twice = overlap(parts)
    if twice is not None:
        a, b, both = twice
        raise DataError(f"{a.path} and {b.path} both hold {row_words(*both)}")
    length = _rows(manifests)
    ranges = [part.rows for part in parts if part.rows is not None]
    whole = length is not None and not gaps(ranges, length)
    if length is not None and ranges and ranges[-1][1] > length:
        raise DataError(f"{parts[-1].path}: expected rows below {length}, the length of the data")
    manifest = {
        **manifests[0],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": whole,
        "rows": length if whole else None,
    }
    return Scores(folders[0], Stored(manifest, tuple(parts))), manifest


def _copy(parts: Iterable[Path], manifest: Mapping[str, Any], out: Path) -> None:
    """Makes a folder of copies, which appears when it is complete."""
    made = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        with reporting(out):
            made.mkdir()
            for path in parts:
                shutil.copyfile(path, made / path.name)
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            (made / MANIFEST).write_text(text, encoding="utf-8")
            for path in made.iterdir():
                _sync(path)
            _sync(made)
        open_scores(made)  # the copies are whole
        with reporting(out):
            _check_folder(out)  # again: minutes may have passed
            os.rename(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}")
    if out.exists() or out.is_symlink():
        raise OptionError(f"--out {out}: exists already; expected a new folder")


@final
class _MergedFile(AtomicFile[Any]):
    """All rows in one file; rows are pyarrow tables."""

    suffixes = _FILES

    def __init__(self, path: Path, schema: Any, overwrite: bool) -> None:
        super().__init__(path, overwrite)
        self._schema = schema

    def _table(self, file: BinaryIO) -> Table[Any]:
        kind = _Csv if self._path.suffix.lower() == ".csv" else _Parquet
        return kind(file, self._schema)


class _Parquet(Table[Any]):
    def __init__(self, file: BinaryIO, schema: Any) -> None:
        parquet = require("pyarrow.parquet", "writing Parquet files")
        self._writer = parquet.ParquetWriter(file, schema)

    def write(self, rows: Any) -> None:
        self._writer.write_table(rows.replace_schema_metadata(self._writer.schema.metadata))

    def close(self) -> None:
        self._writer.close()


class _Csv(Table[Any]):
    """RFC 4180 with a header line; floats with all their digits, absent values empty."""

    def __init__(self, file: BinaryIO, schema: Any) -> None:
        self._file = file
        self._append([schema.names])

    def write(self, rows: Any) -> None:
        self._append(zip(*(column.to_pylist() for column in rows.columns), strict=True))

    def close(self) -> None:
        pass

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())


def _write_file(scores: Scores, manifest: Mapping[str, Any], out: Path, overwrite: bool) -> None:
    if not scores.columns:
        raise DataError(f"{scores.path}: holds no scores yet")
    pa = require("pyarrow", "merging scores")
    said = {f"fastfi.{key}": manifest.get(name) for name, key in _ABOUT.items()}
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items() if v is not None}
    schema = pa.schema(scores.schema, metadata=text)
    with _MergedFile(out, schema, overwrite) as file:
        for table in scores.tables():
            file.write(table)


def merge_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Folders of scores, of one run each."),
    ],
    out: Annotated[
        Path, typer.Option(help="A new folder of scores; or one .parquet or .csv file.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file; never a folder.")
    ] = False,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Put scores together that several machines wrote into folders of their own.

    All must come from the same model, data and options, and hold different rows. The result appears
    only when it is written completely. Rows may be missing: it then says which, and the folder
    counts as unfinished, so that fastfi score goes on with it.
    """
    with reported(show_traceback, "scores"), terminable():
        single = out.suffix.lower() in _FILES
        if single:
            check_output(out, overwrite, _FILES)
        else:
            _check_folder(out)
        if any(out.resolve().parent == folder.resolve() for folder in folders):
            raise OptionError(f"--out {out}: expected a place outside of the folders to be merged")
        scores, manifest = join(folders)
        if single:
            _write_file(scores, manifest, out, overwrite)
        else:
            _copy(scores.files, manifest, out)
        unfinished = state(scores)
        if unfinished is not None:
            print(one_line(f"fastfi: {out}: {unfinished}"), file=sys.stderr)
        print(one_line(f"{len(scores):,} rows of {len(folders)} folders in {out}"))
