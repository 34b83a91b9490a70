"""Scores of two networks, two data sets or two measures side by side."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastfi._extras import require
from fastfi.errors import DataError
from fastfi.scoring.percentiles import percentiles
from fastfi.scoring.result import Scores, open_scores
from fastfi.scoring.stored_values import numbers

__all__ = ["Comparison", "Pairs", "compare", "ks_distance"]


class Pairs(NamedTuple):
    """The samples that have a score in both, in the first one's order.

    Attributes:
        ids: [m] int64, or strings (object).
        a, b: [m] float64, their values.
        same_label: [m] whether the data's labels are equal; None where no pair has two.
        same_prediction: [m] whether the predicted classes are; likewise.
        spearman: correlation of the ranks of a and b; None where one of them is constant.
    """

    ids: NDArray[Any]
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    same_label: NDArray[np.bool_] | None
    same_prediction: NDArray[np.bool_] | None
    spearman: float | None


class Comparison(NamedTuple):
    """What :func:`compare` finds. Pairs of values are those of the first and of the second scores.

    Attributes:
        columns: that were compared.
        rows: samples, those without a score included.
        values: [n] float64 each, of the samples that have one.
        percentiles: of the values.
        ks: the Kolmogorov-Smirnov distance: the largest difference of the two distribution
            functions, 0 to 1.
        p_value: of the two-sided test that both come from one distribution. It takes samples for
            independent, which the same samples in both are not.
        matched: ids that are in both, with or without a score; 0 where ids cannot be matched.
        only: ids that are in one of them only.
        pairs: None where ids cannot be matched, or only few of them; ``unpaired`` says why.
        unpaired: a sentence; None where there are pairs.
        same_data: whether the stored digests of the data are equal; None where one is not stored.
    """

    columns: tuple[str, str]
    rows: tuple[int, int]
    values: tuple[NDArray[np.float64], NDArray[np.float64]]
    percentiles: tuple[dict[float, float], dict[float, float]]
    ks: float
    p_value: float
    matched: int
    only: tuple[int, int]
    pairs: Pairs | None
    unpaired: str | None
    same_data: bool | None


class _Match(NamedTuple):
    """Rows of equal ids.

    Attributes:
        of_a, of_b: [matched] row numbers, None where ids cannot be matched.
        why: they cannot.
    """

    of_a: NDArray[np.int64] | None
    of_b: NDArray[np.int64] | None
    why: str | None


def _match(a: Any, b: Any, types: tuple[str, str]) -> _Match:
    """Matches two columns of ids (pyarrow.ChunkedArray), of which a null matches nothing.

    Integers match the strings that they are written as: CSV does not tell "7" from 7.
    """
    compute = require("pyarrow.compute", "comparing scores", "score")
    if types[0] != types[1]:
        a, b = (ids.cast("string") for ids in (a, b))
    for which, ids in (("first", a), ("second", b)):
        there = ids.drop_null()
        if compute.count_distinct(there).as_py() < len(there):
            counts = compute.value_counts(there)
            most = int(np.argmax(counts.field("counts").to_numpy()))
            value, times = counts[most].as_py()["values"], counts[most].as_py()["counts"]
            return _Match(None, None, f"the {which} holds the id {value!r} {times} times")
    # index_in would match nulls with each other
    found = compute.if_else(compute.is_valid(a), compute.index_in(a, value_set=b), None)
    of_a = np.flatnonzero(found.is_valid().to_numpy())
    of_b = found.drop_null().to_numpy().astype(np.int64)
    if not len(of_a) and types[0] != types[1]:
        words = {"int": "integers", "str": "strings"}
        return _Match(None, None, f"ids are {words[types[0]]} in the first, {words[types[1]]} in "
                                  "the second")  # fmt: skip
    if 2 * len(of_a) <= max(len(a), len(b)):
        why = f"{len(of_a)} ids are in both, of {len(a)} in the first and {len(b)} in the second"
        return _Match(of_a, of_b, why)
    return _Match(of_a, of_b, None)


def ks_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The Kolmogorov-Smirnov distance, the largest difference of two distribution functions.

    Args:
        a, b: [n], [m], both at least 1, in any order; inf is allowed, NaN is not.

    Returns:
        0 to 1.
    """
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    below = (np.searchsorted(v, at, "right") / len(v) for v in (a, b))
    return float(np.abs(np.subtract(*below)).max())


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    stats = require("scipy.stats", "comparing scores")
    if len(a) < 2 or np.all(a == a[0]) or np.all(b == b[0]):
        return None
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _same(a: Scores, b: Scores, column: str, rows: _Match) -> NDArray[np.bool_] | None:
    """[matched]: whether a column of integers is equal; a missing value differs from any other."""
    if column not in a.columns or column not in b.columns:
        return None
    x = numbers(a.to_table([column]).column(0))[rows.of_a]
    y = numbers(b.to_table([column]).column(0))[rows.of_b]
    return None if np.all(np.isnan(x) | np.isnan(y)) else x == y


