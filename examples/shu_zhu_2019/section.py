"""A part of the experiment: computed for one data set, kept as numbers, drawn from what is kept.

A part is a module with ``NAME``, ``SETTINGS`` (the fields of Config that it depends on besides the
networks'), ``compute(context, dataset) -> Result`` and ``draw(dataset, result) -> figures``. Its
text is ``templates/NAME.md.jinja``, which sees ``values`` of each data set.
"""

from __future__ import annotations

import io
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

import fastfi
from examples.shu_zhu_2019.config import Config
from examples.shu_zhu_2019.context import Context
from examples.shu_zhu_2019.files import replace, replace_text

__all__ = ["COMMON", "Result", "Section", "machine", "paths", "run", "settings", "stored"]

# What networks, images and scores depend on.
COMMON = (
    "large", "seed", "stem_stride", "sum_dropout", "epochs", "cifar_factor", "batch", "rate",
    "train_images", "test_images", "device",
)  # fmt: skip
DPI = 110


class Result(NamedTuple):
    """What a part computed.

    Attributes:
        values: JSON: what the report's text says. NaN and infinities are not JSON: write None.
        arrays: the figures' data, by name.
    """

    values: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class Section(Protocol):
    """A module of the experiment."""

    NAME: str
    SETTINGS: tuple[str, ...]
    DATASETS: tuple[str, ...]
    compute: Callable[[Context, str], Result]
    draw: Callable[[str, Result], Mapping[str, Figure]]


def settings(config: Config, section: Section) -> dict[str, Any]:
    """The settings that a part's numbers depend on."""
    all_of = asdict(config)
    return {name: all_of[name] for name in (*COMMON, *section.SETTINGS)}


def paths(out: Path, section: Section, dataset: str) -> tuple[Path, Path]:
    """Where a part keeps its values and arrays."""
    base = out / "data" / f"{dataset}-{section.NAME}"
    return base.with_suffix(".json"), base.with_suffix(".npz")


def stored(out: Path, section: Section, dataset: str) -> tuple[Result, dict[str, Any]] | None:
    """What an earlier run kept, and its settings and seconds; None where there is nothing."""
    text, numbers = paths(out, section, dataset)
    if not text.exists() or not numbers.exists():
        return None
    kept = json.loads(text.read_text())
    with np.load(numbers, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Result(kept.pop("values"), arrays), kept


def machine() -> str:
    """What computes: processor, threads, versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [t.partition(":")[2].strip() for t in lines if t.startswith("model name")]
        processor = names[0] if names else processor
    if torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"fastfi {fastfi.__version__}, Python {platform.python_version()}"
    )


def _save(figure: Figure, path: Path) -> None:
    """A PNG, of 256 colours unless there are images or maps in it: a third of the size. They are
    chosen by coverage: a median cut gives rare marks the colours of frequent ones."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    whole = Image.open(content).convert("RGB")
    pictures = any(axes.images for axes in figure.axes)
    fewer = whole if pictures else whole.quantize(256, Image.Quantize.MAXCOVERAGE)
    fewer.save(path, optimize=True)


def run(context: Context, section: Section, dataset: str, again: bool = False) -> Result:
    """Computes a part and keeps it, unless that was done with the same settings; draws it."""
    config = context.config
    now, kept = settings(config, section), stored(config.out, section, dataset)
    if kept is None or again or kept[1]["settings"] != now:
        print(f"{dataset}: {section.NAME}", flush=True)
        start = time.perf_counter()
        result = section.compute(context, dataset)
        facts = {
            "section": section.NAME,
            "dataset": dataset,
            "machine": machine(),
            "seconds": round(time.perf_counter() - start, 2),
            "settings": now,
            "values": result.values,
        }
        text, numbers = paths(config.out, section, dataset)
        line = json.dumps(facts, indent=1, allow_nan=False) + "\n"
        # The text last: what has one has both.
        text.unlink(missing_ok=True)
        replace(numbers, lambda path: np.savez_compressed(path, **result.arrays))
        replace_text(text, line)
        print(f"  {facts['seconds']:.1f} s", flush=True)
    else:
        result = kept[0]
    for name, figure in section.draw(dataset, result).items():
        path = config.out / "figures" / f"{dataset}-{section.NAME}-{name}.png"
        replace(path, partial(_save, figure))
    return result
