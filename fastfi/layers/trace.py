"""Forward passes on a tape: the uses of every parameter, where the plan says they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastfi.layers.batching import Batching
from fastfi.layers.calls import tapped_modules
from fastfi.layers.parameters import Parameters
from fastfi.layers.rules import RULES
from fastfi.layers.tape import Choices, Tape
from fastfi.layers.uses import Tapped
from fastfi.memory import ActivationMeter
from fastfi.model import logits_of
from fastfi.rows import Recorded, record

__all__ = ["PLANNED_ON", "Plan", "Stale", "Trace", "assign", "signature", "trace"]

PLANNED_ON = 3  # samples


class Stale(Exception):
    """The model did not do what its plan says: other operations than in the samples before."""


@dataclass(frozen=True)
class Plan:
    """How a model uses its parameters.

    Attributes:
        choices: for the tapes.
        calls: modules tapped as a whole: their parameters' numbers, by the module's name.
        loops: those of them that vmap cannot run.
        uses: of each use in turn: operation, parameters.
        batchings: of each use's tensors.
        shapes: of these tensors, for three samples.
        unreached: parameters that do not reach the logits.
        head: the parameter that is proved to be the logits' own bias, or None.
        classes: K.
        saved, largest: bytes that autograd saves for a sample, in all and in its largest storage.
        held: bytes of the cotangents that one row of one sample keeps.
    """

    choices: Choices = field(default_factory=Choices)
    calls: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    loops: frozenset[str] = frozenset()
    uses: tuple[Any, ...] = ()
    batchings: tuple[Sequence[Batching | None], ...] = ()
    shapes: tuple[Sequence[tuple[int, ...]], ...] = ()
    unreached: frozenset[int] = frozenset()
    head: int | None = None
    classes: int = 0
    saved: int = 0
    largest: int = 0
    held: int = 0


@dataclass
class Trace:
    """A forward pass on a tape.

    Attributes:
        recorded: the logits' graph.
        tape: what was noted.
        raw: the model's own output tensor.
    """

    recorded: Recorded
    tape: Tape
    raw: Tensor


def trace(
    parameters: Parameters,
    x: Tensor,
    outputs: str,
    plan: Plan,
    *,
    to_input: bool = False,
    meter: ActivationMeter | None = None,
) -> Trace:
    """One forward pass of x with the taps that the plan asks for.

    Args:
        to_input: whether x needs cotangents too.
        meter: counts what autograd saves.
    """
    tape = Tape(parameters.tensors, parameters.constants(), plan.choices, RULES)
    raw: list[Tensor] = []

    def model(x: Tensor) -> Any:
        out = parameters.model(x)
        raw.append(logits_of(out))
        return out

    calls = {}
    for name, roots in plan.calls.items():
        calls[parameters.module.get_submodule(name)] = (name, parameters.within(name, roots))
    with tapped_modules(tape, calls, plan.loops), tape:
        recorded = record(model, x, outputs, meter, to_input=to_input)
    return Trace(recorded, tape, raw[-1])


def signature(use: Tapped) -> tuple[str, tuple[int, ...]]:
    return use.what, use.roots


def assign(t: Trace, plan: Plan, strict: bool) -> None:
    """Gives each use the batchings of the plan.

    Args:
        strict: whether tensors must have the plan's shapes, but for the number of samples.

    Raises:
        Stale: the uses are others.
    """
    batch = t.recorded.z.shape[0]
    uses = t.tape.uses
    if tuple(map(signature, uses)) != plan.uses or t.tape.unruled:
        raise Stale
    for use, batchings, shapes in zip(uses, plan.batchings, plan.shapes, strict=True):
        for shape, b, expected in zip(use.shapes(), batchings, shapes, strict=True):
            if len(shape) != len(expected) or (b is not None and shape[b.dim] % batch):
                raise Stale
            scaled = [
                n * batch if b is not None and i == b.dim else n * PLANNED_ON
                for i, n in enumerate(expected)
            ]
            if strict and scaled != [n * PLANNED_ON for n in shape]:
                raise Stale
        use.assign(batchings)
        if any(k.overwritten for k in use.kept()):
            raise Stale
