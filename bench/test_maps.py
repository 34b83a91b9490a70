"""``window_influence``, the operator under ``fastfi.influence_map``, against the rows it needs and
against ``bench.map_baselines``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import map_baselines as baselines
from bench.map_problems import (
    PROBLEMS,
    RULES,
    SCALES,
    MapProblem,
    map_network,
    network_problem,
    rows_of,
    solve_maps,
)
from bench.memory import AVAILABLE, in_fresh_process
from bench.race import AT_LEAST, AT_MOST, Side, memory, race

EVERY_RULE = pytest.mark.parametrize("rule", RULES)
HEADS = {"": False, ", confident": True}

# Networks: image, the batch at which rows cost least per sample, rounds, target over the rows.
AGAINST_ROWS = {
    "SmallCNN": ("28 x 28 x 1", 64, 9, None),
    "ResNet-18": ("32 x 32 x 3", 32, 7, 0.15),
    "ResNet-18, small stem": ("32 x 32 x 3", 8, 5, 0.15),
}

EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)

WINDOWS = 60  # that the loop gets
EIGH_NUMBERS = 3_000_000  # of the Gram matrices that eigh gets in one round, about


def section(name: str, q: MapProblem) -> str:
    """The name, with the number of classes that lumping left."""
    return f"maps, {name}" + (f" to {q.log_prob.shape[1]}" if name.endswith("lumped") else "")


def side(q: MapProblem, rule: str, items: int) -> Side:
    """All maps of a problem's samples."""
    return Side(f"window_influence, {rule}", lambda: solve_maps(q, rule), items)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", AGAINST_ROWS)
@EVERY_RULE
def test_against_rows(benchmark: BenchmarkFixture, rule: str, name: str, head: str) -> None:
    image, batch, rounds, target = AGAINST_ROWS[name]
    model, x = map_network(name, HEADS[head], batch)
    q = network_problem(name, HEADS[head], batch)
    title = f"the rows: forward + 9 backward passes, batch of {batch}"
    yardstick = Side(title, lambda: rows_of(model, x), batch)
    race(
        benchmark,
        side(q, rule, batch),
        yardstick,
        section=f"maps, {image}, {name}{head}",
        rounds=rounds,
        kind=AT_MOST,
        target=target,
    )


@EVERY_PROBLEM
@EVERY_RULE
def test_against_svd_loop(benchmark: BenchmarkFixture, rule: str, name: str) -> None:
    q = PROBLEMS[name]()
    start, places = baselines.prepare(q, rule), baselines.windows_of(q, WINDOWS)
    yardstick = Side(
        f"numpy, two SVDs per window, {WINDOWS} windows",
        lambda: baselines.svd_loop(start, places),
        WINDOWS,
    )
    race(
        benchmark,
        side(q, rule, q.windows),
        yardstick,
        section=f"{section(name, q)}, per window",
        rounds=5 if q.windows < 100_000 else 3,
        kind=AT_LEAST,
        target=100.0,
    )


@EVERY_PROBLEM
@EVERY_RULE
def test_against_eigh(benchmark: BenchmarkFixture, rule: str, name: str) -> None:
    q = PROBLEMS[name]()
    height = q.rows.shape[3]
    numbers = q.windows * q.log_prob.shape[1] ** 2 // height  # of one line
    lines = min(height, max(max(SCALES), EIGH_NUMBERS // numbers))
    part = q.lines(lines)
    title = "box sums of products + torch.linalg.eigh, float64"
    yardstick = Side(
        title + (f", {lines} lines" if lines < height else ""),
        lambda: baselines.eigh_maps(part, rule),
        part.windows,
    )
    race(
        benchmark,
        side(q, rule, q.windows),
        yardstick,
        section=f"{section(name, q)}, per window",
        rounds=5 if q.windows < 100_000 else 3,
        kind=AT_LEAST,
        target=20.0,
    )


@pytest.mark.skipif(not AVAILABLE, reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("method", "rule", "target"),
    [*(("window_influence", rule, 2.0) for rule in RULES), ("eigh", "damped", None)],
)
def test_memory(benchmark: BenchmarkFixture, method: str, rule: str, target: float | None) -> None:
    names = {
        "window_influence": f"window_influence, {rule}",
        "eigh": "box sums of products + torch.linalg.eigh, float64, one scale at a time",
    }
    memory(
        benchmark,
        lambda: in_fresh_process("bench.map_memory", method, rule),
        work=names[method],
        yardstick="the rows themselves",
        section="maps, 224 x 224 x 3, noise",
        target=target,
    )
