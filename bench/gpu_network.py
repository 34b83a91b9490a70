"""The public calls on ResNets: right first, then against the network's own passes and its rivals.

Wall times, waiting for the device at the end, so that launching and the host's own work count.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastfi
from bench.baselines import forward_backward, jacrev_influence
from bench.gpu_clock import Clock, peak_bytes, precision
from bench.gpu_report import Run
from bench.gpu_rows import Way
from bench.layer_problems import chunks_of
from bench.workloads import network

__all__ = ["naive_influence", "network_section", "synchronisations"]

CONTRACT = 1e-3  # a float32 model against the same in float64


def naive_influence(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FI [B] float64 as scripts compute it: sample by sample and class by class on the device,
    gradients to the host, a pseudo-inverse there."""
    values = []
    for sample, label in zip(x, y.tolist(), strict=True):
        omega = sample[None].detach().requires_grad_()
        log_prob = torch.log_softmax(model(omega), 1)[0]  # [K]
        rows = [
            torch.autograd.grad(log_prob[k], omega, retain_graph=True)[0].flatten().cpu().numpy()
            for k in range(len(log_prob))
        ]
        dl = np.stack(rows)  # [K, p]
        l0 = np.sqrt(log_prob.detach().exp().cpu().numpy())[:, None] * dl
        m = l0 @ l0.T
        cut = len(m) * np.finfo(m.dtype).eps
        half = np.linalg.pinv(m, rcond=cut, hermitian=True) @ (l0 @ -dl[label])  # [K]
        values.append(float(half.astype(np.float64) @ half.astype(np.float64)))
    return torch.tensor(values, dtype=torch.float64)


def synchronisations(call: Callable[[], object]) -> dict[str, int]:
    """Where the host waits for the GPU during a call, by "file:line", as torch reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (
        f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
        for w in seen
        if "synchroniz" in str(w.message)
    )
    return dict(Counter(places).most_common())


Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _calls() -> dict[str, Call]:
    """What is checked, by name, each in float64."""
    wide = torch.float64

    def of(**options: object) -> Call:
        return lambda m, x, y: fastfi.influence(m, x, y, dtype=wide, **options)  # type: ignore[arg-type,return-value]

    found = {f"influence, {rule}": of(inverse=rule) for rule in ("exact", "truncated", "damped")}
    found["params, damped"] = of(inverse="damped", wrt="params")
    found["layers, damped"] = of(inverse="damped", wrt="layers")
    found["maps, damped"] = lambda m, x, y: fastfi.influence_map(m, x, y, dtype=wide)  # type: ignore[return-value]
    return found


def _right(run: Run, name: str, model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether all calls agree with the float64 network on the CPU, in IEEE float32. In the
    precision that torch was found in, a row only."""
    wide = deepcopy(model).to("cpu", torch.float64)
    good = True
    for title, call in _calls().items():
        with run.guard(f"{name}, {title}"):
            want = call(wide, x.cpu().double(), y.cpu())
            errors = {}
            with precision(tf32=False):
                errors["IEEE"] = call(model, x, y)
            if run.device == "cuda":
                errors["as found"] = call(model, x, y)
            for mode, got in errors.items():
                if got.device.type != run.device:
                    raise AssertionError(f"expected a result on {run.device}, got {got.device}")
                # Windows that hardly matter have gradients of rounding noise's size.
                least = 1e-3 if title.startswith("maps") else 1e-6
                scale = want.abs().clamp(min=least * float(want.abs().max()))
                error = float(((got.cpu() - want).abs() / scale).nan_to_num(torch.inf).max())
                ieee = mode == "IEEE"
                met = error <= CONTRACT if ieee else None
                run.add(f"check {name}, {title}, float32 {mode}", error, yardstick=CONTRACT,
                        against="allowed", fraction=error / CONTRACT, met=met,
                        target="<= 1 x allowed" if ieee else "", main=met is False)  # fmt: skip
                if met is False:
                    good = False
                    text = f"expected at most {CONTRACT:.0e}, got {error:.1e}"
                    run.report.fail(run.section, f"{name}, {title}", text)
            continue
        good = False  # an error was raised
    return good


def _ratio(run: Run, clock: Clock, title: str, work: Callable[[], object],
           yardstick: Callable[[], object], against: str, samples: tuple[int, int],
           target: str = "", met: Callable[[float], bool] | None = None) -> None:  # fmt: skip
    """A row of microseconds a sample and their ratio, taken in turn."""
    a, b, ratio = clock.turns(work, yardstick, least=1 if run.rehearsal else 3)
    ratio *= samples[1] / samples[0]
    run.add(title, 1e6 * a.median / samples[0], "µs a sample",
            yardstick=1e6 * b.median / samples[1], against=against, fraction=ratio, target=target,
            met=None if met is None or run.rehearsal else met(ratio), main=True,
            note=f"{a.count} rounds")  # fmt: skip


