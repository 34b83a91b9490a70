"""What other libraries offer for layer influence; each benchmark skips where one is not installed.

    pip install --no-deps torchjd backpack-for-pytorch nngeometry einops unfoldNd

(``--no-deps``, since two of them name torchvision, which they do not need here.) They were tried
with TorchJD 0.18.0, BackPACK 1.7.1 and nngeometry 0.4. Each gives products of gradients, or the
gradients themselves, for :func:`bench.layer_baselines.solve`:

* TorchJD: Gram matrices of a model's Jacobian, summed over the model; so one engine for each layer,
  and, with BatchNorm, one sample at a time. Or one engine for all parameters together, its purpose.
* BackPACK: ``SqrtGGNExact``, whose output is L0 itself, for chains of the layers that it knows; or
  ``BatchGrad``, the samples' own gradients, once for each class.
* nngeometry: the Jacobian of every layer, kept in memory.

A peer may refuse a network: what it raises is the table's entry.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from bench.layer_baselines import Grams, layers_of

__all__ = ["PEERS", "Peer", "prepare"]

Prepared: TypeAlias = Callable[[Tensor], Grams]


class Peer(NamedTuple):
    """A way to compute layer influence with another library.

    Attributes:
        package: what to import.
        prepare: hooks a model of its own; returns a function of x [B, ...].
        summed: it gives all parameters together: L = 1.
    """

    package: str
    prepare: Callable[[nn.Module], Prepared]
    summed: bool = False


def prepare(peer: Peer, model: nn.Module) -> Prepared:
    """The peer on a copy of the model: hooks stay there. Its warnings are not ours to heed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = peer.prepare(copy.deepcopy(model))

    def quiet(x: Tensor) -> Grams:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(x)

    return quiet


def _log_prob(model: nn.Module, x: Tensor) -> Tensor:
    return torch.log_softmax(model(x), 1)  # [B, K]


def _products(rows: list[Tensor]) -> Tensor:
    """[B, K, K] float64 from one layer's rows [B, K, p], one tensor for each of its parameters."""
    return sum((r @ r.mT).double() for r in rows)


def _torchjd_layers(model: nn.Module) -> Prepared:
    from torchjd.autogram import Engine

    modules = dict(model.named_modules())
    engines = [Engine(modules[name], batch_dim=None) for name in layers_of(model)]

    def run(x: Tensor) -> Grams:
        samples, out = [], []
        for sample in x:
            log_prob = _log_prob(model, sample[None])[0]  # [K]
            samples.append(torch.stack([engine.compute_gramian(log_prob) for engine in engines]))
            out.append(log_prob.detach())
        return Grams(torch.stack(samples).double(), torch.stack(out).double())

    return run


def _torchjd_parameters(model: nn.Module) -> Prepared:
    from torchjd.autogram import Engine

    batched = not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    engine = Engine(model, batch_dim=0 if batched else None)

    def run(x: Tensor) -> Grams:
        grams, out = [], []
        for part in x.split(len(x) if batched else 1):
            log_prob = _log_prob(model, part)  # [b, K]
            every = engine.compute_gramian(log_prob).unflatten(0, log_prob.shape)
            every = every.unflatten(2, log_prob.shape)  # [b, K, b, K]
            grams.append(every.diagonal(dim1=0, dim2=2).movedim(2, 0))  # [b, K, K]
            out.append(log_prob.detach())
        return Grams(torch.cat(grams)[:, None].double(), torch.cat(out).double())

    return run


def _backpack_ggn(model: nn.Module) -> Prepared:
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    layers = layers_of(model)  # the converted model has the same parameters
    model = extend(model, use_converter=True)
    entropy = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run(x: Tensor) -> Grams:
        z = model(x)  # [B, K]
        with backpack(SqrtGGNExact()):
            entropy(z, z.new_zeros(len(x), dtype=torch.long)).backward()
        log_prob = torch.log_softmax(z.detach(), 1).double()
        root = (0.5 * log_prob).exp()
        grams = []
        for parameters in layers.values():
            l0 = [_take(p, "sqrt_ggn_exact").flatten(2).transpose(0, 1) for p in parameters]
            grams.append(_products(l0) / root[:, :, None] / root[:, None])
        return Grams(torch.stack(grams, 1), log_prob)

    return run


def _backpack_gradients(model: nn.Module) -> Prepared:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    layers = layers_of(model)
    model = extend(model)

    def run(x: Tensor) -> Grams:
        log_prob = _log_prob(model, x)
        rows: dict[nn.Parameter, list[Tensor]] = {p: [] for p in model.parameters()}
        for k in range(log_prob.shape[1]):
            with backpack(BatchGrad(), retain_graph=True):
                log_prob[:, k].sum().backward(retain_graph=True)
            for p, own in rows.items():
                own.append(_take(p, "grad_batch").flatten(1))
        grams = [_products([torch.stack(rows[p], 1) for p in group]) for group in layers.values()]
        return Grams(torch.stack(grams, 1), log_prob.detach().double())

    return run


def _take(parameter: Any, name: str) -> Tensor:
    """What BackPACK left at the parameter, which is freed there; so is the gradient."""
    value = getattr(parameter, name)
    delattr(parameter, name)
    parameter.grad = None
    return value


def _nngeometry(model: nn.Module) -> Prepared:
    from nngeometry.jacobian import Jacobian

    def run(x: Tensor) -> Grams:
        out: list[Tensor] = []

        def function(part: Tensor) -> Tensor:
            out.append(_log_prob(model, part))
            return out[-1]

        # It marks its inputs as requiring gradients.
        jacobian = Jacobian(model, (x.clone(),), function=function)
        grams = [
            _products([r.flatten(2).transpose(0, 1) for r in rows])  # r [K, B, ...]
            for _, rows in jacobian.iter_by_module()
        ]
        return Grams(torch.stack(grams, 1), torch.cat(out).detach().double())

    return run


PEERS = {
    "TorchJD, an engine per layer": Peer("torchjd", _torchjd_layers),
    "TorchJD, one engine": Peer("torchjd", _torchjd_parameters, summed=True),
    "BackPACK, SqrtGGNExact": Peer("backpack", _backpack_ggn),
    "BackPACK, BatchGrad": Peer("backpack", _backpack_gradients),
    "nngeometry, Jacobian": Peer("nngeometry", _nngeometry),
}
