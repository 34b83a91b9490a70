"""``fastfi score --out FOLDER``: :func:`fastfi.score` from the command line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastfi
from fastfi.cli._batches import Normalisation
from fastfi.cli._model import parse_device
from fastfi.cli._score import WORDS
from fastfi.cli._shared import network_of
from fastfi.cli._summary import percentile_table
from fastfi.data import ImageSource
from fastfi.inverse import Inverse
from fastfi.scoring import Scores
from fastfi.scoring.progress import images_per_second

__all__ = ["run_score_folder"]

_Y = {"true": "label", "predicted": "predicted", "both": "both"}
_PASSED = (
    "wrt", "outputs", "lump", "assume_full_rank", "batch_size", "memory_budget", "workers", "limit",
    "resume", "strict", "part_rows", "part_seconds",
    "shard",
)  # fmt: skip
_NOTED = ("model", "weights", "data", "split", "mean", "std", "color")


def _device(name: str) -> torch.device:
    """Under torchrun, "cuda" is the GPU of this process."""
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None:
        name = f"cuda:{int(local) % max(1, torch.cuda.device_count())}"
    return parse_device(name)


def run_score_folder(
    source: ImageSource,
    config: Mapping[str, Any],
    rule: Inverse,
    objectives: Sequence[str],
    out: Path,
    overwrite: bool,
    show_progress: bool | None,
) -> None:
    """Scores the images into ``out`` and prints a summary.

    Args:
        config: the command's options, parsed.
    """
    device = _device(config["device"])
    normalisation = Normalisation(config["mean"], config["std"])
    normalisation.check(source.shape[0])
    weights = None if config["weights"] is None else Path(config["weights"])
    network = network_of(config["model"], weights, device, config["wrt"] != "input")
    start = time.perf_counter()
    scores = fastfi.score(
        network,
        source,
        out=out,
        inverse=rule,
        y=_Y[config["labels"]],  # type: ignore[arg-type]
        objective=list(objectives),
        device=device,
        transform=None if normalisation.idle else normalisation,
        overwrite=overwrite,
        progress=show_progress,
        notes={name: config[name] for name in _NOTED},
        **{name: config[name] for name in _PASSED},
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _report(scores, time.perf_counter() - start, config["wrt"], out)


def _report(scores: Scores, seconds: float, wrt: str | Sequence[str], out: Path) -> None:
    summary = scores.summary()
    if summary.scored and not scores.blocks:
        for column in scores.fi_columns:
            values = scores.to_table([column]).column(column).drop_null().to_numpy()
            print(percentile_table(values, "FI" if column == "fi" else column))
    what = WORDS[wrt] if isinstance(wrt, str) and wrt in WORDS else f"{len(scores.blocks)} blocks"
    accuracy = "" if summary.accuracy is None else f", accuracy {summary.accuracy:.2%}"
    rate = images_per_second(summary.rows / max(seconds, 1e-9))
    print(f"{summary.rows} images{accuracy}, FI of {what}, {seconds:.1f} s, {rate}, in {out}")
    if summary.errors:
        print(
            f"fastfi: {summary.errors} of {summary.rows} images have no score; the column error "
            "says why",
            file=sys.stderr,
        )
