"""``fastfi compare``: two sets of scores side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from fastfi._extras import require
from fastfi.cli import _options as o
from fastfi.cli._atomic import check_output
from fastfi.cli._guard import reported, terminable
from fastfi.cli._show import Cell, number, one_line, show_json, show_table
from fastfi.cli._summary_command import SPARE, percentile_heads, state
from fastfi.errors import OptionError
from fastfi.scoring.comparison import Comparison, compare
from fastfi.scoring.files import write_file
from fastfi.scoring.percentiles import PERCENTILES
from fastfi.scoring.result import open_scores

__all__ = ["compare_command"]

FIGURES = (".png", ".pdf", ".svg")


def _names(text: str | None, paths: tuple[Path, Path]) -> tuple[str, str]:
    """The names of both: as given, or the last parts of the paths where these differ."""
    if text is None:
        a, b = (path.stem or str(path) for path in paths)
        return (a, b) if a != b else (str(paths[0]), str(paths[1]))
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names):
        raise OptionError(f"--names: expected two names separated by a comma, got {text!r}")
    return names[0], names[1]


def _check_figure(path: Path, overwrite: bool) -> None:
    require("matplotlib", "drawing figures", "plot")
    check_output(path, overwrite, FIGURES, option="--figure")


def _draw(result: Comparison, names: tuple[str, str], path: Path, overwrite: bool) -> None:
    """The file appears when it is complete."""
    from fastfi import plot

    figure = plot.compare(result, names=names)

    def save(file: BinaryIO) -> None:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=200)
        check_output(path, overwrite, FIGURES, option="--figure")  # again: minutes may have passed

    write_file(path, save)


def _as_dict(result: Comparison, names: tuple[str, str], paths: tuple[Path, Path]) -> Any:
    pairs = result.pairs
    each = zip(names, paths, result.columns, result.rows, result.values, strict=True)
    return {
        "scores": [
            {
                "name": name,
                "path": str(path),
                "column": column,
                "rows": rows,
                "scored": len(values),
                "only": result.only[i],
                "percentiles": result.percentiles[i],
            }
            for i, (name, path, column, rows, values) in enumerate(each)
        ],
        "ks": result.ks,
        "p_value": result.p_value,
        "matched": result.matched,
        "paired": 0 if pairs is None else len(pairs.ids),
        "unpaired": result.unpaired,
        "spearman": None if pairs is None else pairs.spearman,
        "same_label": _count(None if pairs is None else pairs.same_label),
        "same_prediction": _count(None if pairs is None else pairs.same_prediction),
        "same_data": result.same_data,
    }


def _count(same: Any) -> int | None:
    return None if same is None else int(same.sum())


def _show(result: Comparison, names: tuple[str, str]) -> None:
    rows = [
        [name, column, f"{len(values):,}", *(number(of[q]) for q in PERCENTILES)]
        for name, column, values, of in zip(
            names, result.columns, result.values, result.percentiles, strict=True
        )
    ]
    head = [Cell("", right=False), Cell("column", right=False), Cell("scored"), *percentile_heads()]
    show_table(head, rows, spare=SPARE)
    print(f"\nKolmogorov-Smirnov distance {result.ks:.4g}, p = {result.p_value:.3g}")
    pairs = result.pairs
    if pairs is None:
        print(one_line(f"not paired: {result.unpaired}"))
        return
    alone = [f"{n:,} only in {name}" for n, name in zip(result.only, names, strict=True) if n]
    print(one_line(", ".join([f"{result.matched:,} samples in both", *alone])))
    said = [f"{len(pairs.ids):,} pairs of scores"]
    if pairs.spearman is not None:
        said.append(f"Spearman correlation {pairs.spearman:.4f}")
    for same, what in ((pairs.same_label, "label"), (pairs.same_prediction, "prediction")):
        if same is not None:
            said.append(f"same {what} {int(same.sum()):,}")
    print(", ".join(said))
    if result.same_data is False:
        print("the data differ (by their digests): pairs are of samples with the same id")


def compare_command(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Scores: a folder, .parquet or .csv file.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The scores to compare with.")],
    column: Annotated[
        str | None, typer.Option(help="Column of both. Default: the first of FI.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw to this .png, .pdf or .svg file: each sample's two scores where samples are "
            "in both, otherwise the two distributions."
        ),
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="For tables and figures.")
    ] = None,
    overwrite: o.OverwriteOption = False,
    as_json: o.JsonOption = False,
    show_traceback: o.TracebackOption = False,
) -> None:
    """Compare two sets of scores: percentiles, Kolmogorov-Smirnov distance, and, where both hold
    the same samples, rank correlation.

    Samples are paired by their ids where more than half of either side's are in the other. Those
    with an error do not count.
    """
    with reported(show_traceback, "figures"), terminable():
        called = _names(names, (first, second))
        if figure is not None:
            _check_figure(figure, overwrite)
        opened = open_scores(first), open_scores(second)
        for name, scores in zip(called, opened, strict=True):
            unfinished = state(scores)
            if unfinished is not None:
                print(one_line(f"fastfi: {name}: {unfinished}"), file=sys.stderr)
        result = compare(*opened, column)
        if figure is not None:
            _draw(result, called, figure, overwrite)
        if as_json:
            show_json(_as_dict(result, called, (first, second)))
        else:
            _show(result, called)
