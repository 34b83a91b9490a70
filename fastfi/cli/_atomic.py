"""Output files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeVar

from fastfi.errors import OptionError, WriteError
from fastfi.scoring.files import reporting

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AtomicFile", "Table", "WriteError", "check_output", "reporting"]

T = TypeVar("T")


def check_output(
    path: Path, overwrite: bool, suffixes: Sequence[str], option: str = "--out"
) -> None:
    """Checks that a result may be written to ``path``, which ``option`` names.

    Raises:
        OptionError: another suffix, no such folder, or something is there already.
    """
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"{option} {path}: expected a name ending in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder")
    if path.exists() and not overwrite:
        raise OptionError(f"{option} {path}: exists already; --overwrite replaces it")


class Table(ABC, Generic[T]):
    """Rows to an open file, which stays open."""

    @abstractmethod
    def write(self, rows: T) -> None:
        """Appends rows."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is left."""

    def abandon(self) -> None:
        """Lets go of the file, whose content does not matter any more."""
        self.close()


class AtomicFile(ABC, Generic[T]):
    """A context manager that writes a file completely or not at all.

    Rows go to a hidden temporary file in the same folder. When the block ends without an exception
    it is renamed to ``path``; otherwise (an error, Ctrl-C) it is removed and whatever ``path`` held
    stays as it was.

    Args:
        path: the file's name in the end.
        overwrite: whether an existing file may be replaced.

    Raises:
        OptionError: see :func:`check_output`.
        WriteError: the disk is full, no permission, ...
    """

    suffixes: tuple[str, ...]

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self._path, self._overwrite = path, overwrite

    @abstractmethod
    def _table(self, file: BinaryIO) -> Table[T]:
        """The table of the path's suffix, writing to ``file``."""

    def __enter__(self) -> Self:
        check_output(self._path, self._overwrite, self.suffixes)
        self._part = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.part")
        with reporting(self._path):
            # O_EXCL: never another process's file; 0o666 is what open() uses, less the umask
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._file = os.fdopen(os.open(self._part, flags, 0o666), "wb")
        try:
            with reporting(self._path):
                self._rows = self._table(self._file)
        except BaseException:
            self._file.close()
            self._part.unlink()
            raise
        return self

    def write(self, rows: T) -> None:
        """Appends rows."""
        with reporting(self._path):
            self._rows.write(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with reporting(self._path):
                self._rows.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                check_output(self._path, self._overwrite, self.suffixes)  # hours may have passed
                os.replace(self._part, self._path)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        # Closing flushes what is buffered, which fails again where writing has just failed; the
        # exception that brought us here is the one to report.
        with suppress(OSError, ValueError):
            self._rows.abandon()
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)
