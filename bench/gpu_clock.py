"""Time and memory on a device, and the switches that change what float32 means there.

On a GPU, times come from CUDA events around each call, after calls that are not timed; on a CPU, in
a rehearsal, from the wall clock. Inputs rotate among several sets, so that no call finds its own in
the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["Clock", "Timing", "peak_bytes", "precision", "sets_for", "tf32_state"]

T = TypeVar("T")

_SLOW = 3.0  # seconds after which a measurement ends with fewer calls than it asked for
_AHEAD = 40_000_000  # cycles, 20 ms: what launching all of a measurement's calls takes


class Timing(NamedTuple):
    """Seconds of one call: the median, and the 20 and 80 % quantiles of so many."""

    median: float
    low: float
    high: float
    count: int

    @property
    def ms(self) -> float:
        return 1e3 * self.median


def _timing(seconds: Sequence[float]) -> Timing:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered))


class Clock:
    """Times calls on a device.

    Args:
        device: "cuda" or "cpu".
        budget: seconds that one measurement should take, apart from warming up.
        most: calls timed at most.
    """

    def __init__(self, device: str, budget: float = 0.5, most: int = 60) -> None:
        self.cuda = device == "cuda"
        self.budget, self.most = budget, most

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def _warm(self, call: Callable[[int], object], sets: int) -> float:
        """Calls every set, fast ones once more, and returns the seconds of the last call."""
        seconds = 0.0
        for i in range(1 + max(2, sets)):
            self.wait()
            start = time.perf_counter()
            call(i % sets)
            self.wait()
            seconds = time.perf_counter() - start
            if i > 0 and seconds > 0.5:  # the first call may have compiled
                break
        return seconds

    def _count(self, seconds: float, least: int) -> int:
        slow = max(1, round(_SLOW / max(seconds, 1e-7)))
        return max(min(least, slow), min(self.most, round(self.budget / max(seconds, 1e-7))))

    def time(self, call: Callable[[int], object], sets: int = 1, least: int = 5) -> Timing:
        """Of ``call(i)``, i going round 0 .. sets - 1; the device's own time on a GPU."""
        count = self._count(self._warm(call, sets), least)
        if not self.cuda:
            return self.wall(lambda: call(0), least=min(least, 2), warm=False)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        # The host gets ahead: a call that is shorter on the device than its launch is on the host
        # would otherwise be timed as the latter.
        torch.cuda._sleep(_AHEAD)
        for i, (start, end) in enumerate(events):
            start.record()
            call(i % sets)
            end.record()
        self.wait()
        return _timing([1e-3 * start.elapsed_time(end) for start, end in events])

    def wall(self, call: Callable[[], object], least: int = 3, warm: bool = True) -> Timing:
        """Of ``call()`` from beginning to end, waiting for the device: what a user waits for."""
        count = least
        if warm:
            count = self._count(self._warm(lambda _: call(), 1), least)
        seconds = []
        for _ in range(count):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return _timing(seconds)

    def turns(
        self, work: Callable[[], object], yardstick: Callable[[], object], least: int = 5
    ) -> tuple[Timing, Timing, float]:
        """Wall times of both, taken in turn, and the median of work / yardstick."""
        each = self._warm(lambda _: (work(), yardstick()), 1)
        pairs = []
        for _ in range(self._count(each, least)):
            a = self.wall(work, least=1, warm=False)
            pairs.append((a.median, self.wall(yardstick, least=1, warm=False).median))
        ratio = statistics.median(a / b for a, b in pairs)
        return _timing([a for a, _ in pairs]), _timing([b for _, b in pairs]), ratio


def sets_for(make: Callable[[], T], bytes_each: int, cache: int, most: int = 64) -> list[T]:
    """So many inputs that together they are four times the cache; one where a single one is ten
    times as large and would take gigabytes again."""
    if bytes_each > max(10 * cache, 2 << 30):
        return [make()]
    return [make() for _ in range(max(2, min(most, -(-4 * cache // max(1, bytes_each)))))]


def peak_bytes(device: str, call: Callable[[], object]) -> int | None:
    """What a call allocates at most, beyond what is held before it; None on a CPU."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _switches() -> list[tuple[Any, str, tuple[Any, Any]]]:
    """(object, attribute, (value of IEEE, value of TF32)): two names of one thing, by version."""
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9; reading the old names fails from then on
        values = ("ieee", "tf32")
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        return [(cuda, "fp32_precision", values), (cudnn, "fp32_precision", values)]
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    return [(owner, "allow_tf32", (False, True)) for owner in owners]


def tf32_state() -> dict[str, str]:
    """What float32 products and convolutions are computed in, as torch was found."""
    names = ("matmul", "convolution")
    pairs = zip(names, _switches(), strict=True)
    return {name: str(getattr(owner, attribute)) for name, (owner, attribute, _) in pairs}


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Float32 products and convolutions in TF32, or in IEEE float32, while it lasts."""
    switches = _switches()
    before = [getattr(owner, attribute) for owner, attribute, _ in switches]
    for owner, attribute, values in switches:
        setattr(owner, attribute, values[tf32])
    try:
        yield
    finally:
        for (owner, attribute, _), value in zip(switches, before, strict=True):
            setattr(owner, attribute, value)
