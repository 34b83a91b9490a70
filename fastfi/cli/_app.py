"""The commands and their options."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

import fastfi
from fastfi import doctor as doctor_module
from fastfi.cli._model import load_model, parse_device
from fastfi.cli._output import ScoreFile, check_output
from fastfi.cli._progress import progress
from fastfi.cli._score import Labels, Normalisation, ScoreOptions, score
from fastfi.cli._summary import percentile_table
from fastfi.data import open_dataset
from fastfi.errors import FastfiError, OptionError

__all__ = ["app", "parse_bytes"]

app = typer.Typer(
    help="First-order local influence (FI) of neural network classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, which wraps paragraphs
)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from "2GB", "512 MiB", "1.5g" or "1000000".

    Raises:
        OptionError: not a positive amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        amount = float(match[1]) * {**_UNITS, **_BINARY_UNITS}[match[2] or ""] if match else 0.0
    except ValueError:
        amount = 0.0
    if amount < 1:
        raise OptionError(f"expected an amount of memory such as 2GB or 512MiB, got {text!r}")
    return int(amount)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """ "0.49,0.48,0.45" as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"{option}: expected numbers separated by commas, got {text!r}"
        ) from error


def _inverse(
    name: str, rtol: float | None, eps: float | None, alpha: float | None
) -> fastfi.Exact | fastfi.Truncated | fastfi.Damped:
    given = {"--rtol": ("exact", rtol), "--eps": ("truncated", eps), "--alpha": ("damped", alpha)}
    for option, (owner, value) in given.items():
        if value is not None and name != owner:
            raise OptionError(f"{option} belongs to --inverse {owner}, not to {name}")
    if name == "exact":
        return fastfi.Exact(rtol=rtol)
    if name == "truncated":
        return fastfi.Truncated() if eps is None else fastfi.Truncated(eps=eps)
    return fastfi.Damped() if alpha is None else fastfi.Damped(alpha=alpha)


@contextmanager
def _reported(show_traceback: bool) -> Iterator[None]:
    """Turns fastfi's errors into one message and exit code 2, Ctrl-C into exit code 130."""
    try:
        yield
    except FastfiError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"fastfi: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print("fastfi: interrupted, no scores were written", file=sys.stderr)
        raise typer.Exit(130) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@app.callback()
def _main() -> None: ...


@app.command()
def doctor() -> None:
    """Print versions, which kernel each operator runs, and what is missing."""
    raise typer.Exit(doctor_module.main())


