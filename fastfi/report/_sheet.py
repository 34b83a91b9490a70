"""What the page needs of a set of scores, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastfi.errors import DataError

if TYPE_CHECKING:
    from fastfi.scoring.result import Scores

__all__ = ["Measure", "Sheet", "common_measures", "measures", "read_sheet"]

_SECOND = "predicted_"  # before the names of the predicted class's columns


class Measure(NamedTuple):
    """One column of FI.

    Attributes:
        column: its name, "fi", "fi:conv1@margin", "predicted_fi".
        variant: the name without the block, which tells the label and the objective: "fi",
            "fi@margin", "predicted_fi".
        block: of parameters, "" where there is one FI for each sample.
    """

    column: str
    variant: str
    block: str

    @property
    def second(self) -> bool:
        """Whether it belongs to the predicted class of y="both"."""
        return self.column.startswith(_SECOND)

    @property
    def log_prob(self) -> str:
        """The column of the log-probability."""
        return f"{_SECOND if self.second else ''}log_prob"

    @property
    def rank(self) -> str:
        """The column of the rank."""
        end = f":{self.block}" if self.block else ""
        return f"{_SECOND if self.second else ''}rank{end}"


@dataclass(frozen=True)
class Sheet:
    """The rows of a set of scores, n of them, in the data's order.

    Attributes:
        name: "train", "test", or what the user calls it.
        scores: where they come from.
        ids: n integers or strings.
        label, predicted: [n] int64, -1 where there is none.
        columns: name -> [n] float64, NaN where there is no value: of FI, log_prob and rank.
        errors: (row, text) of the rows that have no score.
    """

    name: str
    scores: Scores
    ids: Sequence[int] | Sequence[str]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    errors: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> bool:
        """Whether any sample has a label."""
        return bool((self.label >= 0).any())

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """[n]: the prediction differs from the label."""
        return (self.label >= 0) & (self.predicted >= 0) & (self.label != self.predicted)


def measures(scores: Scores) -> list[Measure]:
    """The columns of FI, those of the predicted class of y="both" last."""
    names = [*scores.fi_columns]
    names += [second for name in names if (second := _SECOND + name) in scores.columns]
    return [_measure(name, scores.blocks) for name in names]


def _measure(column: str, blocks: Sequence[str]) -> Measure:
    head, colon, rest = column.partition("fi:")
    if not colon or head not in ("", _SECOND):
        return Measure(column, column, "")
    # An "@" may belong to the block's name, so the names that are known decide, longest first.
    for block in sorted(blocks, key=len, reverse=True):
        if rest == block or rest.startswith(f"{block}@"):
            return Measure(column, f"{head}fi{rest[len(block) :]}", block)
    return Measure(column, f"{head}fi", rest)


def common_measures(all_scores: Sequence[Scores]) -> list[Measure]:
    """The columns of FI that all sets of scores have, in the order of the first.

    Raises:
        DataError: there is none, or there are no samples.
    """
    for scores in all_scores:
        if scores.complete and not len(scores):
            raise DataError(
                f"{scores.path}: holds no samples, as the data had none: expected at least one for "
                "a report"
            )
        if not scores.fi_columns or not len(scores):
            raise DataError(f"{scores.path}: expected scores, got none")
    first, *others = all_scores
    found = measures(first)
    for other in others:
        known = {m.column for m in measures(other)}
        found = [m for m in found if m.column in known]
        if not found:
            raise DataError(
                f"expected scores with a column of FI in common, got {', '.join(first.fi_columns)} "
                f"in {first.path} and {', '.join(other.fi_columns)} in {other.path}"
            )
    return found


def read_sheet(scores: Scores, name: str, wanted: Sequence[Measure]) -> Sheet:
    """Reads the columns that the page needs."""
    numbers = [m.column for m in wanted]
    numbers += dict.fromkeys(n for m in wanted for n in (m.log_prob, m.rank) if n in scores.columns)
    others = [n for n in ("id", "label", "predicted", "error") if n in scores.columns]
    table = scores.to_table([*others, *numbers])

    def classes(column: str) -> NDArray[np.int64]:
        if column not in others:
            return np.full(len(table), -1, np.int64)
        # -1 is the usual mark of a sample without a label, too
        return np.maximum(table[column].fill_null(-1).to_numpy(), -1).astype(np.int64)

    texts: list[Any] = table["error"].to_pylist() if "error" in others else [None] * len(table)
    columns = {n: _floats(table[n]) for n in numbers}
    for row, text in enumerate(texts):
        if text is not None:  # whatever stands beside it is no score
            for values in columns.values():
                values[row] = np.nan
    ids = ["(no id)" if value is None else value for value in table["id"].to_pylist()]
    # A row without a number and without an error (an interrupted job elsewhere) must not vanish.
    silent = np.logical_and.reduce([np.isnan(columns[m.column]) for m in wanted])  # [n]
    errors = [
        (row, "no score and no reason given" if text is None else text)
        for row, text in enumerate(texts)
        if text is not None or silent[row]
    ]
    return Sheet(name, scores, ids, classes("label"), classes("predicted"), columns, errors)


def _floats(column: Any) -> NDArray[np.float64]:
    return np.array(column.cast("float64").fill_null(float("nan")).to_numpy(), np.float64)  # a copy
