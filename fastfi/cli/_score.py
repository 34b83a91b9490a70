"""``fastfi score``: FI of every image, batch by batch."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastfi.cli._batches import ScoreOptions, process
from fastfi.cli._output import ScoreFile, Scores
from fastfi.cli._summary import percentile_table
from fastfi.data import Batch, ImageSource
from fastfi.evaluate import evaluate
from fastfi.layers.parameters import Parameters, blocks
from fastfi.scoring.progress import images_per_second, progress

__all__ = ["WORDS", "ScoreOptions", "run_score", "score"]


def score(model: nn.Module, source: ImageSource, options: ScoreOptions) -> Iterator[Scores]:
    """Scores the images in order: one :class:`Scores` per batch. Arguments and errors are those of
    :func:`~fastfi.cli._batches.process`."""

    def work(x: Tensor, y: Tensor | None, batch: Batch) -> Scores:
        result = evaluate(model, x, y, **options.influence)
        return Scores(
            ids=batch.ids,
            label=None if batch.y is None else batch.y.numpy(),
            predicted=result.predicted.cpu().numpy(),
            log_prob=result.log_prob.cpu().numpy(),
            fi=result.fi.cpu().numpy(),
            rank=None if result.rank is None else result.rank.cpu().numpy(),
        )

    return process(model, source, options, work)


WORDS = {
    "input": "the input",
    "params": "all parameters",
    "all": "the input and all parameters",
}


def _blocks(model: nn.Module, wrt: str | Sequence[str]) -> tuple[str, ...] | None:
    """Names of the blocks that get a column each; None where there is one FI per image.

    Raises:
        OptionError: the model has no such parameters, or none that is trainable.
    """
    if wrt == "input":
        return None
    names = blocks(Parameters(model), wrt).names
    return None if wrt in ("params", "all") else names


def run_score(
    model: nn.Module,
    source: ImageSource,
    options: ScoreOptions,
    out: Path,
    overwrite: bool,
    show_progress: bool | None,
    metadata: Mapping[str, Any],
) -> None:
    """Writes the scores to ``out`` and prints a summary."""
    wrt = options.influence.get("wrt", "input")
    names = _blocks(model, wrt)
    what = WORDS[wrt] if names is None else f"{len(names)} blocks of parameters"
    total = source.length
    if options.limit is not None:
        total = options.limit if total is None else min(total, options.limit)
    fi = array("d")  # 8 bytes per image, for the percentiles
    n = correct = 0
    start = time.perf_counter()
    with (
        progress(total, show_progress) as advance,
        ScoreFile(out, source.id_type, metadata, overwrite, names) as file,
    ):
        for scores in score(model, source, options):
            file.write(scores)
            n += len(scores.ids)
            if names is None:
                fi.frombytes(scores.fi.tobytes())
            if scores.label is not None:
                correct += int((scores.label == scores.predicted).sum())
            advance(len(scores.ids))
    seconds = time.perf_counter() - start
    if names is None:
        print(percentile_table(np.frombuffer(fi)))
    accuracy = f", accuracy {correct / n:.2%}" if source.labelled else ""
    rate = images_per_second(n / seconds)
    print(f"{n} images{accuracy}, FI of {what}, {seconds:.1f} s, {rate}, in {os.fspath(out)}")