def _fastest_passes(
    clock: Clock, model: nn.Module, x: Tensor, chunks: list[int]
) -> tuple[Callable[[], object], str]:
    """Forward and K - 1 backward passes in the same chunks, by a loop or by vmap over cotangents,
    whichever is faster: nothing with full rows does less."""

    def loop() -> object:
        return forward_backward(model, x, chunks)

    def vmapped() -> object:
        return [Way(vmap=9).passes(model, part) for part in x.split(chunks)]

    with precision(tf32=False):
        found = {"loop": (clock.wall(loop).median, loop)}
        try:
            found["vmap"] = (clock.wall(vmapped).median, vmapped)
        except RuntimeError as error:
            print(f"vmap over cotangents refused: {str(error).splitlines()[0][:200]}")
    how = min(found, key=lambda way: found[way][0])
    return found[how][1], how


def _end_to_end(run: Run, name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    clock = Clock(run.device, budget=0.01 if run.rehearsal else 1.5, most=20)
    few = x[: 2 if run.rehearsal else 4], y[: 2 if run.rehearsal else 4]
    n = len(x)

    def setup1() -> object:
        return fastfi.influence(model, x, y)

    def layers() -> object:
        return fastfi.influence(model, x, y, wrt="layers", inverse="damped")

    chunks = chunks_of(model, setup1)
    chunks = chunks_of(model, setup1)  # without the samples that were measured on

    run.note("chunks", {f"{name}, B = {n}": chunks})
    passes, how = _fastest_passes(clock, model, x, chunks)
    run.note("own passes", {name: how})
    modes = {"IEEE": False, "TF32": True} if run.device == "cuda" else {"IEEE": False}
    for mode, tf32 in modes.items():
        with run.guard(f"{name}, share, {mode}"), precision(tf32):
            title = f"{name}, B = {n}, influence, {mode}"
            _ratio(run, clock, title, setup1, passes, "own passes", (n, n), "<= 1.11 x (90 %)",
                   lambda r: r <= 1 / 0.9)  # fmt: skip
    with precision(tf32=False):
        with run.guard(f"{name}, layers"):
            title = f"{name}, B = {n}, all layers, damped"
            goal = "<= 1.5 x"
            _ratio(run, clock, title, layers, setup1, "Setup 1", (n, n), goal, lambda r: r <= 1.5)
            _ratio(run, clock, title, layers, passes, "own passes", (n, n))
        with run.guard(f"{name}, naive"):
            title = f"{name}, naive autograd"
            _ratio(run, clock, title, lambda: naive_influence(model, *few), setup1, "influence",
                   (len(few[0]), n), ">= 100 x", lambda r: r >= 100)  # fmt: skip
        with run.guard(f"{name}, vmap(jacrev)"):
            for chunk in (1,) if run.rehearsal else (64, 256):
                part = x[: 2 * chunk], y[: 2 * chunk]
                title = f"{name}, vmap(jacrev) of {chunk}"
                _ratio(run, clock, title, lambda p=part, c=chunk: jacrev_influence(model, *p, c),
                       setup1, "influence", (len(part[0]), n), ">= 2 x",
                       lambda r: r >= 2)  # fmt: skip
        with run.guard(f"{name}, maps"):
            title = f"{name}, B = {n}, maps, damped"
            _ratio(run, clock, title, lambda: fastfi.influence_map(model, x, y), setup1,
                   "influence", (n, n))  # fmt: skip
        for what, call in (("influence", setup1), ("own passes", passes), ("layers", layers)):
            with run.guard(f"{name}, memory, {what}"):
                peak = peak_bytes(run.device, call)
                row = {"note": "not on a CPU"} if peak is None else {}
                value = None if peak is None else peak / 2**20 / n
                run.add(f"{name}, B = {n}, peak memory of {what}", value, "MiB a sample", **row)
        with run.guard(f"{name}, synchronisations"):
            if run.device != "cuda":
                run.add(f"{name}, synchronisations", note="not on a CPU")
                return
            for what, call in (("influence", setup1), ("layers", layers)):
                places = synchronisations(call)
                run.note("synchronisations", {f"{name}, {what}, {len(chunks)} chunks": places})
                run.add(f"{name}, synchronisations of {what}", sum(places.values()), "",
                        note=f"{len(chunks)} chunks: {places}")  # fmt: skip


def network_section(run: Run) -> None:
    """Both networks: checks, ratios, memory."""
    names = ("ResNet-50",) if run.quick else ("ResNet-50", "ResNet-18")
    for name in ("SmallCNN",) if run.rehearsal else names:
        torch.manual_seed(run.seed)
        model, shape = deepcopy(network(name).model).to(run.device), network(name).x.shape[1:]
        n = 3 if run.rehearsal else 1024
        x, y = torch.rand(n, *shape).to(run.device), torch.randint(10, (n,)).to(run.device)
        if _right(run, name, model, x[: 2 if run.rehearsal else 8], y[: 2 if run.rehearsal else 8]):
            _end_to_end(run, name, model, x, y)
        else:
            run.add(name, note="not timed: a check failed", main=True)
