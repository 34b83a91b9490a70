"""``fastfi.score``: the batch size that it finds, memory that runs out, memory that stays."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from score_runs import check_values, data, network, rows, run_child
from torch import Tensor, nn

import fastfi
from fastfi.scoring.batch_size import LARGEST, SMALLEST, BatchSize

pytestmark = pytest.mark.usefixtures("one_thread")


def tried(rate: Any, batches: int = 400) -> tuple[list[int], BatchSize]:
    """The sizes of batches that take size / rate(size) seconds."""
    sizes, found = BatchSize("auto"), []
    for _ in range(batches):
        found.append(sizes.size)
        sizes.worked(sizes.size, sizes.size / rate(sizes.size))
    return found, sizes


@pytest.mark.parametrize("best", [32, 64, 256, 1024])
def test_the_fastest_size_is_kept(best: int) -> None:
    """Sizes grow while samples per second do, and the last that paid is kept for good."""
    found, sizes = tried(lambda size: 100.0 * min(size, best))
    assert sizes.size == best
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top]) and set(found[top:]) <= {max(found), best}
    assert set(found) <= {SMALLEST << i for i in range(6)} and max(found) <= LARGEST
    assert max(found) == min(2 * best, LARGEST)


def test_a_slower_size_is_given_up() -> None:
    _, sizes = tried(lambda size: 1000.0 if size <= 64 else 500.0)
    assert sizes.size == 32  # twice the size for nothing


def test_the_first_batch_and_short_ones_do_not_count() -> None:
    sizes = BatchSize("auto")
    sizes.worked(32, 100.0)  # kernels loaded, the model measured
    for _ in range(50):
        sizes.worked(7, 10.0)
    assert sizes.size == 32
    sizes.worked(32, 1.0)
    assert sizes.size == 64


def test_a_number_stays_until_memory_runs_out() -> None:
    sizes = BatchSize(48)
    for _ in range(50):
        sizes.worked(48, 1e-3)
    assert (sizes.size, sizes.unit) == (48, 48)
    sizes.failed(48)
    assert (sizes.size, sizes.unit) == (24, 48)
    sizes.failed(3)
    assert sizes.size == 1
    automatic = BatchSize("auto")
    automatic.failed(32)
    for _ in range(50):
        automatic.worked(16, 1e-3)
    assert automatic.size == 16


class Counting(nn.Module):
    """Notes how many samples it gets; ``most`` of them fit into memory."""

    def __init__(self, most: int = 10**9, error: Any = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.inner, self.most, self.error = network(), most, error
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most or bool((x.flatten(1)[:, 0] == 7.0).any()):
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        z: Tensor = self.inner(x)
        return z


def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are scored."""
    from fastfi.scoring.scorer import BatchScorer

    found: list[int] = []
    call = BatchScorer.__call__

    def noting(self: BatchScorer, samples: Any) -> Any:
        found.append(len(samples.ids))
        return call(self, samples)

    monkeypatch.setattr(BatchScorer, "__call__", noting)
    return found


def test_auto_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that makes larger batches pay: they grow, parts still end where they should."""
    import fastfi.scoring.run as run

    x, y = data(2000)
    sizes = handed_over(monkeypatch)
    monkeypatch.setattr(run.time, "perf_counter", lambda: float(len(sizes)))  # 1 s a batch
    scores = fastfi.score(network(), (x, y), out=tmp_path / "s", part_rows=1000)
    check_values(scores, network(), x, y)
    assert sizes[:3] == [32, 32, 64] and max(sizes) >= 256 and sum(sizes) == 2000
    assert len(list((tmp_path / "s").glob("*.parquet"))) == 2


ERRORS = [torch.OutOfMemoryError, MemoryError, RuntimeError]


@pytest.mark.parametrize("error", ERRORS)
def test_a_model_that_needs_too_much(error: Any, tmp_path: Path) -> None:
    """At 11 samples: the chunks of a batch are halved until they fit; every value is right."""
    x, y = data(100)
    net = Counting(10, error).eval()
    scores = fastfi.score(net, (x, y), out=tmp_path / "s", batch_size=32)
    check_values(scores, network(), x, y)
    assert max(net.sizes) > 10


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("batch_size", [32, "auto"])
def test_a_batch_that_needs_too_much(
    error: Any, batch_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the model, as where it is copied to a GPU: halved until it fits, and then it stays
    so; rows keep their order."""
    from fastfi.scoring.scorer import BatchScorer

    evaluate = BatchScorer._evaluate

    def limited(self: BatchScorer, samples: Any, positions: Any) -> Any:
        if len(positions) > 10:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return evaluate(self, samples, positions)

    x, y = data(100)
    sizes = handed_over(monkeypatch)
    monkeypatch.setattr(BatchScorer, "_evaluate", limited)
    scores = fastfi.score(network(), (x, y), out=tmp_path / "s", batch_size=batch_size)
    check_values(scores, network(), x, y)
    assert sizes[:4] == [32, 16, 8, 8] and max(sizes[2:]) == 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_single_sample_that_does_not_fit(error: Any, tmp_path: Path) -> None:
    x, y = data(40)
    x[13, 0, 0, 0] = 7.0
    scores = fastfi.score(Counting(error=error).eval(), (x, y), out=tmp_path / "s", batch_size=16)
    good = [i for i in range(40) if i != 13]
    got = rows(scores)
    assert [i for i, e in enumerate(got["error"]) if e] == [13]
    assert got["error"][13].startswith(f"{error.__name__}: ")
    expected = fastfi.influence(network(), x[good], y[good], dtype=torch.float64)
    np.testing.assert_allclose([got["fi"][i] for i in good], expected, rtol=1e-9)


LIMITED = """
import resource, sys
import torch
from torch import nn
import fastfi
from score_runs import data, network, check_values

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.sizes = network(), []
    def forward(self, x):
        room = torch.zeros(len(x), 1 << 22)  # 16 MiB a sample
        self.sizes.append(len(x))
        return self.inner(x) + room[:, :1]

torch.set_num_threads(1)
x, y = data(200)
fastfi.influence(network(), x[:2], y[:2])
import pyarrow.parquet, rich.console
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), resource.RLIM_INFINITY))
net = Large().eval()
scores = fastfi.score(net, (x, y), out=sys.argv[1], batch_size=128, memory_budget=1 << 40)
check_values(scores, network(), x, y)
print(max(net.sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """A process that may take 600 MiB more, and a model that takes 16 MiB a sample."""
    done = run_child(LIMITED, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert 1 < int(done.stdout) <= 37


LONG = """
import sys
import torch
import fastfi
from score_runs import data, network

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

seen = []
def stream():
    x, y = data(100)
    for i in range(20_000):
        if i % 2000 == 1999:
            seen.append(resident())
        yield x[i % 100] + 1e-6 * i, y[i % 100]

torch.set_num_threads(1)
scores = fastfi.score(network(), stream(), out=sys.argv[1], batch_size=100, part_rows=1000)
assert len(scores) == 20_000 and scores.errors == 0
print(seen[-1] - seen[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """20,000 samples of 160 bytes, whose scores alone take 1 MB: less than 8 MiB between the
    second tenth, when all is loaded, and the last."""
    done = run_child(LONG, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20
