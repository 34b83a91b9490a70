"""``fastfi report``: a page about one or two sets of scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastfi.cli import _options as o
from fastfi.cli._atomic import check_output
from fastfi.cli._guard import reported, terminable
from fastfi.data import open_dataset
from fastfi.errors import OptionError
from fastfi.report import SUFFIXES, write_report
from fastfi.scoring.result import open_scores

__all__ = ["report_command"]


def _names(text: str | None, count: int) -> list[str] | None:
    if text is None:
        return None
    # one name may hold commas
    names = [text.strip()] if count == 1 else [name.strip() for name in text.split(",")]
    if len(names) != count or not all(names) or len(set(names)) < count:
        wanted = "a name" if count == 1 else "two different names separated by a comma"
        raise OptionError(f"--names: expected {wanted}, got {text!r}")
    return names


def report_command(
    scores: Annotated[
        Path, typer.Argument(metavar="DIR", help="Scores: a folder, .parquet or .csv file.")
    ],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="DIR2", help="Scores to show beside them: of a test set, say."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="report.html.")] = Path("report.html"),
    images: Annotated[
        Path | None,
        typer.Option(help="The images that DIR has the scores of, for a gallery."),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(help="maps.npz of `fastfi map` on these images, shown beside them."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Of the sets of scores. [default: train,test]"),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many images the gallery shows.")] = 24,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    split: o.SplitOption = None,
    image_key: o.ImageKeyOption = None,
    label_key: o.LabelKeyOption = None,
    layout: o.LayoutOption = None,
    color: o.ColorOption = "auto",
    overwrite: o.OverwriteOption = False,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Write one HTML page about scores: every sample's FI by class with filters and a search,
    percentiles, the distribution, layers, the most influential images.

    With a second set of scores both are shown, and the Kolmogorov-Smirnov distance between them.
    The page holds all that it needs and makes no network request. --split, --image-key and the like
    are those of --images.
    """
    with reported(show_traceback, "report"), terminable():
        check_output(out, overwrite, SUFFIXES)
        paths = [scores] if other is None else [scores, other]
        called = _names(names, len(paths))
        if images is None and maps is not None:
            raise OptionError("--maps: expected --images too, beside which the maps are drawn")
        source = None
        if images is not None:
            source = open_dataset(
                images, split, image_key=image_key, label_key=label_key, layout=layout, color=color
            )
        elif color != "auto" or any((split, image_key, label_key, layout)):
            raise OptionError("--split and the like belong to --images, which was not given")
        opened = [open_scores(path) for path in paths]
        for each in opened:
            if not each.complete:
                print(f"fastfi: {each.path} is unfinished", file=sys.stderr)
        write_report(
            opened[0], out, *opened[1:], images=source, maps=maps, names=called, top=top,
            title=title, overwrite=overwrite,
        )  # fmt: skip
        rows = " and ".join(f"{len(each):,}" for each in opened)
        print(f"{rows} samples, {out.stat().st_size / 1e6:.1f} MB, in {out}")
