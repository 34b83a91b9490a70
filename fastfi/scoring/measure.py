"""What is computed of every sample, and the columns that it fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from fastfi._checks import check_lump, check_wrt
from fastfi.errors import OptionError
from fastfi.evaluate import Target
from fastfi.inverse import Inverse, as_inverse
from fastfi.layers.parameters import Parameters, blocks
from fastfi.memory import check_budget
from fastfi.model import check_outputs
from fastfi.objectives import Objective, as_objective

__all__ = ["Labels", "Measure", "value_columns"]

Labels = Literal["label", "predicted", "both"]


@dataclass(frozen=True)
class Measure:
    """The options of :func:`fastfi.score` that decide the numbers. Arguments are those of
    :func:`fastfi.influence`, but for these:

    Args:
        y: whose influence: of the data's label (the paper's Setups 1 and 2), of the predicted class
            (Setups 3 and 4), or of both, in columns of their own.
        objective: one, or several with different names; a callable's name is its ``__name__``.

    Raises:
        OptionError: an option has a value that has no meaning.
    """

    wrt: str | tuple[str, ...] = "input"
    inverse: Inverse | str = "exact"
    y: Labels = "label"
    objective: str | Objective | tuple[str | Objective, ...] = "cross_entropy"
    outputs: str = "logits"
    lump: float | None = None
    assume_full_rank: bool = False
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_wrt(self.wrt)
        wrt = self.wrt if isinstance(self.wrt, str) else tuple(self.wrt)
        given = self.objective
        several = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        # frozen: the fields are replaced by their canonical forms once, here
        object.__setattr__(self, "wrt", wrt)
        object.__setattr__(self, "inverse", as_inverse(self.inverse))
        object.__setattr__(self, "objective", tuple(map(as_objective, several)))
        check_outputs(self.outputs)
        check_lump(self.lump)
        check_budget(self.memory_budget)
        if self.y not in get_args(Labels):
            raise OptionError(f"y: expected 'label', 'predicted' or 'both', got {self.y!r}")
        if not several:
            raise OptionError("objective: expected at least one, got none")
        names = self.objectives
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise OptionError(f"objective: expected different names, got {twice!r} twice")
        if not isinstance(wrt, str) and len(set(wrt)) < len(wrt):
            raise OptionError(f"wrt: expected different names, got {list(wrt)}")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives."""
        assert isinstance(self.objective, tuple)
        return tuple(f if isinstance(f, str) else _name(f) for f in self.objective)

    @property
    def own_objectives(self) -> dict[str, Objective]:
        """The objectives that are the user's functions."""
        assert isinstance(self.objective, tuple)
        named = zip(self.objectives, self.objective, strict=True)
        return {name: f for name, f in named if not isinstance(f, str)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The columns' beginnings: "" for the class that was asked for, and "predicted_" for the
        predicted one where both were."""
        return ("", "predicted_") if self.y == "both" else ("",)

    def targets(self, y: Tensor | None) -> list[Target]:
        """The pairs of objective and label, kind by kind; y [b] are the data's labels."""
        assert isinstance(self.objective, tuple)
        labels: dict[str, list[Tensor | None]] = {
            "label": [y], "predicted": [None], "both": [y, None]
        }  # fmt: skip
        return [Target(f, label) for label in labels[self.y] for f in self.objective]

    def shared(self) -> dict[str, Any]:
        """Keyword arguments of :func:`fastfi.evaluate.evaluate_targets`."""
        names = ("inverse", "outputs", "lump", "assume_full_rank", "memory_budget")
        wrt = self.wrt if isinstance(self.wrt, str) else list(self.wrt)
        return {"wrt": wrt, **{name: getattr(self, name) for name in names}}

    def blocks(self, model: Any) -> tuple[str, ...]:
        """Names of what gets a column of FI: one name, or those of several blocks.

        Raises:
            OptionError: the model has no such parameters, or none that is trainable.
        """
        if self.wrt == "input":
            return ("input",)
        return blocks(Parameters(model), self.wrt).names

    def config(self) -> dict[str, Any]:
        """What decides the numbers, for metadata; JSON types only."""
        return {
            "wrt": self.wrt if isinstance(self.wrt, str) else list(self.wrt),
            "inverse": repr(self.inverse),
            "y": self.y,
            "objective": list(self.objectives),
            "outputs": self.outputs,
            "lump": self.lump,
            "assume_full_rank": self.assume_full_rank,
        }


def _name(f: Objective) -> str:
    name = getattr(f, "__name__", None)
    return type(f).__name__ if name is None else name


def value_columns(measure: Measure, blocks: Sequence[str]) -> dict[str, Literal["float", "int"]]:
    """Names and kinds of the columns between ``predicted`` and ``error``."""
    single = isinstance(measure.wrt, str) and measure.wrt != "layers"
    ends = [""] if single else [f":{name}" for name in blocks]
    several = len(measure.objectives) > 1
    suffixes = [f"@{name}" for name in measure.objectives] if several else [""]
    columns: dict[str, Literal["float", "int"]] = {}
    for kind in measure.kinds:
        columns[f"{kind}log_prob"] = "float"
        columns.update({f"{kind}fi{end}{at}": "float" for at in suffixes for end in ends})
        columns.update({f"{kind}rank{end}": "int" for end in ends})
    return columns
