"""Finds out how a model uses its parameters, on five samples, and proves the rules on them.

Two traces with two and three samples show where the samples lie in every tensor. The squared
length of every parameter's gradient, by the rules, is then compared with autograd's own; where they
differ, or an operation has no rule, the innermost module that contains the parameter is tapped as a
whole, then the one around it. What no tap explains is an error: nothing is left out silently.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfi.cudnn import row_eps
from fastfi.errors import OptionError
from fastfi.layers.batching import Batching, batched_dimension
from fastfi.layers.calls import Call
from fastfi.layers.cotangents import Cotangents
from fastfi.layers.parameters import Parameters
from fastfi.layers.products import root_grams
from fastfi.layers.rules import AFFINE
from fastfi.layers.tape import Choices
from fastfi.layers.trace import PLANNED_ON, Plan, Trace, account, signature, trace
from fastfi.layers.uses import Scaled, Tapped
from fastfi.memory import ActivationMeter

__all__ = ["plan_for"]

_FEW, _MANY = 2, PLANNED_ON


def _places(d: Tensor, dim: int) -> set[int]:
    """The indices along a dimension at which a tensor is not zero."""
    there = (d != 0).movedim(dim, 0).reshape(d.shape[dim], -1).any(1)
    return set(there.nonzero().flatten().tolist())


def _minor(d: Sequence[Tensor], dim: int) -> tuple[bool | None, bool]:
    """Whether the samples run fastest along a dimension, and not slowest, None if neither fits; and
    whether that is certain.

    Args:
        d: cotangents of the second and of the third of three samples alone.
    """
    each = d[0].shape[dim] // _MANY
    places = [_places(t, dim) for t in d]
    major = [{divmod(i, each) for i in p} for p in places]
    minor = [{divmod(i, _MANY)[::-1] for i in p} for p in places]
    # As (sample, position): the reading must name the right samples, and if both do (few places are
    # not zero), the samples should have the same positions.
    fits = [all(s == i + 1 for i, at in enumerate(r) for s, _ in at) for r in (major, minor)]
    if fits[0] and fits[1] and each > 1:
        shared = [len({p for _, p in a} & {p for _, p in b}) for a, b in (major, minor)]
        return shared[1] > shared[0], shared[0] != shared[1]
    return (None if not any(fits) else not fits[0]), True


def _batchings(
    few: Tapped, many: Tapped, grads: Sequence[Sequence[Tensor | None]]
) -> tuple[list[Batching | None] | None, bool]:
    """Where the samples lie in each of a use's tensors, None if that cannot be told for an output
    that the logits depend on; and whether it is certain.

    Args:
        grads: by edge, cotangents of the second and of the third of three samples' logits.
    """
    found: list[Batching | None] = []
    minor, certain = False, True
    edges = many.edges
    for i, (s, t) in enumerate(zip(few.shapes(), many.shapes(), strict=True)):
        dim = batched_dimension(s, t, (_FEW, _MANY))
        d = [g[edges[i]] for g in grads] if i < len(edges) else [None]
        reached = [t for t in d if t is not None]
        if reached and dim is None:
            return None, True
        if reached and dim is not None:
            order, clear = _minor(reached, dim)
            if order is None:
                return None, True
            minor, certain = order, certain and clear
        found.append(None if dim is None else Batching(dim, minor))
    if isinstance(many, Scaled) and found[0] is not None and many.aligned[found[0].dim] != 1:
        return None, True
    return found, certain


def _squares(
    t: Trace, batchings: Sequence[Sequence[Batching | None]], grads: Sequence[Tensor | None]
) -> dict[int, list[float]]:
    """The squared lengths of each parameter's gradients by the rules, for the three samples."""
    for use, b in zip(t.tape.uses, batchings, strict=True):
        use.assign(b)
    uses = [u for u in t.tape.uses if any(grads[e] is not None for e in u.edges)]
    gathered = Cotangents(uses, _MANY, 1)
    gathered.take(0, grads)
    return {root: n[:, 0, 0].tolist() for root, n in root_grams(gathered)}


