"""Ghost or direct on a device: the layers' Gram matrices both ways, and by matrix products.

The planner's constants rest on such a table. For each convolution of ResNet-18 and ResNet-50 on
32 x 32 images, with either stem, and nine rows: the time of each way, of the same by products of
torch (``fastfi.backends.blas``), the bytes that must move, and what the planner chooses today.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import models
from bench.gpu_clock import Clock, Timing
from bench.gpu_machine import copy_bandwidth
from bench.gpu_problems import ConvShape, convolutions, layer_inputs
from bench.gpu_report import Run
from fastfi.backends import blas
from fastfi.layers.planner import ghost_is_cheaper

__all__ = ["layers"]

ROWS = 9
# T, D, O: a vision transformer's and a language model's projections, a head.
LINEAR = [(65, 192, 576), (65, 192, 768), (197, 768, 768), (197, 768, 3072), (1, 2048, 1000)]
MOST_GHOST = 1024  # positions: beyond, their S alone takes megabytes a sample
_BYTES = 1 << 30  # of one call's inputs, at most
_LEAST_BYTES = 256 << 20  # at least: many times the cache


def _batch(run: Run, bytes_each: int) -> int:
    most = max(1024, _LEAST_BYTES // bytes_each)
    return 2 if run.rehearsal else max(8, min(most, _BYTES // bytes_each))


def _few(batch: int) -> int:
    """Samples that products of torch get: they take some at a time, in a loop."""
    return min(batch, 64)


def _ways(
    run: Run, title: str, calls: dict[str, Callable[[], Tensor]], batch: int, each: int, plan: str
) -> dict[str, float]:
    """Times every way, adds a row each, and returns microseconds a sample by way.

    Args:
        calls: by way; products get :func:`_few` of the samples.
        each: bytes of a sample's inputs and outputs.
    """
    clock = Clock(run.device, budget=0.02 if run.rehearsal else 0.12, most=15)
    found: dict[str, float] = {}
    for way, call in calls.items():
        with run.guard(f"{title}, {way}"):
            timing: Timing = clock.time(lambda _, call=call: call(), 1, least=3)
            samples = _few(batch) if "products" in way else batch
            found[way] = 1e6 * timing.median / samples
            floor = 1e6 * each / copy_bandwidth(run)
            note = f"B = {samples}, planned: {plan}"
            run.add(f"{title}, {way}", found[way], "µs a sample", yardstick=floor, against="floor",
                    fraction=floor / found[way], note=note)  # fmt: skip
    return found


def _convolution(run: Run, shape: ConvShape, dtype: torch.dtype) -> dict[str, float]:
    positions = torch.Size(shape.positions).numel()
    taps = torch.Size(shape.kernel).numel()
    pixels = torch.Size(shape.spatial).numel()
    size = torch.tensor([], dtype=dtype).element_size()
    each = size * (shape.channels * pixels + ROWS * shape.outputs * positions)
    batch = _batch(run, each)
    g = torch.Generator(run.device).manual_seed(run.seed)
    x, d = layer_inputs(shape, batch, ROWS, dtype, g)
    some, rows = x[: _few(batch)], [t[: _few(batch)] for t in d]
    fused = torch.ops.fastfi.conv_gram
    calls: dict[str, Callable[[], Tensor]] = {
        "direct": partial(fused, x, d, *shape.form, False),
        "direct, products": partial(blas.conv_gram, some, rows, *shape.form, False),
    }
    if positions <= MOST_GHOST:
        calls["ghost"] = partial(fused, x, d, *shape.form, True)
        calls["ghost, products"] = partial(blas.conv_gram, some, rows, *shape.form, True)
    ghost = ghost_is_cheaper(positions, shape.channels // shape.groups * taps,
                             shape.outputs // shape.groups, ROWS, dtype, taps, pixels,
                             run.device)  # fmt: skip
    each += 8 * ROWS * ROWS
    return _ways(run, f"conv {shape.title()}", calls, batch, each, "ghost" if ghost else "direct")


def _linear(run: Run, sizes: tuple[int, int, int]) -> None:
    positions, inputs, outputs = sizes
    each = 4 * positions * (inputs + ROWS * outputs)
    batch = _batch(run, each)
    a = torch.randn(batch, positions, inputs, device=run.device)
    d = [torch.randn(batch, positions, outputs, device=run.device) for _ in range(ROWS)]
    some, rows = a[: _few(batch)], [t[: _few(batch)] for t in d]
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, ghost in (("direct", False), ("ghost", True)):
        calls[name] = partial(torch.ops.fastfi.linear_gram, a, d, ghost)
        calls[f"{name}, products"] = partial(blas.linear_gram, some, rows, ghost)
    ghost = ghost_is_cheaper(*sizes, ROWS, torch.float32, device=run.device)
    planned = "ghost" if ghost else "direct"
    title = f"linear T, D, O = {positions}, {inputs}, {outputs}"
    _ways(run, title, calls, batch, each + 8 * ROWS * ROWS, planned)


def layers(run: Run) -> None:
    """A row for each layer and way; and for each network what all its convolutions take."""
    networks = {
        "ResNet-18": models.resnet18,
        "ResNet-50": models.resnet50,
        "ResNet-18, small stem": models.resnet18_small,
        "ResNet-50, small stem": models.resnet50_small,
    }
    known: dict[ConvShape, dict[str, float]] = {}
    if run.is_right("conv_gram"):
        for name, factory in list(networks.items())[: 2 if run.quick else None]:
            counts = convolutions(factory())
            some = list(counts)[:2] if run.rehearsal else list(counts)
            for shape in some:
                run.check_time()
                if shape not in known:
                    with run.guard(f"conv_gram, {shape.title()}"), torch.no_grad():
                        known[shape] = _convolution(run, shape, torch.float32)
            _total(run, name, {s: counts[s] for s in some}, known)
    if run.is_right("linear_gram"):
        for sizes in LINEAR[:1] if run.rehearsal else LINEAR:
            with run.guard(f"linear_gram, {sizes}"), torch.no_grad():
                _linear(run, sizes)


def _total(
    run: Run, name: str, counts: dict[ConvShape, int], known: dict[ConvShape, dict[str, float]]
) -> None:
    """The sum over a network's convolutions of the faster fused way, beside the faster products."""

    def best(ways: dict[str, float], products: bool) -> float:
        return min((t for w, t in ways.items() if ("products" in w) == products), default=0.0)

    measured = {s: n for s, n in counts.items() if known.get(s)}
    fused, products = (
        sum(n * best(known[s], kind) for s, n in measured.items()) for kind in (False, True)
    )
    note = "" if len(measured) == len(counts) else f"{len(measured)} of {len(counts)} shapes"
    if fused > 0:
        run.add(f"all convolutions of {name}", fused, "µs a sample", yardstick=products,
                against="products", fraction=fused / products, main=True, note=note)  # fmt: skip
