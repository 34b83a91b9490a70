"""Which layers are sensitive? FI of every layer's parameters in a ResNet and a DenseNet on MNIST.

Run ``python -m examples.mnist_layers --data ../shared/data/mnist --out mnist-output``. It trains
both networks, or loads what an earlier run saved, and draws the layer profiles of the most
influential test images before those of ordinary ones (Figure 4 d to f of the paper), under two
inverses. Measured: Exact FI of an image is one number in all 31 layers of the ResNet, and in the
94 % of the DenseNet's (image, layer) pairs that have full rank. Damped FI tells layers apart:
ordinary images keep 85 % of that number in the convolutions of the ResNet's first stage, 67 % in
those of its third, and 6 % in the third's norm layers (medians).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastfi
from examples.mnist import read
from examples.models import SmallDenseNet, SmallResNet
from examples.plots import Profiles, layer_grid
from examples.tables import number
from examples.training import fit, predict

__all__ = ["kinds_of", "main"]

NETWORKS = {"ResNet": SmallResNet, "DenseNet": SmallDenseNet}
INVERSES = {"exact": "Exact", "damped": "Damped"}
KINDS = {nn.Conv2d: "conv", nn.BatchNorm2d: "norm", nn.Linear: "linear"}
TOP = 5
FULL = 9  # rank K - 1


def file_names(weights: Sequence[Path], out: Path) -> list[Path]:
    """Where the weights of the networks are, or will be, in the order of NETWORKS."""
    folder = weights[0] if weights else out
    paths = [folder / f"{network.__name__.lower()}.safetensors" for network in NETWORKS.values()]
    if len(weights) == len(NETWORKS):
        paths = list(weights)
    if weights and (len(weights) > len(NETWORKS) or not all(path.is_file() for path in paths)):
        names = ", ".join(path.name for path in paths)
        given = " ".join(map(str, weights))
        expected = f"{len(NETWORKS)} files of weights, or a folder with {names}"
        raise SystemExit(f"--weights: expected {expected}, got {given}")
    return paths


def load_or_train(name: str, path: Path, data: Path, epochs: int, seed: int) -> nn.Module:
    """The network in eval mode, with the weights at ``path``; they are trained if not there."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    x, y = read(data, "train")
    print(f"Training {name} on {len(y):,} images", flush=True)
    start = time.perf_counter()
    fit(model, x, y, epochs=epochs, batch=128, rate=3e-3)
    save_file(model.state_dict(), path)
    print(f"  {time.perf_counter() - start:.0f} s, saved {path}")
    return model


def kinds_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The type of each of the named layers."""
    return [KINDS[type(model.get_submodule(name))] for name in names]


def choose(fi: Sequence[Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The images with the largest FI, by its geometric mean over the networks, and ``count`` random
    other ones, as indices."""
    order = torch.stack(list(fi)).log().sum(0).argsort(descending=True)
    generator = torch.Generator().manual_seed(seed)
    rest = order[TOP:]
    return order[:TOP], rest[torch.randperm(len(rest), generator=generator)[:count]]


def flatness(profile: fastfi.Influence, closed: Tensor) -> str:
    """How many values of Exact have full rank, and how they compare with the closed form.

    Args:
        profile: fi and rank [B, L].
        closed: [B], (1 - P_y) / P_y.
    """
    assert profile.rank is not None
    full, share = profile.rank == FULL, profile.fi / closed[:, None]
    error = number(float((share[full] - 1).abs().max()))
    counts = f"{int(full.sum()):,} of {full.numel():,} (image, layer)"
    text = f"Exact: {counts} of full rank, there FI = (1 - P_y) / P_y within {error}"
    if full.all():
        return text
    low, middle = (number(float(v)) for v in (share[~full].min(), share[~full].median()))
    return f"{text}; elsewhere at least {low} of it, {middle} in the median"


