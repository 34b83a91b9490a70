"""What tells a model and a data set from others, so that no run mixes the scores of two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfi.errors import FastfiError
from fastfi.model import forward
from fastfi.scoring.scorer import NO_LABEL, Samples, device_of
from fastfi.scoring.source import Source, part_of

__all__ = ["StreamDigest", "data_identity", "differences", "model_identity"]

_CLASSES = 32  # of the sample that a model is tried on
# Log-probabilities of one model on several devices and in several precisions differ by less.
_TOLERANCE = 0.05


def model_identity(model: Any) -> dict[str, Any]:
    """A model's class and the SHA-256 of its parameters and buffers: names, types, shapes, values.

    Models that are no nn.Module, nor a method of one, have no digest.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    named = type(model) if isinstance(model, nn.Module) else model
    name = getattr(named, "__qualname__", type(model).__qualname__)
    identity = {"class": f"{getattr(named, '__module__', '?')}.{name}", "digest": None}
    if isinstance(module, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in sorted((*module.named_parameters(), *module.named_buffers())):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
        identity["digest"] = digest.hexdigest()
    return identity


def _bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor, in C order."""
    t = tensor.detach().cpu()
    if t.layout != torch.strided or t.is_quantized:
        return repr(t).encode()
    return t.contiguous().reshape(-1).view(torch.uint8).numpy()


def tried_on(model: Any, samples: Samples, outputs: str, device: Any) -> dict[str, Any] | None:
    """The log-probabilities that a model gives to the first of the samples that it takes: code and
    preprocessing show there, beside the parameters. None where it takes none."""
    for i in range(len(samples.ids)):
        if i in samples.errors:
            continue
        x = part_of(samples, i, i + 1).x[0]
        assert isinstance(x, Tensor)
        place = device if device is not None else device_of(model)
        try:
            with torch.no_grad():
                z = forward(model, x[None].to(place or x.device), outputs)
        except FastfiError:  # not finite: the sample will get an error of its own
            continue
        except Exception:  # the user's model; the run meets the same error
            return None
        values = z[0].double().log_softmax(0)[:_CLASSES].tolist()
        return {"id": samples.ids[i], "log_prob": [round(v, 4) for v in values]}
    return None


class StreamDigest:
    """A hash over consecutive samples, however they are cut into batches."""

    def __init__(self) -> None:
        self._hashes = [hashlib.blake2b(digest_size=8) for _ in range(2)]

    def add(self, samples: Samples) -> None:
        """Appends samples."""
        values, names = self._hashes
        for i, name in enumerate(samples.ids):
            error = samples.errors.get(i)
            y = NO_LABEL if samples.y is None or error is not None else int(samples.y[i])
            names.update(f"{name!r} {y} {error is not None}\n".encode())
            x = samples.x[i]
            if error is None and x is not None:
                names.update(f"{x.dtype} {list(x.shape)}\n".encode())
                values.update(_bytes(x))

    def copy(self) -> StreamDigest:
        other = StreamDigest()
        other._hashes = [h.copy() for h in self._hashes]
        return other

    def text(self) -> str:
        return "".join(h.hexdigest() for h in self._hashes)


def data_identity(source: Source, probes: Samples, name: str | None) -> dict[str, Any]:
    """A data set's length and digests of a few samples, or the name that its user gives it."""
    size = {"length": source.length}
    if source.length is None:
        size["limit"] = source.limit
    if name is not None:
        return {"kind": source.kind, **size, "name": name}
    each = []
    for i in range(len(probes.ids)):
        digest = StreamDigest()
        digest.add(part_of(probes, i, i + 1))
        each.append(digest.text())
    whole = hashlib.sha256("\n".join(each).encode()).hexdigest()
    return {"kind": source.kind, **size, "digest": whole, "probes": each}


def differences(
    there: Mapping[str, Any],
    now: Mapping[str, Any],
    words: tuple[str, str] = ("there", "now"),
) -> list[str]:
    """What tells the run that a manifest describes from another one, each as a line.

    Args:
        there, now: manifests.
        words: how the lines call the two.
    """
    pairs = [("fastfi, version", there.get("fastfi"), now["fastfi"])]
    before, after = there.get("config", {}), now["config"]
    for key in (*after, *(before.keys() - after.keys())):
        pairs.append((f"configuration, {key}", before.get(key), after.get(key)))
    lines = [_apart(what, a, b, words) for what, a, b in pairs if a != b]
    data = _data(there.get("data", {}), now["data"], words)
    # Of other data, other log-probabilities say nothing about the model.
    return lines + _models(there.get("model", {}), now["model"], words, not data) + data


def _apart(what: str, a: Any, b: Any, words: tuple[str, str]) -> str:
    return f"{what}: {a!r} {words[0]}, {b!r} {words[1]}"


def _models(
    a: Mapping[str, Any], b: Mapping[str, Any], words: tuple[str, str], outputs: bool
) -> list[str]:
    """``outputs``: whether the log-probabilities of a sample are compared."""
    if a.get("class") != b["class"]:
        return [_apart("model", a.get("class"), b["class"], words)]
    if a.get("digest") != b["digest"]:
        first, second = (str(m.get("digest"))[:12] for m in (a, b))
        return [_apart("model, other parameters, digest", first, second, words)]
    before, after = a.get("sample"), b.get("sample")
    if not outputs or before is None or after is None or before["id"] != after["id"]:
        return []
    pairs = list(zip(before["log_prob"], after["log_prob"], strict=False))
    worst = max((abs(p - q) / (1 + abs(p)) for p, q in pairs if p != q), default=0.0)
    if worst < _TOLERANCE and len(before["log_prob"]) == len(after["log_prob"]):
        return []
    line = _apart(
        f"model, the same parameters, but other log-probabilities for sample {before['id']!r}",
        before["log_prob"][:3],
        after["log_prob"][:3],
        words,
    )
    return [f"{line}; its code or the preprocessing has changed"]


def _data(a: Mapping[str, Any], b: Mapping[str, Any], words: tuple[str, str]) -> list[str]:
    for key, what in (("length", "data, samples"), ("limit", "data, limit"), ("name", "data")):
        if a.get(key) != b.get(key):
            return [_apart(what, a.get(key), b.get(key), words)]
    if a.get("digest") == b.get("digest"):
        return []
    before, after = a.get("probes", []), b.get("probes", [])
    changed = sum(p != q for p, q in zip(before, after, strict=False))
    changed += abs(len(before) - len(after))
    return [
        f"data: {changed or 'some'} of {len(after) or 'the'} samples looked at differ (where "
        "transforms are random, data_id= names the data instead)"
    ]