class _Search:
    """The plan as it grows."""

    def __init__(self, parameters: Parameters, x: Tensor, outputs: str) -> None:
        self.parameters, self.outputs = parameters, outputs
        at = torch.arange(_FEW + _MANY, device=x.device) % len(x)
        with torch.inference_mode(False):
            samples = x.clone() if x.is_inference() else x
            self.few, self.many = samples[at[:_FEW]], samples[at[_FEW:]]
        self.level: dict[int, int] = {}  # how far out a parameter's tapped module is
        self.constant: frozenset[Any] = frozenset()
        self.loops: frozenset[str] = frozenset()

    def _plan(self, copied: frozenset[int] = frozenset()) -> Plan:
        calls: dict[str, list[int]] = {}
        for root, level in sorted(self.level.items()):
            calls.setdefault(self.parameters.around(root)[level], []).append(root)
        choices = Choices(frozenset(self.level), self.constant, copied)
        return Plan(choices, {n: tuple(r) for n, r in calls.items()}, self.loops)

    def _escalate(self, roots: set[int], why: str) -> None:
        """Taps the next module around each of these parameters."""
        for root in roots:
            self.level[root] = self.level.get(root, -1) + 1
        lost = [r for r in roots if self.level[r] >= len(self.parameters.around(r))]
        if lost:
            names = ", ".join(self.parameters.names[r] for r in sorted(lost)[:5])
            raise OptionError(
                "wrt: expected parameters whose per-sample gradients follow from the operations "
                f"that use them or from one of their modules' calls, got {names} ({why})"
            )

    def run(self) -> Plan:
        """Raises OptionError naming the parameters that nothing covers."""
        while True:
            plan = self._attempt()
            if plan is not None:
                return plan

    def _attempt(self) -> Plan | None:
        """One round: the plan, or None after a change."""
        plan = self._plan()
        meter = ActivationMeter()
        few = trace(self.parameters, self.few, self.outputs, plan, meter=meter)
        many = trace(self.parameters, self.many, self.outputs, plan)
        overwritten = frozenset(
            i for i, u in enumerate(many.tape.uses) if any(k.overwritten for k in u.kept())
        )
        if overwritten:
            plan = self._plan(overwritten)
            many = trace(self.parameters, self.many, self.outputs, plan)
        if few.tape.unruled or many.tape.unruled:
            unruled = {**few.tape.unruled, **many.tape.unruled}
            self._escalate(set(unruled), f"in {', '.join(sorted(set(unruled.values())))}")
            return None
        missed = account(few, self.parameters, plan)[0] | account(many, self.parameters, plan)[0]
        if missed:
            self._escalate(set(missed), "used where no operation on them was seen")
            return None
        uses = many.tape.uses
        if [*map(signature, uses)] != [*map(signature, few.tape.uses)]:
            raise OptionError(
                "model: expected the same operations on the parameters whatever the batch is, got "
                "others for two samples than for three"
            )
        edges, own = self._gradients(many, 1)
        others, _ = self._gradients(many, 2)
        batchings, unclear = [], False
        for one, other in zip(few.tape.uses, uses, strict=True):
            found, certain = _batchings(one, other, (edges, others))
            unclear = unclear or not certain
            if found is None:
                self._without_samples(other)
                return None
            batchings.append(found)
        try:
            squares = _squares(many, batchings, edges)
        except Exception as error:
            taps = [u for u in uses if isinstance(u, Call)]
            if not taps:
                raise
            # vmap cannot run one of these modules, or one cannot run sample by sample.
            if all(u.what in self.loops for u in taps):
                roots = {r for u in taps for r in u.roots}
                inner = {r for r in roots if self.level[r] + 1 < len(self.parameters.around(r))}
                self._escalate(inner or roots, f"{type(error).__name__}: {error}")
            self.loops = self.loops | {u.what for u in taps}
            return None
        wrong = self._wrong(squares, own)
        if wrong:
            self._escalate(wrong, "their gradients differ from autograd's")
            return None
        held = 0
        for use in uses:
            there = [d for e in use.edges if (d := edges[e]) is not None]
            if isinstance(use, Scaled):
                # Its gradient, at most in float64, and another arrangement of it.
                held += 2 * 8 * _MANY * use.source.size * len(there)
            else:
                held += sum(d.nbytes for d in there)
        return Plan(
            plan.choices,
            plan.calls,
            plan.loops,
            uses=tuple(map(signature, uses)),
            batchings=tuple(batchings),
            shapes=tuple(u.shapes() for u in uses),
            classes=many.recorded.z.shape[1],
            saved=meter.total // _FEW,
            largest=meter.largest // _FEW,
            held=held // _MANY,
            path=many.tape.path,
            unclear=unclear,
        )

    def _gradients(self, t: Trace, sample: int) -> tuple[list[Tensor | None], list[float | None]]:
        """Cotangents of every edge, and the squared lengths of every parameter's gradient, for a
        random function of one sample's logits."""
        z = t.recorded.z
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(z.shape[1], generator=generator, dtype=torch.float64)
        cotangent = torch.zeros_like(z)
        cotangent[sample] = weights.to(z)
        inputs: list[Any] = [*t.tape.edges, *(self.parameters.tensors if sample == 1 else ())]
        if not inputs:
            return [], []
        with torch.autocast(z.device.type, enabled=False):
            grads = torch.autograd.grad(z, inputs, cotangent, retain_graph=True, allow_unused=True)
        count = len(t.tape.edges)
        own: list[float | None] = [None if g is None else _square(g) for g in grads[count:]]
        return list(grads[:count]), own

    def _without_samples(self, use: Tapped) -> None:
        """An output in which no dimension grows with the batch, or not sample by sample."""
        key = (use.what, frozenset(use.roots), tuple(use.shapes()[0]))
        if isinstance(use, Scaled) and key not in self.constant and use.what != AFFINE:
            self.constant = self.constant | {key}
        else:
            why = (
                f"where {use.what or 'the model'} keeps the samples is not clear, or it mixes them"
            )
            self._escalate(set(use.roots), why)

    def _wrong(self, squares: Mapping[int, list[float]], own: Sequence[float | None]) -> set[int]:
        """Parameters whose gradient has another length than autograd's: a rule is wrong."""
        dtype = self.parameters.dtype
        if torch.is_autocast_enabled(self.many.device.type):
            dtype = torch.get_autocast_dtype(self.many.device.type)
        eps = row_eps(self.parameters.model, dtype, self.many.device)
        total = sum(g for g in own if g is not None and math.isfinite(g))
        wrong = set()
        for root, g in enumerate(own):
            first, found, third = squares.get(root, [0.0] * _MANY)
            expected = g or 0.0
            if not all(map(math.isfinite, (expected, first, found, third))):
                continue  # the chunks' own check names the samples
            # What a use that was left out would change is found by the graph, not by this: float32
            # may differ by 5 %. Gradients that cancel (keys' biases in attention) are noise.
            noise = (100 * eps) ** 2 * total
            difference = abs(expected - found) + first + third
            if not difference <= min(0.5, max(1e-6, 4e5 * eps)) * max(expected, found) + noise:
                wrong.add(root)
        return wrong


def _square(g: Tensor) -> float:
    g = g.coalesce().values() if g.is_sparse else g
    return float(g.double().square().sum())


_plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


def plan_for(parameters: Parameters, x: Tensor, outputs: str, fresh: bool = False) -> Plan:
    """The plan for inputs like x; found once for a model and kind of input.

    Args:
        fresh: search again.

    Raises:
        OptionError: a parameter that no rule and no fallback covers.
    """
    device = x.device.type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    key = (parameters.key(), x.shape[1:], x.dtype, x.device, autocast, outputs)
    try:
        known = _plans.setdefault(parameters.module, {})
    except TypeError:  # a module that cannot be hashed is planned for each call
        known = {}
    if fresh or key not in known:
        known[key] = _Search(parameters, x, outputs).run()
    return known[key]
