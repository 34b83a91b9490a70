"""Tables for people: rich ones on a terminal, aligned text elsewhere; and JSON for programs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Cell", "number", "one_line", "show_json", "show_table"]

_WIDE = 10_000  # characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Cell(NamedTuple):
    """The head of a column.

    Attributes:
        text: its title.
        right: whether it is aligned to the right, as numbers are.
    """

    text: str
    right: bool = True


def number(value: float | None) -> str:
    """Four digits; "" for None."""
    return "" if value is None else f"{value:.4g}"


def one_line(value: object) -> str:
    """A text that stdout can print, without control characters, such as line breaks in file names:
    these are escaped."""
    text = _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), str(value))
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show_table(
    head: Sequence[Cell],
    rows: Sequence[Sequence[object]],
    title: str | None = None,
    spare: Sequence[str] = (),
) -> None:
    """Prints a table to stdout.

    Args:
        head: of each column.
        rows: texts, one for each column.
        title: above it.
        spare: titles of columns that are left out, one after the other, on a terminal that is too
            narrow for all.
    """
    texts = [[one_line(value) for value in row] for row in rows]
    if title is not None:
        print(one_line(title))
    if not sys.stdout.isatty():
        _print_plain(head, texts)
        return
    console = Console()
    left_out = list(spare)
    kept = list(range(len(head)))
    while True:
        table = _rich([head[i] for i in kept], [[row[i] for i in kept] for row in texts])
        width = Console(width=_WIDE).measure(table).maximum
        if width <= console.width or not left_out:
            break
        kept = [i for i in kept if head[i].text != left_out[0]]
        del left_out[0]
    # Wider than the terminal, which then wraps the lines: numbers are not cut.
    Console(width=max(width, console.width)).print(table)


def _rich(head: Sequence[Cell], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for cell in head:
        table.add_column(Text(cell.text), justify="right" if cell.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print_plain(head: Sequence[Cell], rows: Sequence[Sequence[str]]) -> None:
    every = [[cell.text for cell in head], *rows]
    widths = [max(map(cell_len, column)) for column in zip(*every, strict=True)]
    for row in every:
        cells = []
        for cell, text, width in zip(head, row, widths, strict=True):
            room = " " * (width - cell_len(text))
            cells.append(room + text if cell.right else text + room)
        print("  ".join(cells).rstrip())


def show_json(value: Any) -> None:
    """Prints JSON in ASCII. It has no infinity: infinite numbers become the string "inf"."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
