"""The progress bar of a terminal. Importing this needs rich."""

from __future__ import annotations

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

from fastfi.scoring.progress import images_per_second

__all__ = ["bar_of"]


class _Rate(ProgressColumn):
    """Images per second, over the last moments."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else images_per_second(speed), style="progress.data.speed")


def bar_of(verb: str, console: Console) -> Progress:
    """Verb, bar, number of images, their rate, the time so far and the time left."""
    return Progress(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
