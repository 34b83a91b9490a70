"""How far a run is: a bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["images_per_second", "progress"]

_INTERVAL = 10.0  # seconds between lines where there is no terminal


def images_per_second(rate: float) -> str:
    """ "1,234 images/s", or "0.12 images/s"."""
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


class _Rate(ProgressColumn):
    """Images per second, over the last moments."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else images_per_second(speed), style="progress.data.speed")


@contextmanager
def progress(
    total: int | None, show: bool | None = None, verb: tuple[str, str] = ("scoring", "scored")
) -> Iterator[Callable[[int], None]]:
    """Shows progress while the block runs.

    Args:
        total: number of images, None if not known.
        show: None shows it on a terminal only; True also elsewhere, as plain lines; False never.
        verb: what is done to the images, and what was done.

    Yields:
        A function to be called with the number of images just done.
    """
    console = Console(stderr=True)
    if show is False or (show is None and not console.is_terminal):
        yield lambda n: None
    elif console.is_terminal:
        columns = (
            TextColumn(verb[0]),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(verb[0], total=total)
            yield lambda n: bar.advance(task, n)
    else:
        yield _lines(total, verb[1])


def _lines(total: int | None, did: str) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < _INTERVAL and done != total:
            return
        last = now
        rate = done / max(now - start, 1e-9)
        left = "" if total is None else f" of {total}, {(total - done) / rate:.0f} s left"
        print(f"{did} {done}{left}, {images_per_second(rate)}", file=sys.stderr, flush=True)

    return advance
