"""``fastfi map``: influence maps of every image, batch by batch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor, nn

from fastfi.classes import sort_classes
from fastfi.cli._batches import ScoreOptions, process
from fastfi.cli._figures import FigureFolder
from fastfi.cli._mapfile import MapFile, MapForm, Maps
from fastfi.data import Batch, ImageSource
from fastfi.errors import OptionError
from fastfi.inverse import Damped
from fastfi.maps import InfluenceMap, influence_map
from fastfi.model import forward
from fastfi.scoring.progress import images_per_second, progress
from fastfi.sweep import FORWARD_CHUNK, Request, run_chunks

__all__ = ["compute_maps", "known_ids", "map_form", "run_map"]


class _Predicted(NamedTuple):
    label: Tensor


def _predicted(model: nn.Module, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The most probable class of every image, int64 [b], from a forward pass."""
    outputs = options["outputs"]
    q = Request.checked(model, x, None, outputs=outputs, memory_budget=options["memory_budget"])

    def run(part: slice) -> _Predicted:
        with torch.no_grad():
            return _Predicted(sort_classes(forward(model, x[part], outputs), None, None).predicted)

    return run_chunks(q, q.plan(FORWARD_CHUNK), run).label


def compute_maps(
    model: nn.Module, source: ImageSource, options: ScoreOptions, rank_dtype: DTypeLike = np.int64
) -> Iterator[tuple[Maps, Tensor]]:
    """Maps of the images in order, with the images [b, C, H, W] as they were read. Arguments and
    errors are those of :func:`~fastfi.cli._batches.process`."""

    def work(x: Tensor, y: Tensor | None, batch: Batch) -> tuple[Maps, Tensor]:
        result = influence_map(
            model, x, y, full_output=True, dtype=torch.float32, **options.influence
        )
        assert isinstance(result, InfluenceMap)
        predicted = result.label if y is None else _predicted(model, x, options.influence)
        rank = None if result.rank is None else result.rank.cpu().numpy().astype(rank_dtype)
        maps = Maps(
            ids=batch.ids,
            label=None if batch.y is None else batch.y.numpy(),
            predicted=predicted.cpu().numpy(),
            log_prob=result.log_prob.cpu().numpy(),
            fi=result.fi.cpu().numpy(),
            rank=rank,
        )
        return maps, batch.x

    return process(model, source, options, work)


def known_ids(source: ImageSource, limit: int | None) -> Sequence[int] | Sequence[str]:
    """The ids of all images to be mapped, which name their figures.

    Raises:
        OptionError: the data set tells them only when it is read.
    """
    ids = source.ids()
    if ids is None:
        raise OptionError(
            f"--figures: {source.path} does not tell its ids in advance; choose images with --ids"
        )
    return ids[:limit]


def map_form(source: ImageSource, options: ScoreOptions, metadata: Mapping[str, Any]) -> MapForm:
    """What the file of these maps will hold."""
    count, limit = source.length, options.limit
    if count is not None and limit is not None:
        count = min(count, limit)
    scales, channels = options.influence["scales"], options.influence["channels"]
    colors, height, width = source.shape
    separate = (len(scales), colors, height, width)
    joint = (len(scales), height, width)
    # A rank is at most the number of the window's values.
    most = max(min(s, height) * min(s, width) for s in scales)
    most *= colors if channels == "joint" else 1
    ranked = not isinstance(options.influence["inverse"], Damped)
    return MapForm(
        count=count,
        id_type=source.id_type,
        labelled=source.labelled,
        scales=scales,
        shape=separate if channels == "separate" else joint,
        rank_shape=(joint if channels == "joint" else separate) if ranked else None,
        rank_dtype=np.int16 if most <= np.iinfo(np.int16).max else np.int32,
        metadata=metadata,
    )


def _caption(maps: Maps, i: int) -> str:
    predicted = f"predicted {maps.predicted[i]}"
    return predicted if maps.label is None else f"{predicted}, label {maps.label[i]}"


def run_map(
    model: nn.Module,
    source: ImageSource,
    options: ScoreOptions,
    out: Path,
    overwrite: bool,
    figures: FigureFolder | None,
    show_progress: bool | None,
    metadata: Mapping[str, Any],
) -> None:
    """Writes the maps to ``out``, draws the figures, and prints a summary."""
    form = map_form(source, options, metadata)
    n = correct = 0
    start = time.perf_counter()
    # The file is put in place before the figures: only it can still fail for want of space.
    with (
        progress(form.count, show_progress, ("mapping", "mapped")) as advance,
        figures or nullcontext(),
        MapFile(out, form, overwrite) as file,
    ):
        for maps, x in compute_maps(model, source, options, form.rank_dtype):
            file.write(maps)
            if figures is not None:
                for i in range(len(x)):
                    figures.add(x[i], torch.from_numpy(maps.fi[i]), form.scales, _caption(maps, i))
            n += len(x)
            if maps.label is not None:
                correct += int((maps.label == maps.predicted).sum())
            advance(len(x))
            del maps, x  # before the next batch is computed
        if figures is not None:
            figures.check()  # before the file is put in place
    seconds = time.perf_counter() - start
    accuracy = f", accuracy {correct / n:.2%}" if source.labelled else ""
    print(
        f"{n} images{accuracy}, maps {list(form.shape)} each, {seconds:.1f} s, "
        f"{images_per_second(n / seconds)}, in {os.fspath(out)}"
    )
