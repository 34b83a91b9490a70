"""Weights files: read without running code, fitted to a model by name and shape."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastfi._extras import require
from fastfi.errors import WeightsError

__all__ = ["load_weights"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel, torch.compile
_LISTED = 8  # keys of each kind that an error lists


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file or a PyTorch state dict into a model, all keys or none.

    A PyTorch file is read with ``torch.load(weights_only=True)`` and nothing else, so that a pickle
    cannot run code. The state dict may be wrapped in {"state_dict": ...}, {"model_state_dict": ...}
    or {"model": ...}; the prefixes ``module.`` and ``_orig_mod.`` are removed where the keys
    then fit. Missing ``num_batches_tracked`` counters, which evaluation does not use, and missing
    names of a tensor that is present under another name (tied weights) are accepted.

    Args:
        model: changed in place.
        path: the file.

    Raises:
        WeightsError: unreadable, unsafe, or not fitting: the message lists the missing, unexpected
            and wrongly shaped keys.
        MissingExtraError: a safetensors file, and safetensors is not installed.
    """
    stored = _read(path)
    names = [_stripped(stored), _without_infix(stored)]
    candidates = [stored, *(n for n in names if n is not None)]
    problems, state = min(
        ((_misfits(model, c), c) for c in candidates), key=lambda found: len(found[0])
    )
    if problems:
        raise WeightsError(
            f"{path} does not fit the model {type(model).__name__}:" + _list(problems)
        )
    model.load_state_dict(state, strict=False)  # all but the accepted absences is there


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, on the CPU."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    # safetensors: the header's length as a little-endian uint64, then the header, a JSON object
    if path.suffix == ".safetensors" or head[8:] == b"{":
        load_file = require("safetensors.torch", "reading safetensors files").load_file
        error_class = require("safetensors", "reading safetensors files").SafetensorError
        try:
            return dict(load_file(path))
        except (error_class, OSError, ValueError) as error:
            raise WeightsError(f"{path}: not a safetensors file, or truncated ({error})") from error
    try:
        with warnings.catch_warnings():  # of pickle protocols: what matters is said below
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n\n")[0].split("Please file an issue")[0]
        raise WeightsError(
            f"{path}: refused: not a PyTorch file of plain tensors, or damaged. Files that hold "
            "more than tensors (whole models, optimisers) could run code when they are read; save "
            f"model.state_dict(), or use safetensors. torch.load(weights_only=True) said: {reason}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path}: expected safetensors or a PyTorch state dict; the file cannot be read, "
            f"perhaps truncated ({type(error).__name__}: {error})"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path}: expected a state dict (names and tensors), got {type(content).__name__}"
        )
    wrong = [f"{k} ({type(v).__name__})" for k, v in content.items() if not _is_entry(k, v)]
    if wrong:
        raise WeightsError(
            f"{path}: expected a state dict of tensors, perhaps under one of "
            f"{', '.join(_WRAPPERS)}; these entries are not tensors: {_some(wrong)}"
        )
    return dict(content)


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _stripped(stored: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Without the prefixes that all keys share, None if there are none."""
    keys = list(stored)
    while any(all(k.startswith(p) for k in keys) for p in _PREFIXES):
        prefix = next(p for p in _PREFIXES if keys[0].startswith(p))
        keys = [k.removeprefix(prefix) for k in keys]
    return None if keys == list(stored) else dict(zip(keys, stored.values(), strict=True))


def _without_infix(stored: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Without any "_orig_mod." (submodules compiled one by one), None where it changes nothing."""
    stripped = _stripped(stored) or stored
    renamed = {k.replace("_orig_mod.", ""): v for k, v in stripped.items()}
    clash = len(renamed) < len(stripped)
    return None if clash or list(renamed) == list(stored) else renamed


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The keys that do not fit: {key: (kind, detail)}, in the model's order."""
    wanted: dict[str, Tensor] = {
        k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)
    }
    present = {_identity(v) for k, v in wanted.items() if k in state and v.numel() > 0}
    found: dict[str, tuple[str, str]] = {}
    for key, tensor in wanted.items():
        expected = list(tensor.shape)
        if key not in state:
            if not key.endswith("num_batches_tracked") and _identity(tensor) not in present:
                found[key] = ("missing (in the model, not in the file)", f"{key} {expected}")
        elif list(state[key].shape) != expected:
            got = list(state[key].shape)
            found[key] = ("wrong shape", f"{key}: expected {expected}, got {got}")
    for key in state:
        if key not in wanted:
            shape = list(state[key].shape)
            found[key] = ("unexpected (in the file, not in the model)", f"{key} {shape}")
    return found


def _identity(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _list(problems: Mapping[str, tuple[str, str]]) -> str:
    kinds: dict[str, list[str]] = {}
    for kind, detail in problems.values():
        kinds.setdefault(kind, []).append(detail)
    return "".join(f"\n  {len(d)} {kind}: {_some(d)}" for kind, d in kinds.items())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
