"""Parts of ``bench.gpu`` one by one, with as much of torch.cuda pretended as they need."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastfi
from bench import gpu
from bench.baselines import forward_backward
from bench.gpu_clock import Clock, peak_bytes, precision, tf32_state
from bench.gpu_network import naive_influence, synchronisations
from bench.gpu_report import Report
from bench.gpu_rows import WAYS
from bench.workloads import network
from examples import naive

pytestmark = pytest.mark.usefixtures("one_thread")


class PretendedEvent:
    """torch.cuda.Event on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: PretendedEvent) -> float:
        return 1e3 * (end.at - self.at)


class PretendedGraph:
    replays = 0

    def replay(self) -> None:
        PretendedGraph.replays += 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of torch.cuda as the lines for a GPU need, on the CPU: they run, and mean nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": PretendedEvent,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(),
        "CUDAGraph": PretendedGraph,
        "graph": lambda g: nullcontext(),
        "memory_allocated": lambda: 100,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 350,
        "current_device": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "get_device_properties": lambda index: SimpleNamespace(
            name="A GPU", major=9, minor=0, multi_processor_count=3, L2_cache_size=1 << 20,
            total_memory=1 << 30,
        ),
    }  # fmt: skip
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, fake)
    assert "L2_cache_size" in Path(torch._C.__file__).with_name("_C").joinpath(
        "__init__.pyi").read_text()  # fmt: skip


def test_a_pretended_clock(pretended: None) -> None:
    clock = Clock("cuda", budget=0.05)
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(i)
        time.sleep(2e-3)

    timing = clock.time(call, sets=3)
    assert 2e-3 <= timing.low <= timing.median <= timing.high < 1.0
    assert timing.count >= 5 and set(seen) == {0, 1, 2}
    assert seen[-timing.count :] == [i % 3 for i in range(timing.count)]
    work, yardstick, ratio = clock.turns(lambda: time.sleep(4e-3), lambda: time.sleep(1e-3))
    assert work.median > yardstick.median and 1.2 < ratio < 20
    assert peak_bytes("cuda", lambda: None) == 250
    places = synchronisations(lambda: warnings.warn("called a synchronizing CUDA operation",
                                                    UserWarning, stacklevel=1))  # fmt: skip
    assert len(places) == 1 and next(iter(places)).split(":")[0].endswith("test_bench_gpu_lines.py")


def test_a_pretended_graph(pretended: None) -> None:
    """Everything is captured once, and a call replays it on a copy of the input."""
    q = network("SmallCNN")
    way = next(w for w in WAYS if w.graph)
    before = PretendedGraph.replays
    call = way.call(q.model, q.x[:2])
    assert torch.equal(call(), WAYS[0].passes(q.model, q.x[:2]))
    assert torch.equal(call(), WAYS[0].passes(q.model, q.x[:2]))
    assert PretendedGraph.replays == before + 2


def test_a_pretended_environment(pretended: None) -> None:
    report = Report()
    options = {"device": "cuda", "rehearse": False, "quick": True, "seed": 5}
    gpu.run_section("environment", report, options, 30.0)
    assert report.failures == []
    found = report.facts["environment"]
    assert (found["gpu"], found["capability"], found["multiprocessors"]) == ("A GPU", "9.0", 3)
    kernels = fastfi.backends()
    for row in report.all_rows():
        kernel = kernels[row.name.removeprefix("kernel of ")]["cuda"]
        assert row.note == kernel and row.met is not kernel.startswith("torch")


def test_every_way_gives_the_same_rows() -> None:
    q = network("SmallCNN")
    x = q.x[:3]
    (want,) = forward_backward(q.model, x)
    with torch.no_grad():
        order = q.model(x).argsort(1, descending=True)
    for way in WAYS:
        with way.settings():
            got = way.passes(*way.prepared(q.model, x), order)
        error = float((got.float() - want).norm() / want.norm())
        if way.bf16:  # kinks that are crossed: epsilon, 2^-8, says little
            assert 2.0**-9 < error < 0.5
        else:
            assert error < 1e-5, way.name
    assert torch.equal(WAYS[0].passes(q.model, x), want)


def test_precision_is_restored() -> None:
    before = tf32_state()
    with precision(tf32=True):
        inside = tf32_state()
        with precision(tf32=False):
            assert set(tf32_state().values()) <= {"ieee", "False"}
        assert tf32_state() == inside
        assert set(inside.values()) <= {"tf32", "True"}
    assert tf32_state() == before


def test_the_naive_way_is_the_examples() -> None:
    q = network("SmallCNN")
    want = naive.naive_influence(q.model, q.x[:3], q.y[:3])
    assert torch.equal(naive_influence(q.model, q.x[:3], q.y[:3]), want)
