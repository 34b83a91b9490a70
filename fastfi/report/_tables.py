"""The tables of the page, as texts: percentiles, counts, what the scores were computed from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastfi.report._sheet import Measure, Sheet
from fastfi.scoring.percentiles import PERCENTILES, percentiles

__all__ = ["HEADS", "MOST_ROWS", "Group", "about", "counts", "groups", "number", "titles"]

HEADS = tuple("max" if q == 100 else f"{q} %" for q in PERCENTILES)
MOST_ROWS = 4000  # of percentiles on the page: columns that come later have none for each class
_OF = {"label": "of the true class", "true": "of the true class",
       "predicted": "of the predicted class"}  # fmt: skip


def number(value: float | None) -> str:
    """Four digits; "inf" as a sign, a dash where there is none."""
    if value is None or np.isnan(value):
        return "–"  # noqa: RUF001
    if np.isposinf(value):
        return "∞"
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.4g}")  # as JavaScript writes exponents


class Group(NamedTuple):
    """Percentiles of one group of samples: one row for each set of scores.

    Attributes:
        name: of the class, or "all".
        rows: (name of the set, its samples, the percentiles as texts).
        distance: between two sets, as text; "" for one.
    """

    name: str
    rows: list[tuple[str, str, list[str]]]
    distance: str


def _group(name: str, sets: Sequence[str], values: Sequence[NDArray[np.float64]]) -> Group:
    rows = []
    for title, fi in zip(sets, values, strict=True):
        of = percentiles(fi) if len(fi) else dict.fromkeys(PERCENTILES, float("nan"))
        rows.append((title, f"{len(fi):,}", [number(of[q]) for q in PERCENTILES]))
    both = len(values) == 2 and all(len(fi) for fi in values)
    return Group(name, rows, number(_distance(*values)) if both else "")


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The Kolmogorov-Smirnov distance; values may be infinite."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])  # the two functions step nowhere else
    below = (np.searchsorted(sample, at, "right") / len(sample) for sample in (a, b))
    return float(np.abs(np.subtract(*below)).max())


def groups(
    sheets: Sequence[Sheet], measure: Measure, names: Mapping[int, str], each: bool
) -> list[Group]:
    """All samples that have a score, then, where ``each``, those of each class: the true one, or
    the predicted one where no sample has a label."""
    labelled = any(sheet.labelled for sheet in sheets)
    columns = [sheet.columns[measure.column] for sheet in sheets]
    scored = [~np.isnan(column) for column in columns]
    sets = [sheet.name for sheet in sheets]
    found = [_group("all", sets, [c[s] for c, s in zip(columns, scored, strict=True)])]
    if each:
        # sorted once: a comparison for each of many classes would read every row as often
        split = []
        for sheet, column, there in zip(sheets, columns, scored, strict=True):
            of = (sheet.label if labelled else sheet.predicted)[there]
            order = np.argsort(of, kind="stable")
            split.append((column[there][order], of[order]))
        for k, name in names.items():
            parts = [
                fi[slice(*np.searchsorted(of, (k, k + 1)))]  # those of class k
                for fi, of in split
            ]
            if any(map(len, parts)):
                found.append(_group(name, sets, parts))
    return found


def titles(sheets: Sequence[Sheet], wanted: Sequence[Measure]) -> dict[str, str]:
    """What a reader calls each variant: whose class, which objective."""
    config = sheets[0].scores.config or {}
    said = config.get("y") or config.get("labels")
    objective = config.get("objective")
    one = objective[0] if isinstance(objective, list) and len(objective) == 1 else objective
    found = {}
    for variant in dict.fromkeys(m.variant for m in wanted):
        head, _, which = variant.partition("@")
        whose = _OF.get("label" if said == "both" else str(said), "")
        if head.startswith("predicted_"):
            whose = _OF["predicted"]
        which = which or (one if isinstance(one, str) else "")
        found[variant] = " ".join(filter(None, ["FI", whose, f"({which})" if which else ""]))
    return found


def counts(sheet: Sheet) -> list[tuple[str, str]]:
    """Rows, scored, errors, accuracy."""
    known = (sheet.label >= 0) & (sheet.predicted >= 0)
    accuracy = "no labels"
    if known.any():
        wrong = int(sheet.wrong.sum())
        accuracy = f"{1 - wrong / int(known.sum()):.2%} ({wrong:,} misclassified)"
    missing = sum(stop - start for start, stop in sheet.scores.missing)
    state = "complete"
    if not sheet.scores.complete:
        state = "unfinished" + (f", {missing:,} rows are missing" if missing else "")
    return [
        ("rows", f"{len(sheet):,}"),
        ("scored", f"{len(sheet) - len(sheet.errors):,}"),
        ("without a score", f"{len(sheet.errors):,}"),
        ("accuracy", accuracy),
        ("state", state),
    ]


def about(sheet: Sheet, version: str) -> list[tuple[str, str]]:
    """What the scores were computed from; values that are not texts as JSON."""
    found: list[tuple[str, Any]] = [("scores", str(sheet.scores.path))]
    for part in ("config", "model", "data"):
        content = getattr(sheet.scores, part)
        if content is None:
            found.append((part, "not stored"))
        else:
            found += [(f"{part}: {key}", value) for key, value in content.items()]
    found.append(("written by fastfi", version))
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in found]