@app.command("score")
def score_command(
    model: Annotated[
        str,
        typer.Option(
            help="package.module:factory; the factory is called without arguments and returns an "
            "nn.Module. The current directory is importable."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="A folder of IDX files (MNIST), an .npz file, Parquet in the Hugging Face image "
            "layout (file or folder), or an image folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="scores.parquet or scores.csv.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="safetensors, or a PyTorch state dict; pickled code is never run."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, test, ...")] = None,
    labels: Annotated[
        Labels, typer.Option(help="Whose influence: of the true or of the predicted label.")
    ] = "true",
    inverse: Annotated[
        Literal["exact", "truncated", "damped"], typer.Option(help="Inverse of the metric.")
    ] = "exact",
    rtol: Annotated[float | None, typer.Option(help="Rank tolerance of --inverse exact.")] = None,
    eps: Annotated[float | None, typer.Option(help="Cut of --inverse truncated.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Damping of --inverse damped.")] = None,
    objective: Annotated[
        str, typer.Option(help="cross_entropy, logit, margin, entropy or nll_of_others.")
    ] = "cross_entropy",
    outputs: Annotated[
        Literal["logits", "log_probs", "probs"], typer.Option(help="What the model returns.")
    ] = "logits",
    lump: Annotated[
        float | None,
        typer.Option(help="Merge each image's least likely classes, up to this probability."),
    ] = None,
    assume_full_rank: Annotated[
        bool, typer.Option("--assume-full-rank", help="Use the closed form: forward passes only.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images read and scored at once.")] = 256,
    memory_budget: Annotated[
        str | None, typer.Option(help="Memory for the backward passes, e.g. 2GB.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    mean: Annotated[
        str, typer.Option(help="Subtracted from pixels in 0..1; one number, or one per channel.")
    ] = "0",
    std: Annotated[str, typer.Option(help="Then divided by; likewise.")] = "1",
    image_key: Annotated[
        str | None, typer.Option(help="Array (npz) or column (Parquet) of the images.")
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="The same for the labels.")] = None,
    layout: Annotated[
        Literal["chw", "hwc"] | None, typer.Option(help="Axis order of 4-dimensional npz arrays.")
    ] = None,
    color: Annotated[
        Literal["auto", "gray", "rgb"], typer.Option(help="Conversion of compressed images.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first images.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing score file.")
    ] = False,
    show_progress: Annotated[
        bool | None,
        typer.Option("--progress/--no-progress", help="Default: only on a terminal."),
    ] = None,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Compute FI for every image of a data set.

    Writes the columns id, label (the data's own, empty if it has none), predicted, log_prob (of the
    label that FI is computed for, see --labels), fi and rank (empty for --inverse damped). The file
    appears only when it is complete.
    """
    with _reported(show_traceback), _terminable():
        check_output(out, overwrite)
        rule = _inverse(inverse, rtol, eps, alpha)
        config: dict[str, Any] = {
            "model": model,
            "weights": None if weights is None else str(weights),
            "data": str(data),
            "split": split,
            "labels": labels,
            "inverse": repr(rule),
            "objective": objective,
            "outputs": outputs,
            "lump": lump,
            "assume_full_rank": assume_full_rank,
            "batch_size": batch_size,
            "memory_budget": None if memory_budget is None else parse_bytes(memory_budget),
            "device": device,
            "mean": _numbers("--mean", mean),
            "std": _numbers("--std", std),
            "image_key": image_key,
            "label_key": label_key,
            "layout": layout,
            "color": color,
            "limit": limit,
        }
        options = ScoreOptions(
            labels=labels,
            influence={
                "inverse": rule,
                **{k: config[k] for k in ("objective", "outputs", "lump", "assume_full_rank")},
                "memory_budget": config["memory_budget"],
            },
            device=parse_device(device),
            batch_size=batch_size,
            limit=limit,
            normalisation=Normalisation(config["mean"], config["std"]),
        )
        _run(model, weights, data, out, overwrite, show_progress, config, options)


def _run(
    model: str,
    weights: Path | None,
    data: Path,
    out: Path,
    overwrite: bool,
    show_progress: bool | None,
    config: dict[str, Any],
    options: ScoreOptions,
) -> None:
    source = open_dataset(
        data, **{k: config[k] for k in ("split", "image_key", "label_key", "layout", "color")}
    )
    network = load_model(model, weights, options.device)
    if weights is None:
        print("fastfi: no --weights: the model is used as its factory made it", file=sys.stderr)
    total = source.length
    if options.limit is not None:
        total = options.limit if total is None else min(total, options.limit)
    metadata = {
        "fastfi.version": fastfi.__version__,
        "fastfi.config": config,
        "fastfi.torch": torch.__version__,
    }
    fi = array("d")  # 8 bytes per image, for the percentiles
    correct = 0
    start = time.perf_counter()
    with (
        progress(total, show_progress) as advance,
        ScoreFile(out, source.id_type, metadata, overwrite) as file,
    ):
        for scores in score(network, source, options):
            file.write(scores)
            fi.frombytes(scores.fi.tobytes())
            if scores.label is not None:
                correct += int((scores.label == scores.predicted).sum())
            advance(len(scores.ids))
    seconds = time.perf_counter() - start
    n = len(fi)
    print(percentile_table(np.frombuffer(fi)))
    accuracy = f", accuracy {correct / n:.2%}" if source.labelled else ""
    print(
        f"{n} images{accuracy}, {seconds:.1f} s, {n / seconds:,.0f} images/s, in {os.fspath(out)}"
    )
