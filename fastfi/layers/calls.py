"""The fallback: a whole module's call, differentiated sample by sample with torch.func.

It serves modules whose operations have no rule (recurrent networks, user-written functions): the
tap keeps the call's arguments and the edges of its outputs, and the gradients of the module's
parameters are vector-Jacobian products of that module alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastfi.cudnn import differentiable_rnns
from fastfi.layers.batching import Batching
from fastfi.layers.graph import node_of
from fastfi.layers.tape import Tape
from fastfi.layers.uses import Kept, Tapped
from fastfi.model import logits_of

__all__ = ["Call", "tapped_modules"]


@dataclass
class Call(Tapped):
    """One call of a module.

    Attributes:
        what: the module's name.
        module: the module.
        parameters: name within the module, by parameter's number.
        arguments: leaves of the arguments, tensors as :class:`Kept`.
        form: how the leaves make up (args, kwargs).
        outputs: by edge, which leaf of the module's output it is.
        outs: shapes of these leaves.
        loop: one sample after the other, because vmap cannot run the module.
        autocast: state of autocast when the call was made: enabled, dtype.
        before: the nodes of its arguments.
    """

    what: str
    module: nn.Module
    parameters: Mapping[int, str]
    arguments: Sequence[Any]
    form: TreeSpec
    outputs: Mapping[int, int]
    outs: Sequence[tuple[int, ...]]
    loop: bool
    autocast: tuple[bool, torch.dtype]
    before: Sequence[Any] = ()
    batchings: Sequence[Batching | None] = field(default=(), init=False)

    @property
    def roots(self) -> tuple[int, ...]:
        return tuple(self.parameters)

    @property
    def edges(self) -> list[int]:
        return list(self.outputs)

    def _tensors(self) -> list[Kept]:
        return [a for a in self.arguments if isinstance(a, Kept)]

    def shapes(self) -> list[tuple[int, ...]]:
        return [*self.outs, *(tuple(k.tensor.shape) for k in self._tensors())]

    def assign(self, batchings: Sequence[Batching | None]) -> None:
        self.batchings = batchings

    def places(self) -> Sequence[Batching | None]:
        return self.batchings[: len(self.outs)]

    def kept(self) -> list[Kept]:
        return self._tensors()

    def cotangent(self, leaf: int, d: Tensor, batch: int) -> Tensor:
        """[B, *sample] of one output."""
        batching = self.batchings[leaf]
        assert batching is not None
        return batching.split(d, batch)

    def rows(self, d: Mapping[int, Tensor], part: slice, batch: int) -> dict[int, Tensor]:
        """Gradients [b, n, *shape] of each parameter.

        Args:
            d: cotangents of the outputs [b, n, *sample], by leaf.
            part: the samples.
            batch: how many samples the call had.
        """
        inputs = self.batchings[len(self.outs) :]
        mapped, fixed = [], []
        for kept, batching in zip(self._tensors(), inputs, strict=True):
            t = kept.tensor
            mapped.append(None if batching is None else batching.split(t, batch)[part])
            fixed.append(t)
        given = [t for t in mapped if t is not None]
        names = list(self.parameters.values())
        own = dict(self.module.named_parameters(remove_duplicate=False))
        weights = {name: own[name].detach() for name in names}
        leaves = list(d)
        device = d[leaves[0]].device.type

        def outputs(weights: dict[str, Tensor], samples: Sequence[Tensor]) -> list[Tensor]:
            each = iter(samples)
            tensors = iter(
                [f if m is None else next(each) for m, f in zip(mapped, fixed, strict=True)]
            )
            values = [next(tensors) if isinstance(a, Kept) else a for a in self.arguments]
            args, kwargs = tree_unflatten(values, self.form)
            enabled, dtype = self.autocast
            rnns = differentiable_rnns(self.module, d[leaves[0]].device)
            with rnns, torch.autocast(device, dtype=dtype, enabled=enabled):
                out = functional_call(self.module, weights, args, kwargs)
            flat = tree_flatten(out if self.what else logits_of(out))[0]
            return [flat[self.outputs_leaf(leaf)] for leaf in leaves]

        def sample(samples: Sequence[Tensor], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
            _, pull = vjp(lambda w: outputs(w, samples), weights)  # type: ignore[misc]
            return vmap(lambda *c: pull(list(c))[0])(*cotangents)

        cotangents = [d[leaf] for leaf in leaves]
        with torch.enable_grad(), warnings.catch_warnings(), _restored(self.module):
            # Operations that vmap runs sample by sample are slow, not wrong.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if not self.loop:
                rows = vmap(sample)(given, cotangents)
            else:
                rows = _each(outputs, weights, given, cotangents)
        return {root: rows[name].detach() for root, name in self.parameters.items()}

    def outputs_leaf(self, leaf: int) -> int:
        """Position among the module's flattened outputs of the leaf-th tapped one."""
        return list(self.outputs.values())[leaf]


