"""Forward passes on a tape: the uses of every parameter, where the plan says they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastfi.cudnn import differentiable_rnns
from fastfi.layers.batching import Batching
from fastfi.layers.calls import Call, tapped_modules
from fastfi.layers.graph import reached
from fastfi.layers.parameters import Parameters
from fastfi.layers.rules import AFFINE, RULES
from fastfi.layers.tape import Choices, Tape
from fastfi.layers.uses import Scaled, Tapped
from fastfi.memory import ActivationMeter
from fastfi.model import logits_of
from fastfi.rows import Recorded, record

__all__ = ["PLANNED_ON", "Plan", "Stale", "Trace", "account", "assign", "head_of", "signature"]
__all__ += ["trace"]

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
        classes: K.
        saved, largest: bytes that autograd saves for a sample, in all and in its largest storage.
        held: bytes of the cotangents and gradients that one row of one sample keeps.
        path: see :class:`Tape`.
        unclear: whether where the samples lie could not be told for certain.
    """

    choices: Choices = field(default_factory=Choices)
    calls: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    loops: frozenset[str] = frozenset()
    uses: tuple[Any, ...] = ()
    batchings: tuple[Sequence[Batching | None], ...] = ()
    shapes: tuple[Sequence[tuple[int, ...]], ...] = ()
    classes: int = 0
    saved: int = 0
    largest: int = 0
    held: int = 0
    path: int = 0
    unclear: bool = False


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

    calls = [
        (parameters.submodule(name), name, parameters.within(name, roots))
        for name, roots in plan.calls.items()
    ]
    rnns = differentiable_rnns(parameters.model, x.device)
    with rnns, tapped_modules(tape, calls, plan.loops), tape:
        recorded = record(model, x, outputs, meter, to_input=to_input)
    return Trace(recorded, tape, raw[-1])


def signature(use: Tapped) -> tuple[str, tuple[int, ...]]:
    return use.what, use.roots


def assign(t: Trace, plan: Plan, strict: bool) -> None:
    """Gives each use the batchings of the plan.

    Args:
        strict: whether the model must take the plan's path, and tensors must have its shapes, but
            for the number of samples.

    Raises:
        Stale: the uses are others.
    """
    batch = t.recorded.z.shape[0]
    uses = t.tape.uses
    if tuple(map(signature, uses)) != plan.uses or t.tape.unruled:
        raise Stale
    if strict and t.tape.path != plan.path:
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


def account(t: Trace, parameters: Parameters, plan: Plan) -> tuple[frozenset[int], frozenset[int]]:
    """Whether the uses explain every way from the logits to a parameter, by the graph alone.

    Returns:
        Numbers of parameters with a way that no use explains; of those that the logits reach.
    """
    end, watched = t.recorded.z.grad_fn, parameters.watched()
    calls: dict[str, list[Call]] = {}
    for use in t.tape.uses:
        if isinstance(use, Call):
            calls.setdefault(use.what, []).append(use)
    inside = {e for group in calls.values() for use in group for e in use.edges}
    nodes = [edge.node for edge in t.tape.edges]
    ruled = {n: b for i, (n, b) in enumerate(zip(nodes, t.tape.before, strict=True))
             if i not in inside}  # fmt: skip
    by_use: dict[Any, set[int]] = {}
    for use in t.tape.uses:
        for e in use.edges:
            by_use.setdefault(nodes[e], set()).update(use.roots)
    found, taken = reached(end, ruled, watched)
    covered = plan.choices.in_calls
    missed = found - covered
    there = found | {root for n in taken for root in by_use.get(n, ())}
    for name, roots in plan.calls.items():
        # The module's parameters, when its calls are passed by.
        around = {nodes[e]: use.before for use in calls.get(name, []) for e in use.edges}
        missed |= reached(end, around, watched)[0] & set(roots)
    return frozenset(missed), frozenset(there)


def head_of(t: Trace, outputs: str) -> int | None:
    """The parameter b of which the logits are W x + b: they are the very output of an affine map,
    and nothing else uses b. Then dz/db = I, whatever comes before. None if there is none."""
    if outputs != "logits" or not t.raw.requires_grad:
        return None
    end = get_gradient_edge(t.raw)
    used = [use.roots for use in t.tape.uses]
    for use in t.tape.uses:
        if not isinstance(use, Scaled) or use.what != AFFINE or len(use.out) != 2:
            continue
        edge, source = t.tape.edges[use.edge], use.source
        ends_here = edge.node is end.node and edge.output_nr == end.output_nr
        whole = source.in_order and source.numel == use.out[1]
        alone = sum(source.root in roots for roots in used) == 1
        if ends_here and whole and alone and use.out[0] == len(t.recorded.z):
            return source.root
    return None
