"""The commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

import fastfi
from fastfi import doctor as doctor_module
from fastfi._checks import check_scales
from fastfi.cli import _options as o
from fastfi.cli._atomic import check_output
from fastfi.cli._batches import Normalisation, ScoreOptions
from fastfi.cli._figures import FigureFolder
from fastfi.cli._guard import reported, terminable
from fastfi.cli._map import known_ids, run_map
from fastfi.cli._mapfile import MapFile
from fastfi.cli._model import load_model, parse_device
from fastfi.cli._options import parse_bytes
from fastfi.cli._output import ScoreFile
from fastfi.cli._score import run_score
from fastfi.data import ImageSource, open_dataset, select
from fastfi.errors import OptionError

__all__ = ["app", "parse_bytes"]

app = typer.Typer(
    help="First-order local influence (FI) of neural network classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, which wraps paragraphs
)

# Options that do not decide what is computed; those of the inverse are in its repr.
_NO_CONFIG = ("out", "figures", "overwrite", "show_progress", "show_traceback")
_OF_INVERSE = ("rtol", "eps", "alpha")


def _config(given: Mapping[str, Any], rule: object, **parsed: Any) -> dict[str, Any]:
    """The options that decide the results, for a file's metadata."""
    config = {k: v for k, v in given.items() if k not in (*_NO_CONFIG, *_OF_INVERSE)}
    budget = given["memory_budget"]
    return {
        **config,
        "weights": None if given["weights"] is None else str(given["weights"]),
        "inverse": repr(rule),
        "memory_budget": None if budget is None else parse_bytes(budget),
        "mean": o.numbers("--mean", given["mean"]),
        "std": o.numbers("--std", given["std"]),
        **parsed,
    }


def _score_options(config: Mapping[str, Any], rule: object, *names: str) -> ScoreOptions:
    """``names``: options of the measure that only this command has."""
    shared = ("objective", "outputs", "lump", "memory_budget")
    return ScoreOptions(
        labels=config["labels"],
        influence={"inverse": rule, **{k: config[k] for k in (*shared, *names)}},
        device=parse_device(config["device"]),
        batch_size=config["batch_size"],
        limit=config["limit"],
        normalisation=Normalisation(config["mean"], config["std"]),
    )


def _open(data: Path | Sequence[Path], config: Mapping[str, Any]) -> ImageSource:
    keys = ("split", "image_key", "label_key", "layout", "color")
    return open_dataset(data, **{k: config[k] for k in keys})


def _model(
    model: str, weights: Path | None, device: torch.device, trainable: bool = False
) -> nn.Module:
    network = load_model(model, weights, device, trainable)
    if weights is None:
        print("fastfi: no --weights: the model is used as its factory made it", file=sys.stderr)
    return network


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "fastfi.version": fastfi.__version__,
        "fastfi.config": config,
        "fastfi.torch": torch.__version__,
    }


@app.callback()
def _main() -> None: ...


@app.command()
def doctor() -> None:
    """Print versions, which kernel each operator runs, and what is missing."""
    raise typer.Exit(doctor_module.main())


