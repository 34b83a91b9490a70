"""``fastfi summary``: what a set of scores says, in a few tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from fastfi.cli import _options as o
from fastfi.cli._guard import reported
from fastfi.cli._show import Cell, number, one_line, show_json, show_table
from fastfi.scoring.percentiles import PERCENTILES, percentiles
from fastfi.scoring.result import Scores, Summary, open_scores
from fastfi.scoring.stored_parts import row_words

__all__ = ["SPARE", "counts", "percentile_heads", "state", "summary_command"]

SPARE = ("1 %", "99 %", "25 %", "75 %", "90 %")  # percentiles that a narrow terminal does without

_SHOWN, _LONGEST = 3, 300  # errors that are shown, and of how many characters


def percentile_heads() -> list[Cell]:
    return [Cell("max" if q == 100 else f"{q} %") for q in PERCENTILES]


def counts(summary: Summary) -> str:
    """ "1,797 samples, 2 errors, accuracy 96.10%"."""
    text = f"{summary.rows:,} samples"
    if summary.errors:
        text += f", {summary.errors:,} {'error' if summary.errors == 1 else 'errors'}"
    unscored = summary.rows - summary.scored - summary.errors
    if unscored > 0:
        text += f", {unscored:,} without a score"
    return text if summary.accuracy is None else f"{text}, accuracy {summary.accuracy:.2%}"


def state(scores: Scores) -> str | None:
    """What is missing; None if the scores are complete."""
    if scores.complete:
        return None
    some = ", ".join(row_words(*rows) for rows in scores.missing[:5])
    more = f" and {len(scores.missing) - 5} more ranges" if len(scores.missing) > 5 else ""
    return f"unfinished; missing: {some}{more}" if some else "unfinished"


def _percentiles(scores: Scores, column: str) -> dict[float, float]:
    values = scores.values(column)
    values = values[~np.isnan(values)]
    return percentiles(values) if len(values) else {}


def _some_errors(scores: Scores) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not scores.errors:
        return found
    for table in scores.tables(["id", "error"]):
        found += table.filter(table.column("error").is_valid()).slice(0, _SHOWN).to_pylist()
        if len(found) >= _SHOWN:
            break
    return found[:_SHOWN]


def _log_prob(column: str) -> str:
    """The column of the probability that belongs to one of FI."""
    return "predicted_log_prob" if column.startswith("predicted_") else "log_prob"


def _top(scores: Scores, n: int, column: str) -> list[dict[str, Any]]:
    """Rows of the n largest, with the columns that tell about a sample, and the one asked for."""
    about = ("id", "label", "predicted", _log_prob(column), column)
    names = [name for name in about if name in scores.columns]
    return scores.top(n, column).select(list(dict.fromkeys(names))).to_pylist()


def _by(scores: Scores, by: str, column: str) -> list[dict[str, Any]]:
    """Percentiles for each class, in the order of classes; samples without one come last."""
    of = scores.values(by, errors=True)
    values = scores.values(column)
    known = ~np.isnan(of)
    order = np.argsort(of[known], kind="stable")
    classes, starts = np.unique(of[known][order], return_index=True)
    groups: list[tuple[int | None, NDArray[np.float64]]] = [
        (int(k), v)
        for k, v in zip(classes, np.split(values[known][order], starts[1:]), strict=False)
    ]
    if not known.all():
        groups.append((None, values[~known]))
    rows = []
    for k, every in groups:
        scored = every[~np.isnan(every)]
        rows.append(
            {
                "class": k,
                "name": _class(scores, k, None),
                "rows": len(every),
                "scored": len(scored),
                "percentiles": percentiles(scored) if len(scored) else {},
            }
        )
    return rows


def _class(scores: Scores, k: int | None, otherwise: str | None = "") -> str | None:
    """A class's name, or else its number; ``otherwise`` where there is no class."""
    if k is None:
        return otherwise
    names = scores.class_names
    return names[k] if names is not None and 0 <= k < len(names) else str(k)


def summary_command(
    scores: Annotated[
        Path,
        typer.Argument(
            metavar="SCORES", help="A folder of scores, or a .parquet or .csv file of them."
        ),
    ],
    top: Annotated[int, typer.Option(min=0, help="Show this many samples of the largest FI.")] = 0,
    column: Annotated[
        str | None,
        typer.Option(
            help="Only this column: fi, fi:NAME, ..., rank, log_prob. Default: all of FI."
        ),
    ] = None,
    by: Annotated[
        Literal["label", "predicted"] | None,
        typer.Option(help="Percentiles for each class, too."),
    ] = None,
    as_json: o.JsonOption = False,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Print percentiles of FI, counts, and the samples of the largest FI.

    Samples with an error do not count in percentiles. With several columns of FI, --top and --by
    are about the first, unless --column names another. A narrow terminal shows fewer percentiles.
    """
    with reported(show_traceback, "tables"):
        opened = open_scores(scores)
        columns = list(opened.fi_columns) if column is None else [opened.column(column)]
        summary = opened.summary()
        said = {
            "path": str(scores),
            "rows": summary.rows,
            "scored": summary.scored,
            "errors": summary.errors,
            "accuracy": summary.accuracy,
            "complete": summary.complete,
            "missing": opened.missing,
            "config": opened.config,
            "percentiles": {name: _percentiles(opened, name) for name in columns},
            "first_errors": _some_errors(opened),
        }
        if top:
            said["top"] = _top(opened, top, columns[0]) if columns else []
        if by is not None:
            said["by"] = _by(opened, by, columns[0]) if columns else []
        if as_json:
            show_json(said)
        else:
            _show(opened, summary, said, by)


def _show(opened: Scores, summary: Summary, said: dict[str, Any], by: str | None) -> None:
    print(one_line(f"{opened.path}: {counts(summary)}"))
    unfinished = state(opened)
    if unfinished is not None:
        print(unfinished)
    for row in said["first_errors"]:
        text = one_line(f"error of {row['id']}: {row['error']}")
        print(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")
    left = summary.errors - len(said["first_errors"])
    if left > 0:
        print(f"and {left:,} more errors")
    heads = percentile_heads()
    rows = [[name, *_cells(of)] for name, of in said["percentiles"].items() if of]
    if rows:
        print()
        show_table([Cell("", right=False), *heads], rows, spare=SPARE)
    elif summary.rows:
        print("no sample has a score")
    column = next(iter(said["percentiles"]), "")
    if said.get("by"):
        print()
        head = [Cell(str(by), right=False), Cell("samples"), Cell("scored"), *heads]
        grouped = [
            [
                row["name"] or "none",
                f"{row['rows']:,}",
                f"{row['scored']:,}",
                *_cells(row["percentiles"]),
            ]
            for row in said["by"]
        ]
        show_table(head, grouped, f"{column} by {by}", SPARE)
    if said.get("top"):
        print()
        _show_top(opened, said["top"], column)


def _cells(of: dict[float, float]) -> list[str]:
    return [number(of.get(q)) for q in PERCENTILES]


def _show_top(opened: Scores, rows: list[dict[str, Any]], column: str) -> None:
    probability = _log_prob(column)
    head = [
        Cell("P" if name == probability != column else name, right=name in (probability, column))
        for name in rows[0]
    ]
    table = []
    for row in rows:
        cells: list[str | None] = []
        for name, value in row.items():
            if name == column:
                cells.append(number(value))
            elif name in ("label", "predicted"):
                cells.append(_class(opened, value))
            elif name == probability:
                cells.append("" if value is None else number(math.exp(value)))
            else:
                cells.append("" if value is None else str(value))
        table.append(cells)
    show_table(head, table, f"largest {column}")
