"""What all rules share: their table, and reading an operation's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastfi.layers.source import Source
from fastfi.layers.tape import Tape
from fastfi.layers.uses import Kept, Scaled

__all__ = ["AFFINE", "RULES", "Rule", "add_bias", "bind", "cast", "rule", "usable"]

AFFINE = "affine bias"  # of y = W x + b

Rule = Callable[[Tape, Any, Sequence[Any], Mapping[str, Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the functions of these names."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def bind(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, as torch's own signature has them; None where not given."""
    known = names.split()
    return {**dict.fromkeys(known), **dict(zip(known, args, strict=False)), **kwargs}


def usable(tape: Tape, x: Any, *weights: Any) -> bool:
    """Whether x is an activation, and the weights are parameters that can be followed, or none."""
    if not isinstance(x, Tensor) or tape.what(x) is not None:
        return False
    # A tensor that the tape does not know as a parameter, and is not constant, is an activation.
    return all(w is None or tape.source(w) is not None or not tape.roots([w]) for w in weights)


def add_bias(
    tape: Tape, source: Source | None, edge: int, out: Tensor, dim: int, what: str = "bias"
) -> None:
    """The use of a bias along dimension ``dim`` of the output."""
    if source is not None:
        aligned = [1] * out.dim()
        aligned[dim] = source.size
        tape.uses.append(Scaled(what, source, edge, tuple(out.shape), tuple(aligned), None))


def cast(kept: Kept, out: Tensor) -> Kept:
    """Autocast: the operation read the activation in its output's precision."""
    t = kept.tensor
    return Kept(t.to(out.dtype), False) if t.dtype != out.dtype else kept
