"""Norm layers and PReLU: an entry that multiplies, one that is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from fastfi.layers.rules._table import bind, rule, usable
from fastfi.layers.tape import Tape
from fastfi.layers.uses import Scaled


def _norm(
    tape: Tape,
    run: Callable[[], Tensor],
    x: Tensor,
    weight: Any,
    bias: Any,
    aligned: Sequence[int],
    normalised: Callable[[Tensor], Tensor],
    what: str,
) -> Any:
    """``y = w * normalised(x) + b``, w and b broadcast as ``aligned``."""
    if not usable(tape, x, weight, bias):
        return NotImplemented
    w, b = tape.source(weight), tape.source(bias)
    kept = None if w is None else tape.keep(x)
    out, edge = tape.edge(run(), x, weight, bias)
    if edge is None:
        return out
    if w is not None:
        assert kept is not None
        held = kept
        use = Scaled(
            what, w, edge, tuple(out.shape), tuple(aligned), lambda: normalised(held.tensor), held
        )
        tape.uses.append(use)
    if b is not None:
        tape.uses.append(Scaled("bias", b, edge, tuple(out.shape), tuple(aligned), None))
    return out


def _per_channel(x: Tensor) -> list[int]:
    return [1, x.shape[1]] + [1] * (x.dim() - 2)


@rule("batch_norm")
def _batch_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input running_mean running_var weight bias training momentum eps"
    q = bind(names, args, kwargs)
    if q["training"]:
        return NotImplemented  # mixes the samples
    x, mean, var = q["input"], q["running_mean"], q["running_var"]
    eps = 1e-5 if q["eps"] is None else q["eps"]

    def normalised(x: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, var, None, None, False, 0.0, eps)

    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q["bias"], _per_channel(x),
                 normalised, "batch_norm")  # fmt: skip


@rule("instance_norm")
def _instance_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    q = bind(names, args, kwargs)
    x, mean, var = q["input"], q["running_mean"], q["running_var"]
    own = True if q["use_input_stats"] is None else q["use_input_stats"]
    eps = 1e-5 if q["eps"] is None else q["eps"]

    def normalised(x: Tensor) -> Tensor:
        return functional.instance_norm(x, mean, var, None, None, own, 0.0, eps)

    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q["bias"], _per_channel(x),
                 normalised, "instance_norm")  # fmt: skip


@rule("group_norm")
def _group_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = bind("input num_groups weight bias eps", args, kwargs)
    x, eps = q["input"], 1e-5 if q["eps"] is None else q["eps"]

    def normalised(x: Tensor) -> Tensor:
        return functional.group_norm(x, q["num_groups"], None, None, eps)

    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q["bias"], _per_channel(x),
                 normalised, "group_norm")  # fmt: skip


@rule("layer_norm", "rms_norm")
def _layer_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    rms = func.__name__ == "rms_norm"
    names = "input normalized_shape weight eps" if rms else "input normalized_shape weight bias eps"
    q = bind(names, args, kwargs)
    x, shape = q["input"], tuple(q["normalized_shape"])

    def normalised(x: Tensor) -> Tensor:
        if rms:
            return functional.rms_norm(x, shape, None, q["eps"])
        return functional.layer_norm(x, shape, None, None, 1e-5 if q["eps"] is None else q["eps"])

    aligned = [1] * (x.dim() - len(shape)) + list(shape)
    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q.get("bias"), aligned,
                 normalised, func.__name__)  # fmt: skip


@rule("prelu")
def _prelu(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = bind("input weight", args, kwargs)
    x, w = q["input"], q["weight"]
    aligned = [1] * x.dim() if w.numel() == 1 else _per_channel(x)
    return _norm(tape, lambda: func(*args, **kwargs), x, w, None, aligned,
                 lambda x: x.clamp(max=0), "prelu")  # fmt: skip