@app.command("score")
def score_command(
    context: typer.Context,  # its params are the options below, by name
    model: o.ModelOption,
    data: Annotated[
        Path,
        typer.Option(help=f"{o.FORMATS}."),
    ],
    out: Annotated[Path, typer.Option(help="scores.parquet or scores.csv.")],
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    labels: o.LabelsOption = "true",
    wrt: o.WrtOption = None,
    inverse: o.InverseOption = "exact",
    rtol: o.RtolOption = None,
    eps: o.EpsOption = None,
    alpha: o.AlphaOption = None,
    objective: o.ObjectiveOption = "cross_entropy",
    outputs: o.OutputsOption = "logits",
    lump: o.LumpOption = None,
    assume_full_rank: Annotated[
        bool, typer.Option("--assume-full-rank", help="Use the closed form: forward passes only.")
    ] = False,
    batch_size: o.BatchSizeOption = 256,
    memory_budget: o.MemoryBudgetOption = None,
    device: o.DeviceOption = "cpu",
    mean: o.MeanOption = "0",
    std: o.StdOption = "1",
    image_key: o.ImageKeyOption = None,
    label_key: o.LabelKeyOption = None,
    layout: o.LayoutOption = None,
    color: o.ColorOption = "auto",
    limit: o.LimitOption = None,
    overwrite: o.OverwriteOption = False,
    show_progress: o.ProgressOption = None,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Compute FI for every image of a data set.

    Writes the columns id, label (the data's own, empty if it has none), predicted, log_prob (of the
    label that FI is computed for, see --labels), fi and rank (empty for --inverse damped); or, with
    --wrt layers or names, one fi:NAME and one rank:NAME for each. The file appears only when it is
    complete.
    """
    with reported(show_traceback, "scores"), terminable():
        check_output(out, overwrite, ScoreFile.suffixes)
        rule = o.as_inverse(inverse, rtol, eps, alpha)
        config = _config(context.params, rule, data=str(data), wrt=o.as_wrt(wrt))
        options = _score_options(config, rule, "assume_full_rank", "wrt")
        source = _open(data, config)
        network = _model(model, weights, options.device, trainable=config["wrt"] != "input")
        run_score(network, source, options, out, overwrite, show_progress, _metadata(config))


@app.command("map")
def map_command(
    context: typer.Context,
    model: o.ModelOption,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help=f"{o.FORMATS}; or an image file (PNG, JPEG, ...), several of the same size if the "
            "option is repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="maps.npz or maps.parquet.")],
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for one PNG per image; its name follows from the image's id."),
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID,ID,...",
            help="Take only these images: row numbers, or paths within a folder. The order is that "
            "of the data.",
        ),
    ] = None,
    limit: o.LimitOption = None,
    scales: Annotated[str, typer.Option(help="Odd sizes of the windows in pixels.")] = "1,3,5,7",
    channels: Annotated[
        Literal["separate", "joint", "mean"],
        typer.Option(
            help="Perturb one colour channel at a time, all together, or take the mean of the "
            "separate maps."
        ),
    ] = "separate",
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    labels: o.LabelsOption = "predicted",
    inverse: o.InverseOption = "damped",
    rtol: o.RtolOption = None,
    eps: o.EpsOption = None,
    alpha: o.AlphaOption = None,
    objective: o.ObjectiveOption = "cross_entropy",
    outputs: o.OutputsOption = "logits",
    lump: o.LumpOption = None,
    batch_size: o.BatchSizeOption = 32,
    memory_budget: o.MemoryBudgetOption = None,
    device: o.DeviceOption = "cpu",
    mean: o.MeanOption = "0",
    std: o.StdOption = "1",
    image_key: o.ImageKeyOption = None,
    label_key: o.LabelKeyOption = None,
    layout: o.LayoutOption = None,
    color: o.ColorOption = "auto",
    overwrite: o.OverwriteOption = False,
    show_progress: o.ProgressOption = None,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Compute influence maps: FI of the square window around every pixel, at several sizes.

    An npz file holds maps (float32; images x scales x channels x height x width, without channels
    for joint and mean), scales, id, predicted, label (the data's own, left out if it has none),
    log_prob (of the label that FI is computed for, see --labels), rank (for exact and truncated)
    and config (JSON). A Parquet file has one row per image; its maps are flattened in the column
    map, their shape is in the metadata. The file and the figures appear only when all are complete.

    Figures show the images as they were read, before --mean and --std.
    """
    with reported(show_traceback, "maps"), terminable():
        check_output(out, overwrite, MapFile.suffixes)
        if ids and limit is not None:
            raise OptionError("expected --ids or --limit, got both")
        rule = o.as_inverse(inverse, rtol, eps, alpha)
        config = _config(
            context.params,
            rule,
            data=str(data[0]) if len(data) == 1 else [str(d) for d in data],
            ids=ids or None,
            scales=check_scales(o.integers("--scales", scales)),
        )
        options = _score_options(config, rule, "scales", "channels")
        source = _open(data, config)
        if ids:
            source = select(source, ids)
        folder = None
        if figures is not None:
            chosen = known_ids(source, limit)
            folder = FigureFolder(figures, chosen, overwrite)
            print(f"fastfi: {len(chosen)} figures to be drawn in {figures}", file=sys.stderr)
        network = _model(model, weights, options.device)
        run_map(network, source, options, out, overwrite, folder, show_progress, _metadata(config))
