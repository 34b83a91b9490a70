"""Where is a digit vulnerable? Influence maps of MNIST images, and the pixels they mark, attacked.

Run ``python -m examples.mnist_maps --data ../shared/data/mnist --out mnist-output``, and with
``--weights mnist-output/smallcnn.safetensors`` once ``examples.mnist`` has trained the network. It
draws the maps of the most influential and of ordinary test images under the three inverses, then
changes the pixels that the maps, the gradient or chance choose, and counts the predictions that
change.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastfi
from examples.mnist import BATCH, network, read, score
from examples.tables import number
from examples.training import batches
from fastfi.attack import OnePixel, one_pixel

__all__ = ["best_pixel", "choices", "gradient", "main", "rates"]

SCALES = (1, 3, 5, 7)
STEPS = 9  # values tried for a pixel, 0 and 1 among them
INVERSES = ("damped", "truncated", "exact")


class Bytes(nn.Module):
    """A model of images in 0..255, the units for which the truncated rule's cut was made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x / 255)


def maps_of(model: nn.Module, x: Tensor, inverse: str, scales: Sequence[int]) -> Tensor:
    """Maps [B, S, 28, 28] of the predicted class."""
    if inverse == "truncated":
        model, x = Bytes(model), x * 255
    return fastfi.influence_map(model, x, scales=scales, inverse=inverse, channels="joint")


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """|d cross-entropy of the predicted class / d pixel|, [B, 28, 28]."""
    x = x.clone().requires_grad_()
    z = model(x).double()  # 1 - P_y of confident images needs it
    nn.functional.cross_entropy(z, z.argmax(1), reduction="sum").backward()
    return x.grad.abs().sum(1)


