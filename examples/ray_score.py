"""Scores a data set on a cluster with Ray Data: ``python -m examples.ray_score``.

Without options it writes scikit-learn's digits to Parquet, trains a small network on them and
scores them with two workers on this machine. Called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data.expressions import col
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import fastfi
from examples.models import DigitsNet
from examples.tables import number
from examples.training import fit
from fastfi.ray import Scorer

__all__ = ["finished", "main", "score"]

ROWS = 300  # of each Parquet file of digits


def write_digits(folder: Path, weights: Path) -> None:
    """Parquet files of the 1,797 digits (id, label, image [1, 8, 8]), and a network for them."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target, dtype=torch.int64)
    if not weights.exists():
        torch.manual_seed(0)
        model = DigitsNet()
        fit(model, x, y, epochs=12, batch=64, rate=5e-3)
        save_file(model.state_dict(), weights)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(x), ROWS):
        part = slice(start, start + ROWS)
        columns = {
            "id": pa.array(range(len(x))[part]),
            "label": pa.array(y[part].numpy()),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(x[part].numpy()),
        }
        pq.write_table(pa.table(columns), folder / f"digits-{start:04}.parquet")


def read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A folder of Parquet files, or of images, as a Ray data set; and how to score it."""
    if any(folder.glob("*.parquet")):
        data = ray.data.read_parquet(str(folder))
        labelled = "label" in data.schema().names
        return data, {"y": "label" if labelled else "predicted"}
    images = ray.data.read_images(str(folder), include_paths=True)
    return images, {"id": "path", "layout": "HWC", "y": "predicted"}


def finished(out: Path) -> set[Any]:
    """Ids that earlier runs have written. Files that a killed run left unfinished are removed."""
    ids: set[Any] = set()
    for file in out.glob("*.parquet"):
        try:
            ids.update(pq.read_table(file, columns=["id"]).column("id").to_pylist())
        except pa.ArrowInvalid:  # it has no footer
            file.unlink()
    return ids


def score(
    data: Any,
    out: Path,
    factory: Callable[[], torch.nn.Module],
    weights: Path | None,
    options: dict[str, Any],
    *,
    workers: int = 2,
    cpus: float = 0.5,
    gpus: float = 0.0,
    batch: int = 64,
    rows: int = 256,
) -> None:
    """Scores what is not in ``out`` yet, and writes Parquet files there.

    Args:
        data: a Ray data set.
        out: a folder; it may hold scores of the same data.
        factory: makes the model.
        weights: a file that every machine sees, or None for those that the factory made.
        options: of :class:`fastfi.ray.Scorer`.
        workers: actors with a copy of the model each.
        cpus, gpus: what each of them occupies. All together must leave CPUs for reading and
            writing: two actors with a CPU each, on a machine with two, wait for ever.
        batch: samples scored at once.
        rows: samples that one worker scores and that are then written to a file. Ray would cut by
            bytes, which makes a single piece of a small data set.
    """
    done = finished(out)
    if done:
        data = data.filter(expr=col(options.get("id", "id")).not_in(list(done)))
    scores = data.repartition(target_num_rows_per_block=rows).map_batches(
        Scorer,
        fn_constructor_args=(factory, weights),
        fn_constructor_kwargs=options,
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    scores.write_parquet(str(out))


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of Parquet files, or of images")
    parser.add_argument("--model", default="examples.models:DigitsNet", help="package.module:name")
    parser.add_argument("--weights", type=Path, help="safetensors file or state dict")
    parser.add_argument("--out", type=Path, default=Path("ray-output"), help="folder for the files")
    parser.add_argument("--address", help="of a Ray cluster; without it, Ray runs here alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=0.5, help="CPUs of each worker")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each worker")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256, help="samples in each file of scores")
    given = parser.parse_args()
    if given.data is not None and given.weights is None:
        parser.error("--data needs --weights of a network for it")

    out = given.out.absolute() / "scores"  # Ray's processes have folders of their own
    out.mkdir(parents=True, exist_ok=True)
    folder = (given.data or given.out / "digits").absolute()
    weights = (given.weights or given.out / "digits.safetensors").absolute()
    if given.data is None:
        write_digits(folder, weights)
    module, _, name = given.model.partition(":")
    factory = getattr(importlib.import_module(module), name)

    here = {"include_dashboard": False} if given.address is None else {}
    ray.init(given.address, **here)
    data, options = read(folder)
    names = ("workers", "cpus", "gpus", "batch", "rows")
    score(data, out, factory, weights, options, **{name: getattr(given, name) for name in names})
    ray.shutdown()

    scores = fastfi.open_scores(out)
    print(f"{len(scores)} samples in {out}, {scores.errors} of them without a score")
    for percent, value in scores.percentiles().items():
        print(f"  FI, {percent}th percentile: {number(value)}")


if __name__ == "__main__":
    main()
