"""Bare parameters: added, multiplied, repeated for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfi.layers.rules._table import rule
from fastfi.layers.tape import Tape

_ARITHMETIC = "add sub mul div true_divide multiply subtract divide pow maximum minimum where lerp"
_BROADCAST = [name + end for name in _ARITHMETIC.split() for end in ("", "_")]
_BROADCAST += ["rsub", "addcmul", "__add__", "__sub__", "__mul__", "__truediv__", "__pow__"]
_BROADCAST += [f"__{r}{op}__" for r in "ri" for op in ("add", "sub", "mul", "truediv", "div")]


@rule(*_BROADCAST)
def _broadcast(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An element by element operation: the parameter is spread out to the output's shape first, so
    that its cotangent is there for each sample."""
    values = [*args, *kwargs.values()]
    given = [t for t in values if isinstance(t, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    constant = all(tape.what(t) is not None for t in given)
    if constant or tape.key(func, values, shape) in tape.choices.constant:
        return NotImplemented

    others = [t for t in given if t.dim() > 0]

    def spread(t: Any) -> Any:
        if not tape.roots([t]):
            return t
        full = t
        if t.dim() == 0 and others:  # which does not take part in type promotion
            full = t.to(torch.result_type(others[0], t))
        full, edge = tape.edge(full.expand(shape) if t.shape != shape else full.view(shape))
        if edge is not None:
            aligned = (1,) * (len(shape) - t.dim()) + tuple(t.shape)
            tape.add_scaled(func.__name__, t, edge, shape, aligned)
        return full

    out = func(*map(spread, args), **{name: spread(t) for name, t in kwargs.items()})
    if out is args[0]:
        tape.forget(out)
    return out


@rule("expand", "expand_as", "repeat", "broadcast_to", "tile")
def _expand(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Copies of a parameter, one for each sample: a class token, queries that are learned."""
    t = args[0]
    out = func(*args, **kwargs)
    aligned = (1,) * (out.dim() - t.dim()) + tuple(t.shape)
    repeated = all(a in (1, s) for a, s in zip(aligned, out.shape, strict=True))
    values = [*args, *kwargs.values()]
    constant = tape.key(func, values, out.shape) in tape.choices.constant
    if not tape.roots([t]) or not repeated or constant:
        tape.note(func, values, out)
        return out
    tapped, edge = tape.edge(out)
    if edge is not None:
        tape.add_scaled(func.__name__, t, edge, tuple(out.shape), aligned)
    return tapped
