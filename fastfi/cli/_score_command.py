"""The options of ``fastfi score``: one file, or a folder that a killed run can be continued in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastfi.cli import _options as o
from fastfi.cli._atomic import check_output
from fastfi.cli._guard import reported, terminable
from fastfi.cli._output import ScoreFile
from fastfi.cli._score import run_score
from fastfi.cli._score_folder import run_score_folder
from fastfi.cli._shared import config_of, metadata_of, network_of, open_data, score_options
from fastfi.errors import OptionError
from fastfi.scoring.parts import PART_ROWS, PART_SECONDS

__all__ = ["score_command"]

# Options that mean something for a folder only, and what they are when they are not given.
_OF_FOLDER: dict[str, Any] = {
    "workers": 0,
    "strict": False,
    "resume": True,
    "part_rows": PART_ROWS,
    "part_seconds": PART_SECONDS,
    "shard": None,
}


def score_command(
    context: typer.Context,  # its params are the options below, by name
    model: o.ModelOption,
    data: Annotated[
        Path,
        typer.Option(help=f"{o.FORMATS}."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="A folder, which can be continued later; or scores.parquet, scores.csv."),
    ],
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    labels: Annotated[
        Literal["true", "predicted", "both"],
        typer.Option(
            help="Whose influence: of the true or of the predicted label; or of both, in a folder."
        ),
    ] = "true",
    wrt: o.WrtOption = None,
    inverse: o.InverseOption = "exact",
    rtol: o.RtolOption = None,
    eps: o.EpsOption = None,
    alpha: o.AlphaOption = None,
    objective: Annotated[
        str,
        typer.Option(
            help="cross_entropy, logit, margin, entropy or nll_of_others; several, separated by "
            "commas, in a folder."
        ),
    ] = "cross_entropy",
    outputs: o.OutputsOption = "logits",
    lump: o.LumpOption = None,
    assume_full_rank: Annotated[
        bool, typer.Option("--assume-full-rank", help="Use the closed form: forward passes only.")
    ] = False,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Images worked on at once; auto tries sizes on the way (a file: 256).",
        ),
    ] = "auto",
    memory_budget: o.MemoryBudgetOption = None,
    device: o.DeviceOption = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read an image folder.")] = 0,
    mean: o.MeanOption = "0",
    std: o.StdOption = "1",
    image_key: o.ImageKeyOption = None,
    label_key: o.LabelKeyOption = None,
    layout: o.LayoutOption = None,
    color: o.ColorOption = "auto",
    limit: o.LimitOption = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop where an image fails, instead of noting its error."),
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with what the folder holds, or refuse to.")
    ] = True,
    part_rows: Annotated[int, typer.Option(min=1, help="Rows of a part at most.")] = PART_ROWS,
    part_seconds: Annotated[
        float, typer.Option(min=0.1, help="Write a part after so many seconds at the latest.")
    ] = PART_SECONDS,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Score share K of N, K from 0, into a folder of its own; fastfi merge joins them.",
        ),
    ] = None,
    overwrite: o.OverwriteOption = False,
    show_progress: o.ProgressOption = None,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Compute FI for every image of a data set.

    Writes the columns id, label (the data's own, empty if it has none), predicted, log_prob (of the
    label that FI is computed for, see --labels), fi and rank (empty for --inverse damped); or, with
    --wrt layers or names, one fi:NAME and one rank:NAME for each.

    A folder gets Parquet parts, complete or not there, and the same command goes on where it was
    stopped, however it was. An image that fails becomes a row whose column error says why. With
    --labels both there are predicted_log_prob, predicted_fi and predicted_rank, too; several
    objectives make columns fi@OBJECTIVE. Under torchrun the processes share the images.

    A single file appears only when it is complete, and the first image that fails stops the run.
    """
    single = out.suffix.lower() in ScoreFile.suffixes
    kept = None if single else f"what was scored is in {out}: the same command goes on"
    with reported(show_traceback, "scores", kept), terminable():
        rule = o.as_inverse(inverse, rtol, eps, alpha)
        names = [name.strip() for name in objective.split(",")]
        size = _size(batch_size)
        known: dict[str, Any] = {"data": str(data), "wrt": o.as_wrt(wrt)}
        if single:
            _refuse(context, out, labels, names)
            check_output(out, overwrite, ScoreFile.suffixes)
            params = {k: v for k, v in context.params.items() if k not in _OF_FOLDER}
            known["batch_size"] = 256 if size == "auto" else size
            config = config_of(params, rule, **known)
            options = score_options(config, rule, "assume_full_rank", "wrt")
            source = open_data(data, config)
            network = network_of(model, weights, options.device, config["wrt"] != "input")
            run_score(network, source, options, out, overwrite, show_progress, metadata_of(config))
            return
        if out.suffix and not out.is_dir():
            raise OptionError(
                f"--out {out}: expected a name ending in .parquet or .csv, or a folder: a name "
                "without such an ending"
            )
        known["shard"] = _shard(shard)
        config = config_of(context.params, rule, **known, batch_size=size)
        source = open_data(data, config, keep_errors=not strict)
        run_score_folder(source, config, rule, names, out, overwrite, show_progress)


def _size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise OptionError(f"--batch-size: expected a number from 1 up, or auto, got {text!r}")
    return int(text)


def _shard(text: str | None) -> tuple[int, int] | None:
    match = None if text is None else re.fullmatch("([0-9]+)/([0-9]+)", text)
    if text is not None and (match is None or not int(match[1]) < int(match[2])):
        raise OptionError(f"--shard: expected K/N with K from 0 to N - 1, got {text!r}")
    return None if match is None else (int(match[1]), int(match[2]))


def _refuse(context: typer.Context, out: Path, labels: str, objectives: list[str]) -> None:
    """OptionError for options that a single file does not have."""
    given = [
        f"--{name.replace('_', '-')}"
        for name, default in _OF_FOLDER.items()
        if context.params[name] != default
    ]
    given += ["--labels both"] * (labels == "both")
    given += ["several objectives"] * (len(objectives) > 1)
    if given:
        raise OptionError(f"{given[0]}: expected --out to be a folder, got the file {out}")