def _each(
    outputs: Any,
    weights: dict[str, Tensor],
    given: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Gradients sample by sample and row by row, by autograd."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    batch, n = cotangents[0].shape[:2]
    rows = {name: w.new_zeros(batch, n, *w.shape) for name, w in weights.items()}
    for b in range(batch):
        out = outputs(leaves, [t[b] for t in given])
        for r in range(n):
            grads = torch.autograd.grad(
                out,
                list(leaves.values()),
                [c[b, r] for c in cotangents],
                retain_graph=r + 1 < n,
                allow_unused=True,
            )
            for name, g in zip(leaves, grads, strict=True):
                if g is not None:
                    rows[name][b, r] = g
    return rows


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """What modules note on themselves during a call under torch.func is gone afterwards."""
    held = [
        (m, dict(m.__dict__), dict(m._buffers))
        for m in module.modules()
        if not isinstance(m, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for m, attributes, buffers in held:
            for name in m.__dict__.keys() - attributes.keys():
                del m.__dict__[name]
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)


@contextmanager
def tapped_modules(
    tape: Tape,
    calls: Sequence[tuple[nn.Module, str, Mapping[int, str]]],
    loops: frozenset[str],
) -> Iterator[None]:
    """While it lasts, calls of these modules in this thread are noted as uses on the tape.

    Args:
        calls: modules, their names and their parameters: names within the module, by number.
        loops: names of the modules that vmap cannot run.
    """
    thread = threading.get_ident()
    known = {id(module): (name, parameters) for module, name, parameters in calls}
    begun: dict[int, list[Any]] = {key: [] for key in known}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return
        leaves, form = tree_flatten((args, kwargs))
        nodes = [node_of(a) for a in leaves]
        # In-place operations inside the module may change its arguments.
        held = [Kept(a, True) if isinstance(a, Tensor) else a for a in leaves]
        begun[id(module)].append((held, form, nodes))

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if threading.get_ident() != thread:
            return out
        held, form, nodes = begun[id(module)].pop()
        name, parameters = known[id(module)]
        leaves, shape = tree_flatten(out if name else logits_of(out))
        outputs, outs = {}, []
        for i, t in enumerate(leaves):
            if isinstance(t, Tensor) and t.is_floating_point():
                leaves[i], edge = tape.edge(t)
                if edge is not None:
                    outputs[edge] = i
                    outs.append(tuple(t.shape))
        if outputs:
            device = leaves[next(iter(outputs.values()))].device.type
            autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            use = Call(
                name, module, parameters, held, form, outputs, outs, name in loops, autocast, nodes
            )
            tape.uses.append(use)
        if not name and not isinstance(out, Tensor):
            return out  # an object around the logits, which are not in need of a new tensor
        return tree_unflatten(leaves, shape)

    with ExitStack() as stack:
        for module, _, _ in calls:
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        yield
