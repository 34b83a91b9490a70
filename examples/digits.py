"""The demo: train on scikit-learn's digits, score every image, plot, compare with naive autograd.

Run ``python -m examples.digits --out demo-output``; it takes well under a minute and needs no
download.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import fastfi
from examples.models import DigitsNet
from examples.naive import naive_influence
from examples.plots import Panel, gallery, manhattan
from examples.tables import number, percentiles, save_scores
from examples.training import fit

__all__ = ["main"]

TRAINING = 1297  # of 1,797 images, chosen at random; the other 500 are the test set
SUBSET = 100  # images for the comparison with naive autograd
UNSURE = 0.1  # FI from which an image counts as not confidently classified
AXES = {1: "true class", 3: "predicted class"}
NAMES = {1: "Setup 1, true label", 3: "Setup 3, predicted label"}


def load(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in 0..1, labels [1797], and a training mask [1797]."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target, dtype=torch.int64)
    training = torch.zeros(len(y), dtype=torch.bool)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    training[order[:TRAINING]] = True
    return x, y, training


def best_time(work: Callable[[], Tensor], rounds: int = 3) -> tuple[Tensor, float]:
    """The result and the shortest of a few run times, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return result, min(times)


def compare(model: DigitsNet, x: Tensor, y: Tensor) -> str:
    """A table of speed and error: fastfi and naive autograd, on the same images.

    The truth is (1 - P_y) / P_y of the network in float64, which is FI for images of full rank.

    Args:
        model: in float32.
        x: [B, 1, 8, 8] images.
        y: [B] labels.
    """
    double = copy.deepcopy(model).double()
    rank = fastfi.influence(double, x.double(), y, full_output=True).rank
    x, y = x[rank == 9], y[rank == 9]
    with torch.no_grad():
        z = double(x.double())
    rest = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    truth = (rest - z.gather(1, y[:, None])[:, 0]).exp()
    unsure = (truth >= UNSURE).numpy()
    works = {
        "fastfi, float32 network": lambda: fastfi.influence(model, x, y, dtype=torch.float64),
        "naive, float32": lambda: naive_influence(model, x, y),
        "naive, float64": lambda: naive_influence(double, x.double(), y),
    }
    heads = [f"{'method':<23}", "ms per image", "  time", f"FI >= {UNSURE}", f"FI < {UNSURE}"]
    rules = ["-" * (len(head) + 1) + ":" for head in heads]
    lines = [
        f"{len(x)} images from the whole range of FI, {unsure.sum()} of them with FI >= {UNSURE}.",
        "The last two columns: largest relative error of FI among such images.\n",
        "| " + " | ".join(heads) + " |",
        "|" + "|".join([":" + rules[0][:-1], *rules[1:]]) + "|",
    ]
    base = 0.0
    for name, work in works.items():
        fi, seconds = best_time(work)
        error = ((fi - truth).abs() / truth).numpy()
        base = base or seconds
        cells = [f"{name:<23}", f"{1e3 * seconds / len(x):.3f}", f"{seconds / base:.1f} x"]
        cells += [f"{error[unsure].max():.0e}", f"{error[~unsure].max():.0e}"]
        lines.append(
            "| " + " | ".join(f"{c:>{len(h)}}" for c, h in zip(cells, heads, strict=True)) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for the files"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    x, y, training = load(options.seed)
    model = DigitsNet()
    print(f"Training DigitsNet on {TRAINING} of {len(y)} digits (scikit-learn, 8 x 8)")
    start = time.perf_counter()
    fit(model, x[training], y[training], epochs=options.epochs, batch=64, rate=5e-3)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        predicted = model(x).argmax(1)
    wrong = predicted != y
    accuracy = 100 * (1 - wrong[~training].double().mean())
    print(f"  {seconds:.1f} s, test accuracy {accuracy:.1f} %\n")

    start = time.perf_counter()
    scores = {
        setup: fastfi.influence(
            model, x, label, inverse="exact", full_output=True, dtype=torch.float64
        )
        for setup, label in ((1, y), (3, None))
    }
    seconds = time.perf_counter() - start
    fi = {setup: result.fi.numpy() for setup, result in scores.items()}
    print(
        f"Scored {len(y)} images twice (true and predicted label) in {seconds:.2f} s, "
        f"{2 * len(y) / seconds:.0f} scores per second\n"
    )
    masks = {"training": training.numpy(), "test": ~training.numpy()}
    table = {f"{NAMES[s]}, {name}": fi[s][m] for s in fi for name, m in masks.items()}
    print(percentiles(table) + "\n")

    top = np.argsort(-fi[1])[:5].tolist()
    print("The five most influential images (Setup 1)\n")
    print("| image | set      | label | predicted |       FI |")
    print("|------:|:---------|------:|----------:|---------:|")
    for i in top:
        part = "training" if training[i] else "test"
        print(f"| {i:>5} | {part:<8} | {y[i]:>5} | {predicted[i]:>9} | {number(fi[1][i]):>8} |")

    print("\nAgainst one autograd call per image and class, and numpy's pseudo-inverse:")
    spread = np.linspace(0, len(y) - 1, SUBSET).round().astype(int)
    subset = torch.from_numpy(np.argsort(fi[1])[spread])
    print(compare(model, x[subset], y[subset]) + "\n")

    panels = [
        [
            Panel(
                f"{NAMES[s]}: {name} set, {m.sum():,} images",
                fi[s][m],
                scores[s].label.numpy()[m],
                wrong.numpy()[m],
                AXES[s],
            )
            for name, m in masks.items()
        ]
        for s in fi
    ]
    classes = [str(k) for k in range(10)]
    title = "How much each digit's classification can be moved by its pixels"
    manhattan(options.out / "manhattan.png", panels, classes, title)
    gallery(
        options.out / "top.png",
        x[top, 0].numpy(),
        [
            f"image {i}\nlabel {y[i]}, predicted {predicted[i]}\nFI = {number(fi[1][i])}"
            for i in top
        ],
        "The five most influential digits",
    )
    columns = {
        "id": np.arange(len(y)),
        "set": np.where(training.numpy(), "training", "test"),
        "label": y.numpy(),
        "predicted": predicted.numpy(),
        "fi_true": fi[1],
        "fi_predicted": fi[3],
        "rank": scores[1].rank.numpy(),
    }
    paths = save_scores(options.out, columns)
    files = [options.out / "manhattan.png", options.out / "top.png", *paths]
    print("Wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