def groups(names: Sequence[str], kinds: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """Layers by the beginning of their name and their type."""
    result: dict[tuple[str, str], list[int]] = {}
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        result.setdefault((name.partition(".")[0], kind), []).append(i)
    return result


def table(model: nn.Module, profiles: dict[str, fastfi.Influence], closed: Tensor) -> str:
    """A Markdown table: one row for each stage and type of layer; medians over images and layers.

    Args:
        profiles: of the TOP images, then the ordinary ones, by inverse.
        closed: [B], (1 - P_y) / P_y.
    """
    names, rank = profiles["exact"].names, profiles["exact"].rank
    assert rank is not None
    share = profiles["damped"].fi / closed[:, None]
    heads = ["layers", "type", "number", "parameters", "full rank"]
    columns = {"Exact": profiles["exact"].fi, "Damped / Exact": share}
    heads += [f"{name}, {who}" for name in columns for who in (f"top {TOP}", "ordinary")]
    rows = []
    for (stage, kind), at in groups(names, kinds_of(model, names)).items():
        layers = [model.get_submodule(names[i]) for i in at]
        count = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))
        full = f"{100 * (rank[:, at] == FULL).double().mean():.0f} %"
        parts = [part for fi in columns.values() for part in (fi[:TOP, at], fi[TOP:, at])]
        values = [number(float(part.median())) for part in parts]
        rows.append([stage, kind, str(len(at)), f"{count:,}", full, *values])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    text = ["| " + " | ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) + " |"
            for line in (heads, *rows)]  # fmt: skip
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(text)


def main() -> None:
    """Trains (or loads) the networks, measures the profiles, prints tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--out", type=Path, default=Path("mnist-output"), help="folder for files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--weights", type=Path, nargs="+", default=[], metavar=("RESNET", "DENSENET"),
        help="the two files of weights, or the folder where they are (default: --out)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=300, help="ordinary images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    models = {
        name: load_or_train(name, path, options.data, options.epochs, options.seed)
        for name, path in zip(NETWORKS, file_names(options.weights, options.out), strict=True)
    }
    x, y = read(options.data, "test")
    predicted, closed = {}, {}
    for name, model in models.items():
        predicted[name] = predict(model, x.split(1024))
        accuracy = 100 * (predicted[name] == y).double().mean()
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count:,} parameters, test accuracy {accuracy:.2f} %")
        # (1 - P_y) / P_y: FI of the input, of all parameters, and of every layer of full rank.
        closed[name] = fastfi.influence(model, x, y, assume_full_rank=True, dtype=torch.float64)
    top, usual = choose(list(closed.values()), options.images, options.seed)
    chosen = torch.cat([top, usual])

    panels = []
    for name, model in models.items():
        profiles = {}
        print(f"\n{name}, {TOP} + {len(usual)} images")
        for inverse in INVERSES:
            start = time.perf_counter()
            profiles[inverse] = fastfi.influence(
                model, x[chosen], y[chosen], wrt="layers", inverse=inverse, full_output=True,
                dtype=torch.float64,
            )  # fmt: skip
            print(f"  {INVERSES[inverse]}: {time.perf_counter() - start:.1f} s", flush=True)
        print("  " + flatness(profiles["exact"], closed[name][chosen]))
        print("\n" + table(model, profiles, closed[name][chosen]))
        names = profiles["exact"].names
        kinds = kinds_of(model, names)
        panels.append([])
        for inverse, word in INVERSES.items():
            fi = profiles[inverse].fi.numpy()
            panels[-1].append(Profiles(f"{name}, {word}", names, fi[:TOP], kinds, fi[TOP:]))
    captions = [
        f"image {i}\nlabel {y[i]}\n"
        + "\n".join(f"{name} says {predicted[name][i]}" for name in models)
        for i in top.tolist()
    ]
    title = "FI of each layer's parameters: five influential test images, and ordinary ones"
    layer_grid(options.out / "layers.png", panels, (2, 3), x[top, 0].numpy(), captions, title)
    print(f"\nWrote {options.out / 'layers.png'}")


if __name__ == "__main__":
    main()
