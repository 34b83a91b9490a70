"""Ways to the K - 1 rows of a network: which one should be the default on a GPU?

Each takes a forward pass and K - 1 backward passes to the input. They differ in how the passes are
launched (a loop, vmap over cotangents, a replayed CUDA graph) and in what torch may choose below
(memory format, TF32, autocast, cuDNN's own search).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_clock import Clock, peak_bytes, precision
from bench.gpu_report import Run
from bench.workloads import network

__all__ = ["WAYS", "Way", "rows"]


@dataclass(frozen=True)
class Way:
    """How rows are computed.

    Attributes:
        vmap: cotangents at once; 0 for a loop.
        channels_last: the memory format of model and input.
        bf16: autocast around the forward pass.
        tf32: for float32 products and convolutions.
        benchmark: cuDNN tries its algorithms.
        graph: one CUDA graph of all passes, replayed.
    """

    vmap: int = 0
    channels_last: bool = False
    bf16: bool = False
    tf32: bool = False
    benchmark: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        parts = [f"vmap of {self.vmap}" if self.vmap else "loop"]
        flags = {"channels last": self.channels_last, "bf16": self.bf16, "TF32": self.tf32,
                 "cudnn.benchmark": self.benchmark, "CUDA graph": self.graph}  # fmt: skip
        return ", ".join(parts + [name for name, on in flags.items() if on])

    @contextmanager
    def settings(self) -> Iterator[None]:
        """torch's switches, while it lasts."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.benchmark
        try:
            with precision(self.tf32):
                yield
        finally:
            torch.backends.cudnn.benchmark = before

    def prepared(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
        """Copies in this way's memory format."""
        if not self.channels_last:
            return model, x
        last: Any = torch.channels_last
        return deepcopy(model).to(memory_format=last), x.contiguous(memory_format=last)

    def passes(self, model: nn.Module, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Gradients of the contrasts z_k - z_top: [K-1, B, ...].

        Args:
            order: [B, K], the classes; None sorts them.
        """
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            z = model(x)  # [B, K]
        order = z.detach().argsort(1, descending=True) if order is None else order
        n = z.shape[1] - 1
        cotangents = z.new_zeros(n, *z.shape)  # [K-1, B, K]
        cotangents.scatter_(2, order[:, 1:].T[:, :, None], 1.0)
        cotangents.scatter_(2, order[None, :, :1].expand(n, -1, -1), -1.0)
        out = x.new_empty(n, *x.shape)
        step = self.vmap or 1
        for first in range(0, n, step):
            part = cotangents[first : first + step]
            keep = first + step < n
            if self.vmap:
                (got,) = torch.autograd.grad(z, x, part, retain_graph=keep, is_grads_batched=True)
            else:
                (got,) = torch.autograd.grad(z, x, part[0], retain_graph=keep)
            out[first : first + step] = got
        return out

    def call(self, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        """The passes as a function of nothing; a graph is captured first."""
        if not self.graph:
            return lambda: self.passes(model, x)
        given = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.passes(model, given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.passes(model, given)

        def replay() -> Tensor:
            given.copy_(x)
            graph.replay()
            return out

        return replay


WAYS = (
    Way(),
    Way(vmap=3),
    Way(vmap=9),
    Way(channels_last=True),
    Way(bf16=True),
    Way(tf32=True),
    Way(benchmark=True),
    Way(graph=True),
    Way(graph=True, vmap=9),
    Way(channels_last=True, tf32=True, benchmark=True),
    Way(graph=True, channels_last=True, tf32=True, benchmark=True),
    Way(graph=True, channels_last=True, bf16=True, benchmark=True),
)

SEARCHED = 256  # the only batch size with cuDNN's own search, which takes seconds for each


def _error(way: Way, model: nn.Module, x: Tensor) -> float:
    """Of the rows of a few samples, relative to the same network in float64."""
    wide = deepcopy(model).double()
    with torch.no_grad():
        order = wide(x.double()).argsort(1, descending=True)
    want = Way().passes(wide, x.double(), order)
    got = way.passes(*way.prepared(model, x), order)
    return float((got.double() - want).norm() / want.norm())


def _measure(run: Run, clock: Clock, way: Way, model: nn.Module, x: Tensor, title: str) -> float:
    """Adds a row, and returns microseconds a sample."""
    with way.settings():
        ready, samples = way.prepared(model, x)
        error = _error(way, model, x[:4])
        call = way.call(ready, samples)
        timing = clock.wall(call)
        peak = peak_bytes(run.device, call)
    each = 1e6 * timing.median / len(x)
    memory = "" if peak is None else f", peak {peak / 2**20:.0f} MiB"
    note = f"rows off by {error:.1e} of float64's{memory}, {timing.count} calls"
    run.add(title, each, "µs a sample", note=note)
    return each


def _not_here(way: Way, run: Run) -> str:
    if run.device != "cuda" and (way.graph or way.tf32 or way.benchmark):
        return "not on a CPU"
    return ""


def rows(run: Run) -> None:
    """Every way on ResNet-50 and ResNet-18, at several batch sizes; the fastest of those that are
    IEEE float32, and of all."""
    clock = Clock(run.device, budget=0.02 if run.rehearsal else 0.25, most=30)
    plans = [("ResNet-50", 256), ("ResNet-50", 64), ("ResNet-50", 1024), ("ResNet-18", 256),
             ("ResNet-18", 16)]  # fmt: skip
    for name, batch in [("SmallCNN", 2)] if run.rehearsal else plans[: 2 if run.quick else None]:
        model, shape = deepcopy(network(name).model).to(run.device), network(name).x.shape[1:]
        x = torch.rand(batch, *shape, device=run.device)
        found: dict[Way, float] = {}
        for way in WAYS:
            run.check_time()
            title = f"rows of {name}, B = {batch}, {way.name}"
            missing = _not_here(way, run)
            if missing:
                run.add(title, note=missing)
                continue
            if way.benchmark and batch != SEARCHED:
                continue
            try:
                found[way] = _measure(run, clock, way, model, x, title)
            except RuntimeError as error:  # torch's own functions: a refusal is a finding
                run.add(title, note=f"refused: {str(error).splitlines()[0][:200]}")
            if run.device == "cuda":
                torch.cuda.empty_cache()
        _fastest(run, f"{name}, B = {batch}", found)


def _fastest(run: Run, title: str, found: dict[Way, float]) -> None:
    if Way() not in found:
        return
    loop = found[Way()]
    ieee = {w: t for w, t in found.items() if not (w.tf32 or w.bf16)}
    for what, among in (("fastest rows", ieee), ("fastest rows, any precision", found)):
        way = min(among, key=lambda w: among[w])
        run.add(f"{what}, {title}: {way.name}", among[way], "µs a sample", yardstick=loop,
                against="loop", fraction=among[way] / loop, main=True)  # fmt: skip
