"""Times of the operators on single tensors, beside the least bytes that they must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_clock import Clock, Timing, sets_for
from bench.gpu_machine import cache_bytes, copy_bandwidth
from bench.gpu_problems import many_problems, norms_of, window_rows
from bench.gpu_report import Run
from bench.models import resnet50

__all__ = ["floored", "times"]

SCALES = (1, 3, 5, 7)
ROWS = 9
PIXELS = 3 * 32 * 32


def floored(
    run: Run,
    name: str,
    timing: Timing,
    moved: int,
    target: str = "",
    met: Callable[[float, float], bool] | None = None,
    **rest: Any,
) -> None:
    """A row: milliseconds, and the share of the copy bandwidth that is reached.

    Args:
        moved: the bytes of all inputs and outputs, each once.
        met: whether the target is reached, from milliseconds and the floor's milliseconds.
    """
    floor = 1e3 * moved / copy_bandwidth(run)
    reached = None if met is None or run.rehearsal else met(timing.ms, floor)
    note = f"{timing.low * 1e3:.4g} to {timing.high * 1e3:.4g} ms of {timing.count}, {moved} bytes"
    run.add(name, timing.ms, "ms", yardstick=floor, against="floor", fraction=floor / timing.ms,
            target=target, met=reached, note=note, **rest)  # fmt: skip


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def _gram(run: Run, clock: Clock) -> None:
    plans = [(16384, 9, PIXELS, torch.float32, "80 % of copy"),
             (16384, 9, PIXELS, torch.bfloat16, ""), (16384, 9, PIXELS, torch.float64, ""),
             (16384, 9, 784, torch.float32, ""), (512, 9, 150_528, torch.float32, ""),
             (256, 99, PIXELS, torch.float32, ""), (64, 9, PIXELS, torch.float32, "")]  # fmt: skip
    for batch, n, p, dtype, target in plans[:2] if run.quick else plans:
        with run.guard("gram"):
            batch = 4 if run.rehearsal else batch
            size = torch.tensor([], dtype=dtype).element_size() * batch * n * p
            sets = sets_for(
                lambda b=batch, n=n, p=p, t=dtype: torch.randn(b, n, p, device=run.device).to(t),
                size,
                cache_bytes(run),
            )
            timing = clock.time(lambda i, s=sets: torch.ops.fastfi.gram(s[i]), len(sets))
            moved = size + 8 * batch * n * n
            name = f"gram [{batch}, {n}, {p}] {str(dtype)[6:]}"
            met = (lambda ms, floor: floor / ms >= 0.8) if target else None
            main = bool(target) or n == 99 or dtype == torch.bfloat16
            floored(run, name, timing, moved, target, met, main=main)
            del sets


def _segments(run: Run, clock: Clock) -> None:
    """196 patches of 16 x 16 pixels in 3 channels, which lie together."""
    batch, p, groups = (2 if run.rehearsal else 64), 150_528, 196
    offsets = torch.arange(groups + 1, device=run.device)[None] * (p // groups)
    sets = sets_for(
        lambda: torch.randn(batch, ROWS, p, device=run.device),
        4 * batch * ROWS * p,
        cache_bytes(run),
    )
    timing = clock.time(lambda i: torch.ops.fastfi.segment_gram(sets[i], offsets), len(sets))
    moved = sets[0].nbytes + 8 * batch * groups * ROWS * ROWS
    floored(run, f"segment_gram [{batch}, {ROWS}, {p}], {groups} segments", timing, moved)


def _solves(run: Run, clock: Clock) -> None:
    """10 million problems of 10 contrasts, of full rank and of rank 5."""
    count = 200 if run.rehearsal else 10_000_000
    goals: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "exact": ("30 ms", lambda ms, floor: ms <= 30),
        "truncated": ("100 ms", lambda ms, floor: ms <= 100),
        "damped": ("3 x floor", lambda ms, floor: ms <= 3 * floor),
    }
    plans = [(11, 13, "full rank"), (11, 5, "rank 5"), (10, 12, "9 x 9, full rank")]
    for classes, width, title in plans[:2] if run.quick else plans:
        q = many_problems(count, classes, width, run.device, run.seed)
        assert q.label is not None
        inputs = _bytes(q.gram, q.log_prob, q.label)
        for rule, (target, met) in goals.items():
            op = f"solve_{rule}"
            with run.guard(op):
                if not run.is_right(op):
                    continue
                last = {"exact": 1e-9, "truncated": 1e-3, "damped": q.tau}[rule]
                function = getattr(torch.ops.fastfi, op)

                def call(_: int, f: Any = function, q: Any = q, last: Any = last) -> object:
                    return f(q.gram, q.log_prob, q.label, None, last)

                timing = clock.time(call, 1, least=3)
                moved = inputs + count * (16 if rule != "damped" else 8 + 8)
                wanted = classes == 11
                floored(run, f"{op}, {count:,} of {title}", timing, moved, target if wanted else "",
                        met if wanted else None, main=wanted)  # fmt: skip
        del q


def _windows(run: Run, clock: Clock) -> None:
    """Maps of 10,000 CIFAR-sized images, rows given, 2,500 at a time."""
    images, chunk, side = (4, 2, 8) if run.rehearsal else (10_000, 2_500, 32)
    g = torch.Generator(run.device).manual_seed(run.seed)
    rows, q = window_rows((images, 3, side, side), 10, "label", torch.float32, g)
    assert q.label is not None
    parts = [slice(first, first + chunk) for first in range(0, images, chunk)]
    plans = [
        (c, r) for c in ("separate", "joint", "mean") for r in ("damped", "exact", "truncated")
    ]
    for channels, rule in plans[:3] if run.quick else plans:
        with run.guard(f"window_influence, {channels}, {rule}"):
            parameter = {"exact": 32 * 2.0**-23, "truncated": 1e-3, "damped": 0.0}[rule]

            def maps(at: slice, c: str = channels, r: str = rule, p: float = parameter) -> Tensor:
                tau = q.tau[at] if r == "damped" else None
                label = q.label[at] if q.label is not None else None
                arguments = (rows[at], q.log_prob[at], label, None, SCALES, c, r, p, tau, False)
                return torch.ops.fastfi.window_influence(*arguments)[0]

            timing = clock.time(lambda _, maps=maps: [maps(at) for at in parts], 1, least=2)
            outputs = maps(parts[0]).nbytes * len(parts)
            name = f"windows, {images:,} images, {channels}, {rule}"
            if rule == "damped":
                floored(run, name, timing, rows.nbytes + outputs, "3 x floor, 1 s",
                        lambda ms, floor: ms <= min(3 * floor, 1000), main=True)  # fmt: skip
            else:
                floored(run, name, timing, rows.nbytes + outputs, "1 s",
                        lambda ms, floor: ms <= 1000, main=channels == "separate")  # fmt: skip


def _sums(run: Run, clock: Clock) -> None:
    """All BatchNorm layers of ResNet-50 in one call, 32 x 32 images."""
    batch = 2 if run.rehearsal else 256
    norms = norms_of(resnet50())

    def make() -> tuple[list[Tensor], list[Tensor]]:
        d, factor = (
            [torch.randn(batch, c, t, device=run.device) for c, t in norms] for _ in range(2)
        )
        return d, factor

    size = 2 * 4 * batch * sum(c * t for c, t in norms)
    sets = sets_for(make, size, cache_bytes(run), most=3)
    timing = clock.time(lambda i: torch.ops.fastfi.channel_sums(*sets[i]), len(sets))
    moved = size + 2 * 4 * batch * sum(c for c, _ in norms)
    floored(run, f"channel_sums, {len(norms)} norms, B = {batch}", timing, moved, main=True)


ITEMS: Sequence[tuple[str, Callable[[Run, Clock], None]]] = [
    ("gram", _gram),
    ("", _solves),  # looks at each of the three
    ("window_influence", _windows),
    ("segment_gram", _segments),
    ("channel_sums", _sums),
]


def times(run: Run) -> None:
    """Gram matrices, solves, windows, sums."""
    clock = Clock(run.device, budget=0.05 if run.rehearsal else 0.4)
    for op, measure in ITEMS:
        if op and not run.is_right(op):
            continue
        with run.guard(op or "solves"), torch.no_grad():
            measure(run, clock)
        if run.device == "cuda":
            torch.cuda.empty_cache()
