"""Runs on a Ray cluster of this machine, each in a process of its own: python ray_runs.py RUN DIR.

DIR/data holds Parquet files; scores go to DIR/scores. Every sample that is scored leaves a line in
DIR/log-N/PID, where N counts the runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# No telemetry, no token in the home folder. Read when ray is imported.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent))

from examples.ray_score import score
from fastfi.ray import Scorer

ROWS = 16  # of a block
CLASSES = 5


def make_model() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).double()


def write_data(folder: Path, files: int, rows: int) -> None:
    """Float64 images [1, 6, 6], ids that are no positions; some labels are null or wrong, and some
    pixels NaN."""
    rng = np.random.default_rng(11)
    n = files * rows
    ids = rng.permutation(10 * n)[:n] + 2**53  # beyond what float64 resolves
    label = rng.integers(0, CLASSES, n)
    x = rng.normal(size=(n, 1, 6, 6))
    label[5::40] = CLASSES
    x[9::40, 0, 3, 3] = np.nan
    missing = np.zeros(n, bool)
    missing[17::40] = True
    folder.mkdir()
    for i in range(files):
        part = slice(i * rows, (i + 1) * rows)
        columns = {
            "id": pa.array(ids[part]),
            "label": pa.array(label[part], mask=missing[part]),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(x[part]),
        }
        pq.write_table(pa.table(columns), folder / f"{i}.parquet")


def logging(log: Path, seconds: float) -> Callable[[Any], Tensor]:
    """A transform that takes its time and leaves a trace; it is defined in here so that Ray sends
    it whole."""

    def transform(x: Any) -> Tensor:
        with (log / str(os.getpid())).open("a") as file:
            file.write(f"{x[0, 0, 0]!r}\n")
        time.sleep(seconds)
        return torch.tensor(np.array(x))

    return transform


def lines(log: Path) -> dict[int, int]:
    """How many samples each process has scored."""
    return {int(f.name): len(f.read_text().splitlines()) for f in log.iterdir()}


def when(ready: Callable[[], bool], act: Callable[[], None]) -> None:
    """Does something in the background as soon as a condition holds."""

    def wait() -> None:
        while not ready():
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()


def start(cpus: int) -> None:
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=80 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False


def new_log(folder: Path) -> Path:
    """Workers outlive a driver that was killed for a moment: each run has a log of its own."""
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    log.mkdir()
    return log


def killed(folder: Path) -> None:
    """Two workers, of which one is killed; then twice again over what is there."""
    out = folder / "scores"

    def run(log: Path, seconds: float) -> None:
        data = ray.data.read_parquet(str(folder / "data"))
        options = {"transform": logging(log, seconds)}
        score(data, out, make_model, None, options, batch=8, rows=ROWS)

    def kill() -> None:
        os.kill(max(lines(log)), signal.SIGKILL)
        (folder / "killed").write_text(str(sum(lines(log).values())))

    start(2)
    log = new_log(folder)
    when(lambda: sum(n > 4 for n in lines(log).values()) == 2, kill)
    run(log, 0.05)
    files = sorted(out.glob("*.parquet"))
    files[0].unlink()
    os.truncate(files[1], 300)
    for _ in range(2):
        run(new_log(folder), 0.0)


def checkpointed(folder: Path) -> None:
    """With Ray's own checkpoints; the first run kills itself when two blocks are written."""
    from ray.data.checkpoint import CheckpointConfig

    checkpoint = folder / "checkpoint"
    first = not checkpoint.exists()
    start(3)  # one is for the actor that leaves out what the checkpoints have
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(checkpoint), delete_checkpoint_on_success=False
    )
    if first:

        def written() -> bool:
            names = [f.name for f in checkpoint.glob("*.parquet")]
            return sum(not n.endswith(".pending.parquet") for n in names) >= 2

        when(written, lambda: os.kill(os.getpid(), signal.SIGKILL))
    scores = (
        ray.data.read_parquet(str(folder / "data"))
        .repartition(target_num_rows_per_block=ROWS)
        .map_batches(
            Scorer,
            fn_constructor_args=(make_model,),
            fn_constructor_kwargs={"transform": logging(new_log(folder), 0.05 if first else 0.0)},
            batch_size=8,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )
    )
    scores.write_parquet(str(folder / "scores"))


if __name__ == "__main__":
    {"killed": killed, "checkpointed": checkpointed}[sys.argv[1]](Path(sys.argv[2]))
