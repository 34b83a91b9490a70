"""One rule for each operation that reads parameters: what to keep for their gradients.

A rule runs the operation, and returns its output, or NotImplemented where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastfi.convolution import geometry
from fastfi.layers.source import Source
from fastfi.layers.tape import Tape
from fastfi.layers.uses import Convolution, Kept, Lookup, Outer, Scaled

__all__ = ["AFFINE", "RULES"]

AFFINE = "affine bias"  # of y = W x + b

Rule = Callable[[Tape, Any, Sequence[Any], Mapping[str, Any]], Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def _bind(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, as torch's own signature has them; None where not given."""
    known = names.split()
    return {**dict.fromkeys(known), **dict(zip(known, args, strict=False)), **kwargs}


def _usable(tape: Tape, x: Any, *weights: Any) -> bool:
    """Whether x is an activation, and the weights are parameters that can be followed, or none."""
    if not isinstance(x, Tensor) or tape.what(x) is not None:
        return False
    # A tensor that the tape does not know as a parameter, and is not constant, is an activation.
    return all(w is None or tape.source(w) is not None or not tape.roots([w]) for w in weights)


def _add_bias(
    tape: Tape, source: Source | None, edge: int, out: Tensor, dim: int, what: str = "bias"
) -> None:
    """The use of a bias along dimension ``dim`` of the output."""
    if source is not None:
        aligned = [1] * out.dim()
        aligned[dim] = source.size
        tape.uses.append(Scaled(what, source, edge, tuple(out.shape), tuple(aligned), None))


@_rule("linear")
def _linear(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = _bind("input weight bias", args, kwargs)
    x, w, b = q["input"], q["weight"], q["bias"]
    if not _usable(tape, x, w, b) or w.dim() != 2:
        return NotImplemented
    source, bias = tape.source(w), tape.source(b)
    if source is not None and not source.injective:
        return NotImplemented
    kept = None if source is None else tape.keep(x)
    out, edge = tape.edge(func(*args, **kwargs))
    if edge is None:
        return out
    if source is not None:
        assert kept is not None
        kept = _cast(kept, out)
        tape.uses.append(Outer("linear", source, edge, tuple(out.shape), kept))
    _add_bias(tape, bias, edge, out, out.dim() - 1, AFFINE)
    return out


def _cast(kept: Kept, out: Tensor) -> Kept:
    """Autocast: the operation read the activation in its output's precision."""
    t = kept.tensor
    return Kept(t.to(out.dtype), False) if t.dtype != out.dtype else kept


@_rule("matmul", "__matmul__", "mm")
def _matmul(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 2 or kwargs or not _usable(tape, *args):
        return NotImplemented
    x, w = args
    source = tape.source(w)
    if source is None or len(source.shape) != 2 or x.dim() < 2 or not source.injective:
        return NotImplemented
    kept = tape.keep(x)
    out, edge = tape.edge(func(x, w))
    if edge is not None:
        kept = _cast(kept, out)
        use = Outer("matmul", source.transposed(), edge, tuple(out.shape), kept)
        tape.uses.append(use)
    return out


@_rule("addmm")
def _addmm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 3 or kwargs:
        return NotImplemented
    b, x, w = args
    source, bias = tape.source(w), tape.source(b)
    if not _usable(tape, x, w, b) or (source is not None and not source.injective):
        return NotImplemented
    if b.dim() != 1:
        return NotImplemented
    kept = None if source is None else tape.keep(x)
    out, edge = tape.edge(func(*args))
    if edge is None:
        return out
    if source is not None:
        assert kept is not None
        kept = _cast(kept, out)
        tape.uses.append(Outer("addmm", source.transposed(), edge, tuple(out.shape), kept))
    _add_bias(tape, bias, edge, out, 1, AFFINE)
    return out


_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = "input weight bias stride padding output_padding groups dilation"


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    transposed = "transpose" in func.__name__
    q = _bind(_CONV_TRANSPOSE if transposed else _CONV, args, kwargs)
    x, w, b = q["input"], q["weight"], q["bias"]
    if not _usable(tape, x, w, b) or x.dim() != w.dim():  # or a single image, without a batch
        return NotImplemented
    source, bias = tape.source(w), tape.source(b)
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    q.update({name: value for name, value in defaults.items() if q[name] is None})
    shape = w.shape[2:]
    padded, form = geometry(x, shape, q["stride"], q["padding"], q["dilation"], q["groups"])
    if source is not None and not source.injective:
        return NotImplemented
    extra = q.get("output_padding") or 0
    extra = (extra,) if isinstance(extra, int) else tuple(extra)
    if any(e >= s for e in extra for s in form.stride):
        return NotImplemented  # an output longer than the patches reach
    kept = None if source is None else tape.keep(padded)
    out, edge = tape.edge(func(*args, **kwargs))
    if edge is None:
        return out
    if source is not None:
        assert kept is not None
        kept = _cast(kept, out)
        name = func.__name__
        use = Convolution(name, source, edge, tuple(out.shape), kept, form, transposed)
        tape.uses.append(use)
    _add_bias(tape, bias, edge, out, 1)
    return out


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
    if not _usable(tape, x, weight, bias):
        return NotImplemented
    w, b = tape.source(weight), tape.source(bias)
    kept = None if w is None else tape.keep(x)
    out, edge = tape.edge(run())
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


@_rule("batch_norm")
def _batch_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input running_mean running_var weight bias training momentum eps"
    q = _bind(names, args, kwargs)
    if q["training"]:
        return NotImplemented  # mixes the samples
    x, mean, var = q["input"], q["running_mean"], q["running_var"]
    eps = 1e-5 if q["eps"] is None else q["eps"]

    def normalised(x: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, var, None, None, False, 0.0, eps)

    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q["bias"], _per_channel(x),
                 normalised, "batch_norm")  # fmt: skip


@_rule("instance_norm")
def _instance_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    q = _bind(names, args, kwargs)
    x, mean, var = q["input"], q["running_mean"], q["running_var"]
    own = True if q["use_input_stats"] is None else q["use_input_stats"]
    eps = 1e-5 if q["eps"] is None else q["eps"]

    def normalised(x: Tensor) -> Tensor:
        return functional.instance_norm(x, mean, var, None, None, own, 0.0, eps)

    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q["bias"], _per_channel(x),
                 normalised, "instance_norm")  # fmt: skip


