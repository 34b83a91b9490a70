"""Resident memory while ``fastfi.score`` goes over a data set; prints one line of JSON.

    python -m bench.score_memory [--images 60000]

Each image is made when it is read, as files would be decoded, and the resident set is noted then.
Medians of the first and of the last tenth are compared; the first two thousand images, in which
libraries are loaded (Parquet's at the first part) and the batch size is tried, are left out. Parts
have a thousand rows. Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastfi
from examples.models import SmallCNN

__all__ = ["main"]

WARM = 2000


class Watched(Dataset[tuple[Tensor, int]]):
    """Random images; notes the resident set at each."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.resident: list[int] = []  # bytes

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * resource.getpagesize())
        generator = torch.Generator().manual_seed(i)
        return torch.rand(1, 28, 28, generator=generator), i % 10


def main() -> None:
    """Scores so many images with exact FI."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = Watched(options.images)
    with tempfile.TemporaryDirectory() as folder:
        fastfi.score(SmallCNN().eval(), data, out=f"{folder}/scores", part_rows=1000)
    seen = data.resident[-options.images :]
    tenth = options.images // 10
    first, last = statistics.median(seen[WARM:tenth]), statistics.median(seen[-tenth:])
    line = {"peak_bytes": last, "yardstick_bytes": first, "images": options.images, "reset": True}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
