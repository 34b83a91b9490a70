"""Embeddings, and bags of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastfi.layers.rules._table import bind, rule, usable
from fastfi.layers.tape import Tape
from fastfi.layers.uses import Lookup


@rule("embedding")
def _embedding(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    q = bind("input weight padding_idx", args, kwargs)
    index, w, padding = q["input"], q["weight"], q["padding_idx"]
    source = tape.source(w)
    if not usable(tape, index, w) or source is None or not source.injective:
        return NotImplemented
    kept = tape.keep(index)
    out, edge = tape.edge(func(*args, **kwargs))
    if edge is not None:
        weight = None
        if padding is not None:
            weight = (index != padding % w.shape[0]).double()
        tape.uses.append(Lookup("embedding", source, edge, tuple(out.shape), kept, weight, None))
    return out


@rule("embedding_bag")
def _embedding_bag(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse "
    names += "per_sample_weights include_last_offset padding_idx"
    q = bind(names, args, kwargs)
    index, w, mode, weight = q["input"], q["weight"], q["mode"] or "mean", q["per_sample_weights"]
    source = tape.source(w)
    ok = usable(tape, index, w, weight) and source is not None and source.injective
    if not ok or mode == "max" or tape.source(weight) is not None:
        return NotImplemented
    assert source is not None
    kept = tape.keep(index)
    out, edge = tape.edge(func(*args, **kwargs), weight)
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
