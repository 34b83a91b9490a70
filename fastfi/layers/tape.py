"""A forward pass that notes every operation on a parameter.

torch calls a ``TorchFunctionMode`` for each function that the model uses, so that what counts is
what is done with a parameter, not in which module: weights used functionally, several times, or
tied are all seen. For each such operation the tape keeps its input and the edge of the autograd
graph at its output; K - 1 backward passes then give the cotangents of these edges, and no gradient
of a weight is ever computed. An edge stays valid when the output is overwritten in place later.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fastfi.layers.graph import node_of
from fastfi.layers.source import Source
from fastfi.layers.uses import Kept, Pulled, Scaled, Tapped

__all__ = ["Choices", "Tape"]


class Choices(NamedTuple):
    """What the plan has found out about a model, for its tapes.

    Attributes:
        in_calls: the parameters that a module's own tap covers; operations on them are not noted.
        constant: operations that broadcast a parameter without the samples (keys as in
            :meth:`Tape.key`).
        copied: numbers of the uses whose input the model overwrites.
    """

    in_calls: frozenset[int] = frozenset()
    constant: frozenset[Any] = frozenset()
    copied: frozenset[int] = frozenset()


class _Derived(NamedTuple):
    """A tensor computed from parameters and constants alone, but no view of a parameter."""

    roots: frozenset[int]


_CONSTANT = _Derived(frozenset())

# Functions that change the order of dimensions, by their other arguments.
_REORDERING = frozenset(
    ["permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "roll"]
)
# Functions whose outputs' places depend on values: of an index, or of what is sorted.
_INDEXING = {
    *("__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim"),
    *("index_put", "index_put_", "index_copy", "index_copy_", "index_add", "index_add_"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "masked_select", "masked_scatter"),
    *("masked_scatter_", "nonzero", "argsort", "sort", "topk", "unique", "unique_consecutive"),
    "_pack_padded_sequence",
}


def _index(name: str, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments that decide the places."""
    if name in ("__getitem__", "__setitem__"):
        return args[1] if isinstance(args[1], tuple) else args[1:2]
    return args if name in ("nonzero", "argsort", "sort", "topk") else args[1:]


# Functions of torch.nn.functional, written in Python, that call others with parameters.
_TRANSPARENT = frozenset({nn.functional.multi_head_attention_forward})