def choices(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """What may choose the pixels: scores [B, 28, 28] by name."""
    scores = {}
    for inverse in INVERSES:
        maps = maps_of(model, x, inverse, (1, 3))
        scores |= {f"FI, {inverse}, {k} x {k}": maps[:, s] for s, k in enumerate((1, 3))}
    scores["largest gradient"] = gradient(model, x)
    generator = torch.Generator().manual_seed(seed)
    scores["random"] = torch.rand(len(x), *x.shape[2:], generator=generator)
    return scores


def best_pixel(model: nn.Module, x: Tensor) -> Tensor:
    """Whether any single pixel changes the prediction, [B] bool: every pixel is tried."""
    size = x[0, 0].numel()
    each = torch.eye(size).reshape(size, *x.shape[2:])
    tried = [one_pixel(model, v.expand(size, *v.shape), None, map=each, steps=STEPS) for v in x]
    return torch.stack([result.success.any() for result in tried])


def rates(
    attacks: Mapping[str, Sequence[OnePixel]],
    heads: Sequence[str],
    value: Callable[[OnePixel], str],
) -> str:
    """A Markdown table: one row for each way to choose pixels, one column for each set of images
    and number of pixels."""
    width = max(map(len, attacks))
    lines = [
        f"| {'pixels chosen by':<{width}} | " + " | ".join(heads) + " |",
        f"|:{'-' * (width + 1)}|" + "".join(f"{'-' * (len(h) + 1)}:|" for h in heads),
    ]
    for name, results in attacks.items():
        cells = [f"{value(r):>{len(h)}}" for r, h in zip(results, heads, strict=True)]
        lines.append(f"| {name:<{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def success(result: OnePixel) -> str:
    """The share of predictions that changed."""
    return f"{100 * result.success.double().mean():.1f} %"


def loss(result: OnePixel) -> str:
    """The mean of -log P of the class attacked, afterwards."""
    return f"{-result.log_prob_after.mean():.3f}"


def location(scores: Mapping[str, Mapping[str, Tensor]], x: Mapping[str, Tensor]) -> str:
    """A Markdown table by map and group of images: the mean share of a map's sum that lies on the
    digit or within two pixels of it, and how many maps are zero everywhere (they have no share)."""
    near = {g: nn.functional.max_pool2d((v > 0).float(), 5, 1, 2)[:, 0] for g, v in x.items()}
    rows = {name: [scores[g][name] for g in x] for name in next(iter(scores.values()))}
    rows["(area)"] = [torch.ones_like(v) for v in near.values()]
    width = max(map(len, rows))
    heads = [f"{g}: {what}" for g in x for what in ("near the digit", "all zero")]
    lines = [
        f"| {'map':<{width}} | " + " | ".join(heads) + " |",
        f"|:{'-' * (width + 1)}|" + "".join(f"{'-' * (len(h) + 1)}:|" for h in heads),
    ]
    for name, maps in rows.items():
        cells = []
        for fi, mask in zip(maps, near.values(), strict=True):
            inside, total = (fi * mask).sum((1, 2)), fi.sum((1, 2))
            share = (inside[total > 0] / total[total > 0]).mean()
            cells += [f"{100 * share:.1f} %", f"{int((total == 0).sum())}"]
        text = " | ".join(f"{c:>{len(h)}}" for c, h in zip(cells, heads, strict=True))
        lines.append(f"| {name:<{width}} | {text} |")
    return "\n".join(lines)


def part(result: OnePixel, at: Tensor) -> OnePixel:
    """The result for some of the images."""
    return OnePixel(*(field[at] for field in result))


def draw(model: nn.Module, x: Tensor, fi: Tensor, top: Tensor, usual: Tensor, out: Path) -> None:
    """Writes maps.png and inverses.png.

    Args:
        x, fi: the test images, and their FI.
        top, usual: indices of the most influential and of ordinary images.
    """
    chosen = torch.cat([top[:3], usual[:2]])
    captions = [f"test image {i}\nFI = {number(float(fi[i]))}" for i in chosen.tolist()]
    maps = fastfi.influence_map(model, x[chosen], scales=SCALES, full_output=True)
    title = "Damped FI of k x k windows: three influential images, two ordinary ones"
    figure = fastfi.plot.influence_map(x[chosen], maps, titles=captions, title=title, overlay=1)
    figure.savefig(out / "maps.png", dpi=100)

    pair = torch.stack([top[0], usual[0]]).repeat_interleave(len(INVERSES))
    rules = list(zip(pair.tolist(), INVERSES * 2, strict=True))
    stacked = torch.cat([maps_of(model, x[i : i + 1], rule, SCALES) for i, rule in rules])
    captions = [f"{rule}\nFI = {number(float(fi[i]))}" for i, rule in rules]
    figure = fastfi.plot.influence_map(
        x[pair], stacked, scales=SCALES, titles=captions, overlay=1,
        title="An influential and an ordinary image under the three inverses",
    )  # fmt: skip
    figure.savefig(out / "inverses.png", dpi=100)


def draw_attack(x: Tensor, maps: Tensor, results: Sequence[OnePixel], out: Path) -> None:
    """Writes attack.png: images whose prediction changes with the pixel of the largest FI."""
    chosen = results[0].success.nonzero().flatten()[:7]
    if len(chosen) == 0:
        print("\nNo prediction changed: no attack.png")
        return
    figure = fastfi.plot.attack(
        x[chosen],
        part(results[0], chosen),
        maps=maps[chosen],
        title="One pixel, the one with the largest damped FI (middle), changed",
        panel=1.4,
    )
    figure.savefig(out / "attack.png", dpi=100)


def main() -> None:
    """Trains (or loads) the network, draws maps, attacks pixels, prints rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--out", type=Path, default=Path("mnist-output"), help="folder for files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--weights", type=Path, help="use these weights and train nothing")
    parser.add_argument("--images", type=int, default=300, help="images in each of the two groups")
    parser.add_argument("--exhaustive", type=int, default=40, help="images to try all pixels of")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    model = network(*read(options.data, "train"), options.weights, options.out, options.epochs)
    x, y = read(options.data, "test")
    result = score(model, batches(x, y, BATCH), setup=3)
    order = result.fi.argsort(descending=True)
    middle = len(order) // 2
    usual = order[middle - 1 : middle + 1]
    draw(model, x, result.fi, order, usual, options.out)

    count = options.images
    generator = torch.Generator().manual_seed(options.seed)
    groups = {
        "top": order[:count],
        "random": torch.randperm(len(x), generator=generator)[:count],
    }
    for name, group in groups.items():
        low, mid, high = (number(v) for v in np.quantile(result.fi[group].numpy(), [0, 0.5, 1]))
        print(f"{name}: {count} test images, FI {low} to {high}, median {mid}")

    start = time.perf_counter()
    scores = {name: choices(model, x[group], options.seed) for name, group in groups.items()}
    seconds = time.perf_counter() - start
    print(f"\nWhere the maps are large ({seconds:.0f} s for all of them)\n")
    print(location(scores, {name: x[group] for name, group in groups.items()}), flush=True)
    start = time.perf_counter()
    columns = [(name, pixels) for pixels in (1, 5) for name in groups]
    attacks = {
        method: [
            one_pixel(model, x[groups[g]], None, map=scores[g][method], pixels=n, steps=STEPS)
            for g, n in columns
        ]
        for method in scores["top"]
    }
    print(f"\nAttacks: {time.perf_counter() - start:.0f} s, threads: {torch.get_num_threads()}")
    heads = [f"{g}, {n} pixel{'s' if n > 1 else ''}" for g, n in columns]
    print("\nPredictions changed\n\n" + rates(attacks, heads, success))
    print("\nMean of -log P of the class predicted before, after the attack\n")
    unchanged = [r._replace(log_prob_after=r.log_prob_before) for r in attacks["random"]]
    print(rates({**attacks, "(before)": unchanged}, heads, loss))

    few = torch.linspace(0, count - 1, min(options.exhaustive, count)).long()
    best = best_pixel(model, x[order[few]])
    print(f"\n{len(few)} of the top images, evenly spaced in rank: predictions changed\n")
    some = {name: [part(results[0], few)] for name, results in attacks.items()}
    some["best of all pixels"] = [some["random"][0]._replace(success=best)]
    print(rates(some, ["1 pixel"], success))

    name = f"FI, {INVERSES[0]}, 1 x 1"
    draw_attack(x[order[:count]], scores["top"][name], attacks[name], options.out)
    print(f"\nWrote the pictures to {options.out}")


if __name__ == "__main__":
    main()
