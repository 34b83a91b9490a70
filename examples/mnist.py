"""Trains a small CNN on MNIST and scores all 70,000 images.

Run ``python -m examples.mnist --data ../shared/data/mnist --out mnist-output``. The folder holds
the four IDX files, plain or gzip. Training takes a few minutes on two cores, scoring about one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastfi
from examples.models import SmallCNN
from examples.plots import Panel, gallery, manhattan
from examples.tables import number, percentiles, save_scores
from examples.training import batches, fit, predict
from fastfi.data import open_dataset

__all__ = ["main", "network", "read", "score"]

BATCH = 256
SETS = {"train": "training", "test": "test"}
AXES = {1: "true class", 3: "predicted class"}
NAMES = {1: "Setup 1, true label", 3: "Setup 3, predicted label"}


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """One split in memory: x [N, 1, 28, 28] float32 in 0..1, y [N] int64."""
    x, y = [], []
    for batch in open_dataset(folder, split).batches(4096):
        if batch.y is None:
            raise SystemExit(f"{folder}: the {split} images have no labels")
        x.append(batch.x)
        y.append(batch.y)
    return torch.cat(x), torch.cat(y)


def score(model: SmallCNN, data: Iterator[tuple[Tensor, Tensor]], setup: int) -> fastfi.Influence:
    """Exact FI of every image under perturbations of the input, batch by batch."""
    parts = [
        fastfi.influence(model, x, y if setup == 1 else None, full_output=True, dtype=torch.float64)
        for x, y in data
    ]
    fi, rank, label, log_prob = (
        torch.cat([getattr(part, field) for part in parts])
        for field in ("fi", "rank", "label", "log_prob")
    )
    return fastfi.Influence(fi, rank, label, log_prob, parts[0].names)


def network(x: Tensor, y: Tensor, weights: Path | None, out: Path, epochs: int) -> SmallCNN:
    """SmallCNN in eval mode with the given weights, or trained on x, y and saved in ``out``."""
    model = SmallCNN().eval()
    if weights:
        model.load_state_dict(load_file(weights))
        return model
    print(f"Training SmallCNN on {len(y):,} images")
    start = time.perf_counter()
    fit(model, x, y, epochs=epochs, batch=128, rate=3e-3)
    print(f"  {time.perf_counter() - start:.0f} s")
    save_file(model.state_dict(), out / "smallcnn.safetensors")
    print(f"  saved {out / 'smallcnn.safetensors'}")
    return model


def main() -> None:
    """Trains (or loads) the network, scores both sets, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument(
        "--out", type=Path, default=Path("mnist-output"), help="folder for the files"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--weights", type=Path, help="use these weights and train nothing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    data = {split: read(options.data, split) for split in SETS}
    model = network(*data["train"], options.weights, options.out, options.epochs)

    predicted = {split: predict(model, x.split(1024)) for split, (x, _) in data.items()}
    wrong = {split: predicted[split] != y for split, (_, y) in data.items()}
    for split, flags in wrong.items():
        print(f"{SETS[split]} accuracy {100 * (1 - flags.double().mean()):.2f} %")

    results: dict[int, dict[str, fastfi.Influence]] = {}
    print(f"\nExact FI in batches of {BATCH}, {torch.get_num_threads()} threads")
    for setup, name in NAMES.items():
        start = time.perf_counter()
        results[setup] = {
            split: score(model, batches(x, y, BATCH), setup) for split, (x, y) in data.items()
        }
        seconds = time.perf_counter() - start
        count = sum(len(y) for _, y in data.values())
        print(f"  {name}: {count:,} images in {seconds:.1f} s, {count / seconds:,.0f} per second")
    table = {
        f"{NAMES[setup]}, {SETS[split]}": result.fi.numpy()
        for setup, both in results.items()
        for split, result in both.items()
    }
    print("\n" + percentiles(table) + "\n")
    ranks = torch.cat([r.rank for r in results[1].values()])
    print(f"{int((ranks == 9).sum()):,} of {len(ranks):,} images have full rank (9)\n")

    classes = [str(k) for k in range(10)]
    panels = [
        [
            Panel(
                f"{NAMES[setup]}: {SETS[split]} set, {len(result.fi):,} images",
                result.fi.numpy(),
                result.label.numpy(),
                wrong[split].numpy(),
                AXES[setup],
            )
            for split, result in both.items()
        ]
        for setup, both in results.items()
    ]
    title = "MNIST: how much each image's classification can be moved by its pixels"
    manhattan(options.out / "manhattan.png", panels, classes, title)

    for split, (x, y) in data.items():
        fi = results[1][split].fi.numpy()
        top = np.argsort(-fi)[:5].tolist()
        captions = [
            f"{split} {i}\nlabel {y[i]}, predicted {predicted[split][i]}\nFI = {number(fi[i])}"
            for i in top
        ]
        title = f"The five most influential {SETS[split]} images"
        gallery(options.out / f"top-{split}.png", x[top, 0].numpy(), captions, title)
        print(f"{title} (Setup 1)\n\n| image | label | predicted |       FI |")
        print("|------:|------:|----------:|---------:|")
        for i in top:
            print(f"| {i:>5} | {y[i]:>5} | {predicted[split][i]:>9} | {number(fi[i]):>8} |")
        print()

    columns = {
        "id": np.concatenate([np.arange(len(y)) for _, y in data.values()]),
        "set": np.repeat(list(SETS.values()), [len(y) for _, y in data.values()]),
        "label": torch.cat([y for _, y in data.values()]).numpy(),
        "predicted": torch.cat(list(predicted.values())).numpy(),
        "fi_true": torch.cat([r.fi for r in results[1].values()]).numpy(),
        "fi_predicted": torch.cat([r.fi for r in results[3].values()]).numpy(),
        "rank": ranks.numpy(),
    }
    paths = save_scores(options.out, columns)
    print("Wrote " + ", ".join(map(str, paths)) + f" and pictures in {options.out}")


if __name__ == "__main__":
    main()
