"""The picture at the top of README.md: FI of MNIST's test set by class, and the images at its top.

Run ``python -m examples.readme_picture --data ../shared/data/mnist --weights
mnist-output/smallcnn.safetensors --out docs/readme.png``; the weights are what ``examples.mnist``
trained.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

import fastfi
from examples.mnist import BATCH, network, read, score
from examples.plots import Panel, draw_manhattan, legend_handles
from examples.tables import number
from examples.training import batches

__all__ = ["draw", "main"]

SCALE = 3  # pixels across a window of the maps
COLOURS = 96  # of the file's palette
TOP = 4  # images shown


def _show(axes: Axes, image: np.ndarray, caption: str = "", **options: object) -> None:
    axes.imshow(image, interpolation="nearest", **options)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color="0.7")
    axes.set_xlabel(caption, fontsize=9, linespacing=1.35)


def draw(panel: Panel, images: np.ndarray, maps: np.ndarray, captions: Sequence[str]) -> Figure:
    """The figure: a Manhattan plot, and beside it images above their maps.

    Args:
        panel: all scores.
        images: [n, H, W] in 0..1.
        maps: [n, H, W], each drawn with a colour scale of its own.
        captions: n texts.
    """
    figure = Figure(figsize=(13.0, 4.4), dpi=125, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 0.92), wspace=0.02)
    axes = left.subplots()
    axes.set_yscale("log")
    draw_manhattan(axes, panel, [str(k) for k in range(10)], float(panel.fi.min()))
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.minorticks_off()
    axes.set_ylabel("first-order influence FI")
    left.legend(handles=legend_handles(), loc="outside lower center", ncols=3, frameon=False)
    grid = right.subplots(2, len(images))
    for column, image, fi, caption in zip(grid.T, images, maps, captions, strict=True):
        _show(column[0], image, caption, cmap="gray_r", vmin=0, vmax=1)
        _show(column[1], fi, cmap="magma", vmin=0)
    title = f"The most influential ones, and where: FI of each {SCALE} x {SCALE} window"
    right.suptitle(title, fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    """A PNG of few colours: a third of the size of a full one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Scores the test set and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--weights", type=Path, required=True, help="of examples.models.SmallCNN")
    parser.add_argument("--out", type=Path, default=Path("docs/readme.png"))
    options = parser.parse_args()

    x, y = read(options.data, "test")
    model = network(x, y, options.weights, options.out.parent, epochs=0)
    result = score(model, batches(x, y, BATCH), setup=1)
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in x.split(BATCH)])
    title = f"MNIST, {len(x):,} test images: how easily each one's class is lost"
    wrong = (predicted != y).numpy()
    panel = Panel(title, result.fi.numpy(), y.numpy(), wrong, "true class")

    top = result.fi.argsort(descending=True)[:TOP]
    maps = fastfi.influence_map(model, x[top], y[top], scales=(SCALE,), channels="joint")[:, 0]
    captions = [
        f"labelled {y[i]}, taken for {predicted[i]}\nFI = {number(float(result.fi[i]))}"
        for i in top.tolist()
    ]
    figure = draw(panel, x[top, 0].numpy(), maps.numpy(), captions)
    save(figure, options.out)
    print(f"Wrote {options.out}, {options.out.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