@_rule("group_norm")
def _group_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = _bind("input num_groups weight bias eps", args, kwargs)
    x, eps = q["input"], 1e-5 if q["eps"] is None else q["eps"]

    def normalised(x: Tensor) -> Tensor:
        return functional.group_norm(x, q["num_groups"], None, None, eps)

    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q["bias"], _per_channel(x),
                 normalised, "group_norm")  # fmt: skip


@_rule("layer_norm", "rms_norm")
def _layer_norm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    rms = func.__name__ == "rms_norm"
    names = "input normalized_shape weight eps" if rms else "input normalized_shape weight bias eps"
    q = _bind(names, args, kwargs)
    x, shape = q["input"], tuple(q["normalized_shape"])

    def normalised(x: Tensor) -> Tensor:
        if rms:
            return functional.rms_norm(x, shape, None, q["eps"])
        return functional.layer_norm(x, shape, None, None, 1e-5 if q["eps"] is None else q["eps"])

    aligned = [1] * (x.dim() - len(shape)) + list(shape)
    return _norm(tape, lambda: func(*args, **kwargs), x, q["weight"], q.get("bias"), aligned,
                 normalised, func.__name__)  # fmt: skip


@_rule("prelu")
def _prelu(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = _bind("input weight", args, kwargs)
    x, w = q["input"], q["weight"]
    aligned = [1] * x.dim() if w.numel() == 1 else _per_channel(x)
    return _norm(tape, lambda: func(*args, **kwargs), x, w, None, aligned,
                 lambda x: x.clamp(max=0), "prelu")  # fmt: skip


@_rule("embedding")
def _embedding(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = _bind("input weight padding_idx", args, kwargs)
    index, w, padding = q["input"], q["weight"], q["padding_idx"]
    source = tape.source(w)
    if not _usable(tape, index, w) or source is None or not source.injective:
        return NotImplemented
    kept = tape.keep(index)
    out, edge = tape.edge(func(*args, **kwargs))
    if edge is not None:
        weight = None
        if padding is not None:
            weight = (index != padding % w.shape[0]).double()
        tape.uses.append(Lookup("embedding", source, edge, tuple(out.shape), kept, weight, None))
    return out


@_rule("embedding_bag")
def _embedding_bag(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse "
    names += "per_sample_weights include_last_offset padding_idx"
    q = _bind(names, args, kwargs)
    index, w, mode, weight = q["input"], q["weight"], q["mode"] or "mean", q["per_sample_weights"]
    source = tape.source(w)
    ok = _usable(tape, index, w, weight) and source is not None and source.injective
    if not ok or mode == "max" or tape.source(weight) is not None:
        return NotImplemented
    assert source is not None
    kept = tape.keep(index)
    out, edge = tape.edge(func(*args, **kwargs))
    if edge is None:
        return out
    with torch.no_grad():
        if index.dim() == 2:
            bag = torch.arange(len(index), device=index.device)
            bag = bag.repeat_interleave(index.shape[1])
        else:
            offsets = q["offsets"][: out.shape[0]]
            at = torch.arange(len(index), device=index.device)
            bag = torch.searchsorted(offsets, at, right=True) - 1
        given = torch.ones(index.numel(), dtype=torch.float64, device=index.device)
        if weight is not None:
            given = weight.detach().double().flatten()
        if q["padding_idx"] is not None:
            given = given * (index.flatten() != q["padding_idx"] % w.shape[0])
        if mode == "mean":
            count = torch.zeros(out.shape[0], dtype=torch.float64, device=index.device)
            given = given / count.index_add_(0, bag, given).clamp(min=1)[bag]
    tape.uses.append(Lookup("embedding_bag", source, edge, tuple(out.shape), kept, given, bag))
    return out


_ARITHMETIC = "add sub mul div true_divide multiply subtract divide pow maximum minimum where lerp"
_BROADCAST = [name + end for name in _ARITHMETIC.split() for end in ("", "_")]
_BROADCAST += ["rsub", "addcmul", "__add__", "__sub__", "__mul__", "__truediv__", "__pow__"]
_BROADCAST += [f"__{r}{op}__" for r in "ri" for op in ("add", "sub", "mul", "truediv", "div")]


@_rule(*_BROADCAST)
def _broadcast(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An element by element operation: the parameter is spread out to the output's shape first, so
    that its cotangent is there for each sample."""
    values = [*args, *kwargs.values()]
    given = [t for t in values if isinstance(t, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    constant = all(tape.what(t) is not None for t in given)
    if constant or tape.key(func, values, shape) in tape.choices.constant:
        return NotImplemented

    def spread(t: Any) -> Any:
        roots = tape.roots([t])
        if not roots:
            return t
        full, edge = tape.edge(t.expand(shape) if t.shape != shape else t.view(shape))
        if edge is not None:
            aligned = (1,) * (len(shape) - t.dim()) + tuple(t.shape)
            tape.add_scaled(func.__name__, t, edge, shape, aligned)
        return full

    return func(*map(spread, args), **{name: spread(t) for name, t in kwargs.items()})


@_rule("expand", "expand_as", "repeat", "broadcast_to", "tile")
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