def _open(func: types.FunctionType) -> Callable[..., Any]:
    """The function without its own check for modes, which would call the mode again."""
    scope = {**func.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among them, and one level of lists and tuples below."""
    found = []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (list, tuple)):
            found += [t for t in v if isinstance(t, Tensor)]
    return found


class Tape(TorchFunctionMode):
    """Active during a forward pass (``with tape:``), it fills ``edges`` and ``uses``.

    Args:
        parameters: those to watch; their numbers are their positions.
        constants: the model's other tensors: frozen parameters, buffers.
        choices: see :class:`Choices`.
        rules: by the function's name; see :mod:`fastfi.layers.rules`.

    Attributes:
        edges: the outputs whose cotangents the uses need.
        before: for each edge, the nodes of the operation's other inputs.
        path: changes with the functions that the model calls, and with the order of dimensions.
        indexed: whether the model's values decided which entries go where.
        uses: in the order of execution.
        unruled: parameters with an operation that has no rule, and its name.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        constants: Iterable[Tensor],
        choices: Choices,
        rules: Mapping[str, Callable[..., Any]],
    ) -> None:
        super().__init__()
        self.parameters, self._rules = parameters, rules
        self.choices = choices
        self.edges: list[GradientEdge] = []
        self.before: list[list[Any]] = []
        self.path = 0
        self.indexed = False
        self.uses: list[Tapped] = []
        self.unruled: dict[int, str] = {}
        # By id; the tensors are held, so that no id is used again.
        self._known: dict[int, tuple[Tensor, Source | _Derived]] = {}
        for t in constants:
            self._know(t, _CONSTANT)
        for root, parameter in enumerate(parameters):
            if root in choices.in_calls:
                self._know(parameter, _CONSTANT)
            else:
                self._know(parameter, Source.of(root, parameter, parameter))

    def _know(self, t: Tensor, what: Source | _Derived) -> None:
        self._known[id(t)] = (t, what)

    def what(self, t: Any) -> Source | _Derived | None:
        """What is known of a value: a view of a parameter, something derived, or None for an
        activation."""
        known = self._known.get(id(t))
        return None if known is None else known[1]

    def source(self, t: Any) -> Source | None:
        """The view that a value is, if it is one that can be followed."""
        what = self.what(t)
        return what if isinstance(what, Source) else None

    def roots(self, values: Iterable[Any]) -> frozenset[int]:
        """The parameters that these values hold or derive from."""
        found: set[int] = set()
        for t in tensors(values):
            what = self.what(t)
            if isinstance(what, Source):
                found.add(what.root)
            elif what is not None:
                found |= what.roots
        return frozenset(found)

    def key(self, func: Any, values: Iterable[Any], shape: Sequence[int]) -> Any:
        """Names an operation on parameters alone, whatever the batch is."""
        return _name(func), self.roots(values), tuple(shape)

    def edge(self, out: Tensor, *inputs: Any) -> tuple[Tensor, int | None]:
        """Taps an operation's output: the output to go on with, and the edge's number, or None
        where no gradient flows (under no_grad).

        Args:
            inputs: what the operation read beside the parameters that it is tapped for.
        """
        if not (out.requires_grad and torch.is_grad_enabled()):
            return out, None
        if out._is_view():
            # An in-place operation on a view rewrites the graph before it.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        self.edges.append(get_gradient_edge(out))
        self.before.append([node_of(t) for t in inputs if not self.roots([t])])
        return out, len(self.edges) - 1

    def keep(self, t: Tensor) -> Kept:
        """The activation that the next use reads."""
        return Kept(t, len(self.uses) in self.choices.copied)

    def add_scaled(
        self, what: str, t: Tensor, edge: int, shape: Sequence[int], aligned: Sequence[int]
    ) -> None:
        """The use of a parameter, or of a tensor computed from some, that was spread out."""
        place = edge, tuple(shape), tuple(aligned), None
        source = self.source(t)
        if source is None:
            origins = {root: self.parameters[root] for root in sorted(self.roots([t]))}
            own = Source.of(next(iter(origins)), t, t)
            self.uses.append(Pulled(what, own, *place, derived=t, origins=origins))
        else:
            self.uses.append(Scaled(what, source, *place))

    def forget(self, t: Tensor) -> None:
        """A tensor that was constant was written to: neither it nor its views are, any more."""
        storage = t.untyped_storage().data_ptr()
        stale = [
            key
            for key, (known, what) in self._known.items()
            if not isinstance(what, Source) and known.untyped_storage().data_ptr() == storage
        ]
        for key in stale:
            del self._known[key]

    def note(self, func: Any, values: Sequence[Any], out: Any) -> None:
        """Follows what becomes of parameters outside of the rules."""
        arguments = tensors(values)
        roots = self.roots(values)
        mixed = any(self.what(t) is None for t in arguments)
        outputs = tensors([out])
        # Written to in place: x.add_(...) returns x, x[...] = ... nothing.
        written = [t for t in arguments[:1] if out is t or _name(func) == "__setitem__"]
        for t in written:
            if self.source(t) is None:
                self.forget(t)
                outputs = [t]
        outputs = [t for t in outputs if not (self.source(t) and any(t is w for w in written))]
        if mixed:
            if roots and any(t.is_floating_point() for t in outputs):
                for root in roots:
                    self.unruled.setdefault(root, _name(func))
            return
        sources = [s for t in arguments if (s := self.source(t)) is not None]
        for t in outputs:
            only = sources[0].root if len(sources) == len(arguments) == 1 else None
            if only is not None and _shares(t, self.parameters[only]):
                self._know(t, Source.of(only, self.parameters[only], t))
            else:
                self._know(t, _Derived(roots))

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The path, and whether values decide it."""
        name = _name(func)
        if name == "__get__":
            return
        order = repr(args[1:]) + repr(kwargs) if name in _REORDERING else ""
        self.path = hash((self.path, name, order))
        if name in _INDEXING and any(self.what(t) is None for t in tensors(_index(name, args))):
            self.indexed = True

    def __torch_function__(
        self,
        func: Any,
        kinds: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._follow(func, args, kwargs)
        if func in _TRANSPARENT:
            with self:
                return _open(func)(*args, **kwargs)
        values = [*args, *kwargs.values()]
        if self.roots(values):
            rule = self._rules.get(_name(func))
            if rule is not None:
                out = rule(self, func, args, kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        self.note(func, values, out)
        return out


def _shares(view: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a view of the parameter's own memory, in its own precision."""
    return (
        view.dtype == parameter.dtype
        and view.layout == parameter.layout == torch.strided
        and view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    )
