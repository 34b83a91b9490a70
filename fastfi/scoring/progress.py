"""How far a run is: a bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastfi._extras import MissingExtraError, require

__all__ = ["images_per_second", "progress"]

_INTERVAL = 10.0  # seconds between lines where there is no terminal


def images_per_second(rate: float) -> str:
    """ "1,234 images/s", or "0.12 images/s"."""
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


@contextmanager
def progress(
    total: int | None,
    show: bool | None = None,
    verb: tuple[str, str] = ("scoring", "scored"),
    done: int = 0,
) -> Iterator[Callable[[int], None]]:
    """Shows progress while the block runs.

    Args:
        total: number of images, None if not known.
        show: None shows it on a terminal only; True also elsewhere, as plain lines; False never.
        verb: what is done to the images, and what was done.
        done: images of an earlier run.

    Yields:
        A function to be called with the number of images just done.

    Raises:
        MissingExtraError: stderr is a terminal, and rich is not installed.
    """
    if show is False:
        yield lambda n: None
        return
    try:
        console = require("rich.console", "showing progress", "score").Console(stderr=True)
    except MissingExtraError:
        if sys.stderr is not None and sys.stderr.isatty():
            raise
        console = None  # what is shown elsewhere, if anything, does not need it
    if console is not None and console.is_terminal:  # rich knows of notebooks, and of FORCE_COLOR
        from fastfi.scoring._bar import bar_of  # needs rich

        with bar_of(verb[0], console) as bar:
            task = bar.add_task(verb[0], total=total, completed=done)
            yield lambda n: bar.advance(task, n)
    elif show:
        yield _lines(total, verb[1], done)
    else:
        yield lambda n: None


def _lines(total: int | None, did: str, before: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = before

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < _INTERVAL and done != total:
            return
        last = now
        rate = (done - before) / max(now - start, 1e-9)
        left = "" if total is None else f" of {total}, {(total - done) / rate:.0f} s left"
        print(f"{did} {done}{left}, {images_per_second(rate)}", file=sys.stderr, flush=True)

    return advance
