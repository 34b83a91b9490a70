"""How a command ends: messages, exit codes, and signals that unwind the stack."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from fastfi.errors import FastfiError

__all__ = ["reported", "terminable"]


@contextmanager
def reported(show_traceback: bool, what: str, kept: str | None = None) -> Iterator[None]:
    """Turns fastfi's errors into one message and exit code 2, Ctrl-C into exit code 130.

    Args:
        show_traceback: whether to print where an error came from, too.
        what: the command writes: "scores".
        kept: what became of them when it is interrupted; None: none were written.
    """
    try:
        yield
    except FastfiError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"fastfi: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print(f"fastfi: interrupted, {kept or f'no {what} were written'}", file=sys.stderr)
        raise typer.Exit(130) from error


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
