"""Linear maps and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastfi.convolution import geometry
from fastfi.layers.rules._table import AFFINE, add_bias, bind, cast, rule, usable
from fastfi.layers.tape import Tape
from fastfi.layers.uses import Convolution, Outer


@rule("linear")
def _linear(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = bind("input weight bias", args, kwargs)
    x, w, b = q["input"], q["weight"], q["bias"]
    if not usable(tape, x, w, b) or w.dim() != 2:
        return NotImplemented
    source, bias = tape.source(w), tape.source(b)
    if source is not None and not source.injective:
        return NotImplemented
    kept = None if source is None else tape.keep(x)
    out, edge = tape.edge(func(*args, **kwargs), x, w, b)
    if edge is None:
        return out
    if source is not None:
        assert kept is not None
        kept = cast(kept, out)
        tape.uses.append(Outer("linear", source, edge, tuple(out.shape), kept))
    add_bias(tape, bias, edge, out, out.dim() - 1, AFFINE)
    return out


@rule("matmul", "__matmul__", "mm")
def _matmul(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 2 or kwargs or not usable(tape, *args):
        return NotImplemented
    x, w = args
    source = tape.source(w)
    if source is None or len(source.shape) != 2 or x.dim() < 2 or not source.injective:
        return NotImplemented
    kept = tape.keep(x)
    out, edge = tape.edge(func(x, w), x)
    if edge is not None:
        kept = cast(kept, out)
        use = Outer("matmul", source.transposed(), edge, tuple(out.shape), kept)
        tape.uses.append(use)
    return out


@rule("addmm")
def _addmm(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 3 or kwargs:
        return NotImplemented
    b, x, w = args
    source, bias = tape.source(w), tape.source(b)
    if not usable(tape, x, w, b) or (source is not None and not source.injective):
        return NotImplemented
    if b.dim() != 1:
        return NotImplemented
    kept = None if source is None else tape.keep(x)
    out, edge = tape.edge(func(*args), x, w, b)
    if edge is None:
        return out
    if source is not None:
        assert kept is not None
        kept = cast(kept, out)
        tape.uses.append(Outer("addmm", source.transposed(), edge, tuple(out.shape), kept))
    add_bias(tape, bias, edge, out, 1, AFFINE)
    return out


_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = "input weight bias stride padding output_padding groups dilation"


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    transposed = "transpose" in func.__name__
    q = bind(_CONV_TRANSPOSE if transposed else _CONV, args, kwargs)
    x, w, b = q["input"], q["weight"], q["bias"]
    if not usable(tape, x, w, b) or x.dim() != w.dim():  # or a single image, without a batch
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
    out, edge = tape.edge(func(*args, **kwargs), x, w, b)
    if edge is None:
        return out
    if source is not None:
        assert kept is not None
        kept = cast(kept, out)
        name = func.__name__
        use = Convolution(name, source, edge, tuple(out.shape), kept, form, transposed)
        tape.uses.append(use)
    add_bias(tape, bias, edge, out, 1)
    return out
