"""What a run of ``bench.gpu`` found: rows of figures, facts, failures; tables and files of them.

Nothing here imports torch: the compiled modules may not be built yet.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OutOfTime", "Report", "Row", "Run", "short_table", "table"]


class OutOfTime(Exception):
    """A section has used the time it may take."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        value: in ``unit``; None where it could not be measured, for the reason in ``note``.
        unit: "ms", "GB/s", "x", ...
        yardstick: what it is compared with, a number in the same unit, and ...
        against: ... its name: "floor" is bytes over the copy bandwidth of the same run.
        fraction: of the floor that is reached, or times the yardstick.
        target: the aim, in words; "" without one.
        met: whether it was reached; None without a target.
        main: whether it belongs in the short table.
        note: anything else.
    """

    name: str
    value: float | None = None
    unit: str = ""
    yardstick: float | None = None
    against: str = ""
    fraction: float | None = None
    target: str = ""
    met: bool | None = None
    main: bool = False
    note: str = ""


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    digits = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{digits} {unit}".strip()


def _cells(row: Row) -> list[str]:
    yardstick = f"{row.against} {_number(row.yardstick, row.unit)}" if row.against else ""
    fraction = ""
    if row.fraction is not None:
        fraction = f"{row.fraction:.0%}" if row.against == "floor" else f"{row.fraction:.3g} x"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    value = _number(row.value, row.unit) if row.value is not None else row.note or "-"
    return [row.name, value, yardstick, fraction, row.target, met]


def table(rows: Sequence[Row], notes: bool = False) -> str:
    """A Markdown table of all columns, the notes too where they are wanted."""
    head = ["what", "value", "yardstick", "share", "target", "met", *(["notes"] if notes else [])]
    cells = [[*_cells(row), *([row.note] if notes else [])] for row in rows]
    rule = [":--", "--:", "--:", "--:", ":--", ":--", ":--"][: len(head)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *cells])


def short_table(rows: Sequence[Row]) -> str:
    """The same of the main rows, aligned for a terminal."""
    head = ["what", "value", "yardstick", "share", "target", "met"]
    cells = [head, *(_cells(row) for row in rows if row.main)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = (zip(line, widths, strict=True) for line in cells)
    return "\n".join("  ".join(c.ljust(w) for c, w in line).rstrip() for line in padded)


def _finite(value: Any) -> Any:
    """The same with NaN and infinities as words, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Report:
    """Everything that has been found so far.

    Attributes:
        rows: by section.
        facts: what later sections build on: ceilings, and which operators are right.
        failures: by section and item, with tracebacks.
        seconds: that each section took.
        stream: where every entry is written as soon as it is there, so that it outlives the
            process; None for nowhere.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stream: Path | None = None

    def _write(self, **entry: Any) -> None:
        if self.stream is not None:
            with self.stream.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def add(self, section: str, row: Row) -> None:
        """Keeps and prints a row."""
        self.rows.setdefault(section, []).append(row)
        print("  ".join(c for c in _cells(row) if c), flush=True)
        self._write(section=section, row=asdict(row))

    def note(self, key: str, value: Any) -> None:
        """Keeps a fact; a dict is merged into what is there."""
        if isinstance(value, dict) and isinstance(self.facts.get(key), dict):
            self.facts[key] = {**self.facts[key], **value}
        else:
            self.facts[key] = value
        self._write(fact=key, value=value)

    def fail(self, section: str, item: str, text: str) -> None:
        """Keeps and prints a failure."""
        self.failures.append({"section": section, "item": item, "text": text})
        print(f"FAILED  {section}, {item}: {text.strip().splitlines()[-1]}", flush=True)
        self._write(failure={"section": section, "item": item, "text": text})

    def read(self, stream: Path) -> None:
        """Takes over what another process wrote."""
        if not stream.exists():
            return
        for line in stream.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # it was stopped while it wrote
            entry = json.loads(line)
            if "row" in entry:
                self.rows.setdefault(entry["section"], []).append(Row(**entry["row"]))
            elif "fact" in entry:
                stream_, self.stream = self.stream, None
                self.note(entry["fact"], entry["value"])
                self.stream = stream_
            else:
                self.failures.append(entry["failure"])

    def all_rows(self) -> list[Row]:
        """Of all sections, in their order."""
        return [row for rows in self.rows.values() for row in rows]

    def content(self) -> dict[str, Any]:
        """For the JSON file."""
        rows = {name: [asdict(r) for r in rows] for name, rows in self.rows.items()}
        content = {"facts": self.facts, "rows": rows, "failures": self.failures}
        return _finite({**content, "seconds": self.seconds})


@dataclass
class Run:
    """What a section is given.

    Attributes:
        section: its name.
        device: "cuda" or "cpu".
        rehearsal: on a CPU, where no figure means anything.
        quick: small sizes.
        seed: of all random inputs.
        report: where figures go.
        deadline: of the section, as time.monotonic() tells it.
        options: the command line's.
    """

    section: str
    device: str
    rehearsal: bool
    quick: bool
    seed: int
    report: Report
    deadline: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether tiny sizes are wanted: for a rehearsal, or to be quick."""
        return self.rehearsal or self.quick

    def left(self) -> float:
        """Seconds that the section still has."""
        return self.deadline - time.monotonic()

    def check_time(self) -> None:
        """OutOfTime if there are none."""
        if self.left() <= 0:
            raise OutOfTime(f"section {self.section} ran out of time")

    def add(self, name: str, value: float | None = None, unit: str = "", **rest: Any) -> None:
        self.report.add(self.section, Row(name, value, unit, **rest))

    def note(self, key: str, value: Any) -> None:
        self.report.note(key, value)

    @contextmanager
    def guard(self, item: str) -> Iterator[None]:
        """An error inside is recorded with its traceback, and the section goes on."""
        self.check_time()
        try:
            yield
        except OutOfTime:
            raise
        except Exception:
            self.report.fail(self.section, item, traceback.format_exc())

    def is_right(self, op: str) -> bool:
        """Whether the check of an operator has passed; if not, a row says that no speed is given
        for it."""
        state = self.report.facts.get("checks", {}).get(op)
        if state is True:
            return True
        why = "not timed: its check failed" if state is False else "not timed: it was not checked"
        self.add(op, note=why, main=True)
        return False
