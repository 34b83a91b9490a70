"""The commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastfi import doctor as doctor_module
from fastfi._checks import check_scales
from fastfi.cli import _options as o
from fastfi.cli._atomic import check_output
from fastfi.cli._compare import compare_command
from fastfi.cli._figures import FigureFolder
from fastfi.cli._guard import reported, terminable
from fastfi.cli._map import known_ids, run_map
from fastfi.cli._mapfile import MapFile
from fastfi.cli._merge import merge_command
from fastfi.cli._options import parse_bytes
from fastfi.cli._report import report_command
from fastfi.cli._score_command import score_command
from fastfi.cli._shared import config_of, metadata_of, network_of, open_data, score_options
from fastfi.cli._summary_command import summary_command
from fastfi.data import select
from fastfi.errors import OptionError

__all__ = ["app", "parse_bytes"]

app = typer.Typer(
    help="First-order local influence (FI) of neural network classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, which wraps paragraphs
)


@app.callback()
def _main() -> None: ...


@app.command()
def doctor() -> None:
    """Print versions, which kernel each operator runs, and what is missing."""
    raise typer.Exit(doctor_module.main())


app.command("score")(score_command)
app.command("summary")(summary_command)
app.command("compare")(compare_command)
app.command("merge")(merge_command)
app.command("report")(report_command)


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
        config = config_of(
            context.params,
            rule,
            data=str(data[0]) if len(data) == 1 else [str(d) for d in data],
            ids=ids or None,
            scales=check_scales(o.integers("--scales", scales)),
        )
        options = score_options(config, rule, "scales", "channels")
        source = open_data(data, config)
        if ids:
            source = select(source, ids)
        folder = None
        if figures is not None:
            chosen = known_ids(source, limit)
            folder = FigureFolder(figures, chosen, overwrite)
            print(f"fastfi: {len(chosen)} figures to be drawn in {figures}", file=sys.stderr)
        network = network_of(model, weights, options.device)
        run_map(
            network, source, options, out, overwrite, folder, show_progress, metadata_of(config)
        )
