"""Files that appear complete or not at all, and a folder that one run holds at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastfi.errors import FastfiError, OptionError, WriteError

__all__ = ["held", "reporting", "sweep_unfinished", "write_file"]

_UNFINISHED = re.compile(r"\.(_fastfi\.json|part-\d+-\d+\.parquet)\.[0-9a-f]{8}\.tmp")
# What flock answers on file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turns the errors of writing a file into WriteError, which names it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FastfiError):
            raise
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file under a hidden name beside it and renames it once it is on the disk.

    Args:
        path: replaced if it exists.
        write: called with the open file.

    Raises:
        WriteError: the disk is full, no permission, ...; nothing is left then.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with reporting(path):
        try:
            with unfinished.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)


def sweep_unfinished(folder: Path) -> None:
    """Removes what killed runs left behind; only for who holds the folder."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


_locks: set[int] = set()  # descriptors that hold folders


def _let_go() -> None:
    """In a forked process: workers that outlive a killed run would keep its folder locked."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder while the block runs; the system lets go of it when the
    process ends, however it ends.

    Raises:
        OptionError: another run holds it.
    """
    with reporting(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(f"out={folder}: another run is writing there") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise WriteError(f"cannot lock {folder}: {error.strerror}") from error
            warnings.warn(
                f"{folder}: its file system has no locks ({error.strerror}); make sure that no "
                "other run writes there",
                stacklevel=3,
            )
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)
