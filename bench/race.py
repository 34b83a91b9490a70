"""Ratios that survive a noisy machine: work and yardstick take turns inside one benchmark.

pytest-benchmark calls ``setup`` before every round and does not time it, so the yardstick runs and
is timed there. Each round gives one ratio; the table reports their median and quantiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["AT_LEAST", "AT_MOST", "MEMORY", "REFUSED", "Side", "memory", "race", "refused"]

AT_MOST, AT_LEAST, MEMORY, REFUSED = "at most", "at least", "memory", "refused"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: what the table calls it.
        call: the work of one round.
        items: how many samples, or problems, one call treats.
    """

    name: str
    call: Callable[[], object]
    items: int


def race(
    benchmark: BenchmarkFixture,
    work: Side,
    yardstick: Side,
    *,
    section: str,
    rounds: int,
    kind: str = AT_MOST,
    target: float | None = None,
) -> None:
    """Times both sides in turn and leaves the per-item seconds in ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.
        work: what is measured.
        yardstick: what it is measured against.
        section: the network or problem the table groups by.
        rounds: pairs to time, after one that is thrown away.
        kind: ``AT_MOST``: the ratio is work / yardstick and should not exceed the target.
            ``AT_LEAST``: it is yardstick / work, "times faster", and should reach it.
        target: the figure aimed at, None where there is none.
    """
    yards: list[float] = []

    def turn() -> None:
        start = time.perf_counter()
        yardstick.call()
        yards.append((time.perf_counter() - start) / yardstick.items)

    benchmark.pedantic(work.call, setup=turn, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: one untimed call
        return
    benchmark.extra_info.update(
        section=section,
        work=work.name,
        yardstick=yardstick.name,
        kind=kind,
        target=target,
        work_seconds=[seconds / work.items for seconds in benchmark.stats.stats.data],
        yardstick_seconds=yards[-rounds:],
    )


def memory(
    benchmark: BenchmarkFixture,
    child: Callable[[], dict[str, Any]],
    *,
    work: str,
    yardstick: str,
    section: str,
    target: float | None = None,
) -> None:
    """Leaves peak memory and the yardstick's bytes in ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.
        child: measures in a process of its own and returns ``peak_bytes``, ``yardstick_bytes`` and
            whatever else is worth keeping; ``seconds`` per sample, where given, enter the table.
        work: what the table calls the work; ``{name}`` stands for what the child returned.
        yardstick: what it calls the yardstick, alike.
        section: the problem the table groups by.
        target: the ratio that the peak should not exceed, None where there is none.
    """
    measured = benchmark.pedantic(child, rounds=1)
    benchmark.extra_info.update(
        section=section,
        work=work.format(**measured),
        yardstick=yardstick.format(**measured),
        kind=MEMORY,
        target=target,
        **measured,
    )


def refused(benchmark: BenchmarkFixture, *, work: str, section: str, reason: str) -> None:
    """Leaves the reason why something cannot be measured in ``benchmark.extra_info``."""
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(section=section, work=work, kind=REFUSED, reason=reason)
