"""The parameters of a model, their names, and the layers that own them."""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastfi.errors import OptionError

__all__ = ["Blocks", "Parameters", "blocks", "exclusive"]

# Modules that are run by torch.func lend it their parameters for a moment: one call at a time.
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locking = threading.RLock()


def exclusive(model: Any) -> Any:
    """A lock for calls that look at a model's parameters; the same for the same model."""
    module = _module_of(model)
    if not isinstance(module, Hashable) or not isinstance(module, nn.Module):
        return _locking
    with _locking:
        return _locks.setdefault(module, threading.RLock())


def _module_of(model: Any) -> Any:
    return model if isinstance(model, nn.Module) else getattr(model, "__self__", None)


ROOT = "(model)"  # the layer of parameters that the model itself owns


class Blocks(NamedTuple):
    """Groups of parameters, one for each column of the result.

    Attributes:
        names: of the groups.
        members: the parameters' numbers in each.
    """

    names: tuple[str, ...]
    members: tuple[frozenset[int], ...]


class Parameters:
    """The trainable parameters of a model, each once, numbered.

    Args:
        model: an nn.Module, or a bound method of one.

    Attributes:
        model: what is called.
        module: the module.
        tensors: the parameters.
        names: each one's first name.

    Raises:
        OptionError: the model is no module, or has no trainable parameter.
    """

    def __init__(self, model: Any) -> None:
        module = _module_of(model)
        if not isinstance(module, nn.Module):
            raise OptionError(
                "wrt: expected an nn.Module (or a method of one), whose parameters have names, got "
                f"a model of type {type(model).__name__}"
            )
        self.model, self.module = model, module
        trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not trainable:
            raise OptionError(
                "wrt: expected a model with trainable parameters, got none with requires_grad=True"
            )
        self.names = tuple(n for n, _ in trainable)
        self.tensors = tuple(p for _, p in trainable)
        self._number = {id(p): i for i, p in enumerate(self.tensors)}
        # All names, those of tied and frozen parameters too.
        self._all = list(module.named_parameters(remove_duplicate=False))
        for name, p in trainable:
            if isinstance(p, UninitializedParameter):
                raise OptionError(
                    f"wrt: expected initialised parameters, got {name}, which waits for a first "
                    "forward pass"
                )
            if p.is_inference():
                raise OptionError(
                    f"wrt: expected parameters that autograd can track, got {name}, which was made "
                    "under torch.inference_mode()"
                )
            if not (p.is_floating_point() and p.layout == torch.strided):
                raise OptionError(f"wrt: expected dense real parameters, got {p.dtype} {name}")

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision among the parameters."""
        return max((p.dtype for p in self.tensors), key=lambda t: torch.finfo(t).eps)

    def key(self) -> tuple[Any, ...]:
        """Changes when parameters are replaced, frozen or thawed, and with the method called."""
        return getattr(self.model, "__func__", None), tuple(id(p) for p in self.tensors)

    def watched(self) -> dict[int, int]:
        """Numbers, by id."""
        return self._number

    def submodule(self, name: str) -> nn.Module:
        """The module of that name; "" is the model."""
        return self.module.get_submodule(name) if name else self.module

    def constants(self) -> Iterable[Tensor]:
        """Frozen parameters and buffers."""
        yield from (p for _, p in self._all if id(p) not in self._number)
        yield from self.module.buffers()

    def around(self, root: int) -> list[str]:
        """Names of the modules that contain a parameter, the innermost first, and that torch.func
        can call with other parameters: not TorchScript's."""
        path = self.names[root].split(".")[:-1]
        names, module = [], self.module
        for i in range(len(path) + 1):
            if isinstance(module, torch.jit.ScriptModule):
                break
            names.append(".".join(path[:i]))
            module = getattr(module, path[i]) if i < len(path) else module
        return names[::-1]

    def within(self, module: str, roots: Sequence[int]) -> dict[int, str]:
        """Names of parameters within a module that contains them."""
        start = len(module) + 1 if module else 0
        return {root: self.names[root][start:] for root in roots}

    def _layer(self, name: str) -> str:
        """The module that owns a parameter of that name; for a parametrization, the module whose
        parameter it makes."""
        owner = name.rpartition(".")[0].split(".")
        if "parametrizations" in owner:
            owner = owner[: owner.index("parametrizations")]
        return ".".join(owner)

    def layers(self) -> Blocks:
        """One block for each module that owns trainable parameters, in the modules' order."""
        owned: dict[str, set[int]] = {}
        order: dict[str, int] = {}
        for path, module in self.module.named_modules():  # a module with two names comes once
            order[path] = len(order)
            for own, p in module.named_parameters(recurse=False):
                if id(p) in self._number:
                    layer = self._layer(f"{path}.{own}" if path else own)
                    owned.setdefault(layer, set()).add(self._number[id(p)])
        names = sorted(owned, key=lambda name: order.get(name, len(order)))
        members = tuple(frozenset(owned[name]) for name in names)
        return Blocks(tuple(name or ROOT for name in names), members)

    def everything(self, name: str) -> Blocks:
        """All parameters as one block of that name."""
        return Blocks((name,), (frozenset(range(len(self.tensors))),))

    def _named(self, name: Any) -> frozenset[int]:
        if not isinstance(name, str):
            raise OptionError(
                f"wrt: expected names of modules or parameters, got {type(name).__name__} {name!r}"
            )
        if name == ROOT:
            chosen = [p for n, p in self._all if self._layer(n) == ""]
        else:
            chosen = [p for n, p in self._all if n == name or n.startswith(f"{name}.")]
        if not chosen:
            self._unknown(name)
        numbers = frozenset(self._number[id(p)] for p in chosen if id(p) in self._number)
        if not numbers:
            raise OptionError(
                f"wrt: expected trainable parameters, got {name!r}, whose {len(chosen)} "
                f"parameter{'s have' if len(chosen) > 1 else ' has'} requires_grad=False"
            )
        return numbers

    def _unknown(self, name: str) -> None:
        if name in ("input", "params", "all", "layers"):
            raise OptionError(f"wrt: expected names of modules or parameters, got {name!r} in a "
                              f"list; did you mean wrt={name!r}?")  # fmt: skip
        modules = dict(self.module.named_modules())
        if name in modules and name:
            raise OptionError(f"wrt: expected a module with parameters, got {name!r}, without any")
        known = [n for n in modules if n] + [n for n, _ in self._all]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        near = near or [n for n in known if n.startswith(name)][:3] or known[:3]
        raise OptionError(
            "wrt: expected names of modules or parameters of the model, got "
            f"{name!r}; did you mean {' or '.join(map(repr, near))}?"
        )

    def named(self, names: Sequence[Any]) -> Blocks:
        """One block for each name of a module or parameter."""
        if len(names) == 0:
            raise OptionError("wrt: expected at least one name, got an empty list")
        return Blocks(tuple(names), tuple(self._named(name) for name in names))


def blocks(parameters: Parameters, wrt: str | Sequence[str]) -> Blocks:
    """The blocks that ``wrt`` means: "params", "all", "layers" or names."""
    if isinstance(wrt, str):
        return parameters.layers() if wrt == "layers" else parameters.everything(wrt)
    return parameters.named(wrt)
