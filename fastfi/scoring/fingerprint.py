"""What tells a model and a data set from others, so that no run mixes the scores of two."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastfi.errors import FastfiError, OptionError
from fastfi.model import forward
from fastfi.scoring.measure import Measure
from fastfi.scoring.scorer import NO_LABEL, Samples, device_of
from fastfi.scoring.source import Source, part_of

__all__ = ["StreamDigest", "data_identity", "differences", "model_identity"]

_CLASSES = 32  # of the sample that a model is tried on
# Log-probabilities of one model on several devices and in several precisions differ by less.
_TOLERANCE = 0.05


def model_identity(model: Any, trainable: bool = False) -> dict[str, Any]:
    """A model's class and the SHA-256 of its parameters and buffers: names, types, shapes, values.

    Of a function, those of the modules that it uses: as a method, as variables of its own or of
    its module, or bound by ``functools.partial``. Where there are none, there is no digest.

    Args:
        trainable: note which parameters are, as well.

    Raises:
        OptionError: a parameter has no values.
    """
    named = type(model) if isinstance(model, nn.Module) else model
    name = getattr(named, "__qualname__", type(model).__qualname__)
    identity = {"class": f"{getattr(named, '__module__', '?')}.{name}", "digest": None}
    modules = _modules(model)
    if modules:
        digest = hashlib.sha256()
        for module in modules:
            # Buffers that are not saved, such as caches, may change with every call.
            saved = module.state_dict(keep_vars=True).keys()
            buffers = [(name, b) for name, b in module.named_buffers() if name in saved]
            for name, tensor in sorted((*module.named_parameters(), *buffers), key=lambda t: t[0]):
                if tensor.is_meta or is_lazy(tensor):
                    raise OptionError(
                        f"model: expected parameters with values, got {name} without any"
                    )
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(_bytes(tensor))
        identity["digest"] = digest.hexdigest()
    if trainable:
        names = [n for m in modules for n, p in m.named_parameters() if p.requires_grad]
        marked = hashlib.sha256("\n".join(names).encode()).hexdigest()
        identity["trainable"] = f"{len(names)} parameters ({marked[:12]})"
    return identity


def _modules(model: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a model is or uses."""
    if isinstance(model, nn.Module):
        return [model]
    if depth == 0:
        return []
    if isinstance(model, functools.partial):
        parts = [model.func, *model.args, *model.keywords.values()]
    elif inspect.ismethod(model):
        parts = [model.__self__]
    elif inspect.isfunction(model):
        try:
            used = inspect.getclosurevars(model)
        except ValueError:  # a variable that is not set yet
            return []
        parts = [*used.nonlocals.values(), *used.globals.values()]
    else:
        parts = list(vars(model).values()) if hasattr(model, "__dict__") else []
    return [found for part in parts for found in _modules(part, depth - 1)]


def _bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor, in C order."""
    t = tensor.detach().cpu()
    if t.layout != torch.strided or t.is_quantized:
        return repr(t).encode()
    return t.contiguous().reshape(-1).view(torch.uint8).numpy()


def tried_on(model: Any, samples: Samples, measure: Measure, device: Any) -> dict[str, Any] | None:
    """The log-probabilities that a model gives to the first of the samples that it takes: code and
    preprocessing show there, beside the parameters. And the values of objectives that are the
    user's functions, which a name does not tell. None where the model takes no sample."""
    for i in range(len(samples.ids)):
        if i in samples.errors:
            continue
        x = part_of(samples, i, i + 1).x[0]
        assert isinstance(x, Tensor)
        place = device if device is not None else device_of(model)
        try:
            with torch.no_grad():
                z = forward(model, x[None].to(place or x.device), measure.outputs)
        except FastfiError:  # not finite: the sample will get an error of its own
            continue
        except Exception:  # the user's model; the run meets the same error
            return None
        values = z[0].double().log_softmax(0)[:_CLASSES].tolist()
        own = {name: _values(f, z.double()) for name, f in measure.own_objectives.items()}
        log_prob = [round(v, 4) for v in values]
        return {"id": samples.ids[i], "log_prob": log_prob, "objectives": own}
    return None


def _values(objective: Any, z: Tensor) -> list[float] | None:
    """An objective of logits z [1, K], for the predicted class and for class 0."""
    try:
        with torch.no_grad():
            found = [objective(z, y) for y in (z.argmax(1), z.new_zeros(1, dtype=torch.int64))]
        return [float(value[0]) for value in found]
    except Exception:  # the user's function; the run meets the same error
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
    if "trainable" in a and "trainable" in b and a["trainable"] != b["trainable"]:
        return [_apart("model, trainable", a.get("trainable"), b.get("trainable"), words)]
    before, after = a.get("sample"), b.get("sample")
    if not outputs or before is None or after is None or before["id"] != after["id"]:
        return []
    if not _alike(before["log_prob"], after["log_prob"]):
        line = _apart(
            f"model, the same parameters, but other log-probabilities for sample {before['id']!r}",
            before["log_prob"][:3],
            after["log_prob"][:3],
            words,
        )
        return [f"{line}; its code or the preprocessing has changed"]
    ours = after.get("objectives", {})
    return [
        _apart(f"objective {name}, for sample {before['id']!r}", values, ours.get(name), words)
        for name, values in before.get("objectives", {}).items()
        if not _alike(values, ours.get(name))
    ]


def _alike(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Whether numbers are those of one model, as several devices compute them."""
    if a is None or b is None or len(a) != len(b):
        return a is b
    worst = max((abs(p - q) / (1 + abs(p)) for p, q in zip(a, b, strict=True) if p != q), default=0)
    return worst < _TOLERANCE


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
