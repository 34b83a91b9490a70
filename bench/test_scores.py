"""``fastfi.score`` against a bare loop that calls ``influence``, and its memory over a data set.

python -m bench.report -k test_scores
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader, TensorDataset

import fastfi
from bench.memory import in_fresh_process
from bench.race import Side, memory, race
from examples.models import SmallCNN

IMAGES = 4096
BATCH = 256
SECTION = f"SmallCNN, 28 x 28 x 1, {IMAGES:,} images"


@pytest.mark.parametrize("batch_size", [BATCH, "auto"])
def test_overhead(benchmark: BenchmarkFixture, tmp_path: Path, batch_size: int | str) -> None:
    torch.manual_seed(0)
    model = SmallCNN().eval()
    data = TensorDataset(torch.rand(IMAGES, 1, 28, 28), torch.randint(0, 10, (IMAGES,)))
    folders = (tmp_path / f"scores{i}" for i in itertools.count())

    def bare() -> None:
        for x, y in DataLoader(data, batch_size=BATCH):
            fastfi.influence(model, x, y, full_output=True)

    def scored() -> None:
        fastfi.score(model, data, out=next(folders), batch_size=batch_size, progress=False)  # type: ignore[arg-type]

    race(
        benchmark,
        Side(f"fastfi.score, batch_size={batch_size}", scored, IMAGES),
        Side(f"DataLoader and influence, batches of {BATCH}", bare, IMAGES),
        section=SECTION,
        rounds=7,
        target=1.05,
    )


def test_memory_over_a_data_set(benchmark: BenchmarkFixture) -> None:
    memory(
        benchmark,
        lambda: in_fresh_process("bench.score_memory"),
        work="fastfi.score: the last tenth of {images:,} images",
        yardstick="the first tenth",
        section="resident memory, SmallCNN, 28 x 28 x 1",
        target=1.05,
    )