def _pairs(
    a: Scores, b: Scores, ids: Any, rows: _Match, values: tuple[NDArray[np.float64], ...]
) -> Pairs:
    x, y = values[0][rows.of_a], values[1][rows.of_b]
    both = ~(np.isnan(x) | np.isnan(y))
    same = [_same(a, b, name, rows) for name in ("label", "predicted")]
    label, prediction = (None if each is None else each[both] for each in same)
    assert rows.of_a is not None
    names = ids.take(rows.of_a[both]).to_numpy()
    return Pairs(names, x[both], y[both], label, prediction, _spearman(x[both], y[both]))


def _same_data(a: Scores, b: Scores) -> bool | None:
    first, second = ((s.data or {}).get("digest") for s in (a, b))
    return None if first is None or second is None else first == second


def compare(
    a: Scores | str | PathLike[str], b: Scores | str | PathLike[str], column: str | None = None
) -> Comparison:
    """Compares the distributions of two scores, and, where both hold the same samples, the samples
    one by one.

    Samples are the same if their ids are, where integers equal the strings that they are written
    as. They are paired if more than half of the ids of either side are in the other one, too:
    otherwise positions in two different data sets would pair by chance. Values may be infinite.

    Args:
        a, b: scores, or paths for :func:`fastfi.open_scores`.
        column: of numbers, in both; None means the first column of FI of each.

    Raises:
        DataError: a path holds no scores, or no sample has a score. OptionError: no such column.
        MissingExtraError: pyarrow or scipy is not installed.
    """
    a, b = (s if isinstance(s, Scores) else open_scores(s) for s in (a, b))
    stats = require("scipy.stats", "comparing scores")
    columns = tuple(s.column(column) for s in (a, b))
    values = tuple(s.values(c) for s, c in zip((a, b), columns, strict=True))
    scored = tuple(v[~np.isnan(v)] for v in values)
    for scores, name, present in zip((a, b), columns, scored, strict=True):
        if not len(present):
            raise DataError(f"{scores.path}: no sample has a score in {name}")
    with warnings.catch_warnings():
        # scipy tells when it replaces the exact p-value by its limit for many samples
        warnings.simplefilter("ignore", RuntimeWarning)
        p_value = float(stats.ks_2samp(*scored).pvalue)
    ids = [s.to_table(["id"]).column(0) for s in (a, b)]
    rows = _match(ids[0], ids[1], (a.id_type, b.id_type))
    matched = 0 if rows.of_a is None else len(rows.of_a)
    paired = rows.why is None
    return Comparison(
        columns=(columns[0], columns[1]),
        rows=(len(a), len(b)),
        values=(scored[0], scored[1]),
        percentiles=(percentiles(scored[0]), percentiles(scored[1])),
        ks=ks_distance(*scored),
        p_value=p_value,
        matched=matched,
        only=(len(a) - matched, len(b) - matched),
        pairs=_pairs(a, b, ids[0], rows, values) if paired else None,
        unpaired=rows.why,
        same_data=_same_data(a, b),
    )
