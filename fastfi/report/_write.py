"""``write_report``: everything that the page holds, gathered."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fastfi
from fastfi.errors import OptionError
from fastfi.report._figures import distributions, figures, limits, profiles, styles
from fastfi.report._gallery import Item, MapsFile, items
from fastfi.report._pack import class_list, pack, pack_sheet, within
from fastfi.report._page import Page, check_target, write_page
from fastfi.report._sheet import Measure, Sheet, common_measures, read_sheet
from fastfi.report._tables import HEADS, MOST_ROWS, about, counts, groups, titles

if TYPE_CHECKING:
    from fastfi.data import ImageSource
    from fastfi.scoring.result import Scores

__all__ = ["write_report"]

_LISTED = 20  # errors in the table
_NAMES = ("train", "test")


def write_report(
    scores: Scores | str | PathLike[str],
    path: str | PathLike[str],
    other: Scores | str | PathLike[str] | None = None,
    *,
    images: ImageSource | str | PathLike[str] | None = None,
    maps: str | PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    top: int = 24,
    title: str | None = None,
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes one HTML page about a set of scores, or about two of them side by side.

    It holds a Manhattan plot of FI by class with filters and a search by id, the percentiles of
    Table 2 of Shu and Zhu (AAAI 2019) for all samples and for each class, histograms and empirical
    distributions, with two sets their Kolmogorov-Smirnov distances, a profile of the layers where
    FI of several blocks was computed, the most influential images where they are given, the errors,
    and what the scores were computed from. The page asks nothing of the network, and its security
    policy forbids it. The numbers in its plot and its search have about six digits; tables are
    computed from all.

    Args:
        scores: what :func:`fastfi.open_scores` opens, or its result.
        path: the page, ending in .html or .htm. It appears complete or not at all.
        other: a second set of scores, of the same columns of FI (others are left out).
        images: the data set of ``scores`` (not of ``other``): what
            :func:`fastfi.data.open_dataset` returns, or opens without further options. Its ids must
            be those of the scores: row numbers, or paths.
        maps: the npz file of ``fastfi map`` on these images, drawn beside those that it holds.
        names: of the sets; ("train", "test") for two, the name of the folder or file for one.
        top: how many images are shown, at least 0.
        title: of the page.
        class_names: in the order of their numbers; None takes those stored with the scores, or
            those of the images.
        overwrite: whether an existing file is replaced.

    Returns:
        The path.

    Raises:
        OptionError: an option has no meaning, or the file is there already.
        DataError: no scores, no samples, no FI in common, images or maps that do not belong to the
            scores.
        MissingExtraError: plotly, jinja2, pyarrow or Pillow is not installed.
        WriteError: the page cannot be written.
    """
    target = Path(path)
    check_target(target, overwrite)
    every = [_opened(s) for s in (scores, other) if s is not None]
    called = _names(every, names)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise OptionError(f"top: expected an integer of at least 0, got {top!r}")
    if maps is not None and images is None:
        raise OptionError("maps: expected images too, beside which the maps are drawn")
    wanted = common_measures(every)
    sheets = [read_sheet(s, name, wanted) for s, name in zip(every, called, strict=True)]
    source = _source(images)
    classes = class_list(sheets)
    class_texts = _class_texts(classes, every, source, class_names)
    gallery: list[Item] = []
    if source is not None:
        stored = None if maps is None else MapsFile(Path(maps))
        gallery = items(sheets[0], wanted[0], source, stored, class_texts, top)
    page = _page(sheets, wanted, classes, class_texts, gallery, title)
    write_page(page, target)
    return target


def _opened(scores: Scores | str | PathLike[str]) -> Scores:
    from fastfi.scoring.result import Scores as Class
    from fastfi.scoring.result import open_scores

    return scores if isinstance(scores, Class) else open_scores(scores)


def _names(every: Sequence[Scores], names: Sequence[str] | None) -> list[str]:
    if names is None:
        path = every[0].path
        return list(_NAMES) if len(every) == 2 else [path.resolve().name]
    fits = not isinstance(names, str) and len(names) == len(every) and all(names)
    if not fits or len(set(names)) < len(names):
        raise OptionError(f"names: expected {len(every)} different names, got {names!r}")
    return list(names)


def _source(images: ImageSource | str | PathLike[str] | None) -> ImageSource | None:
    if images is None:
        return None
    from fastfi.data import ImageSource as Class
    from fastfi.data import open_dataset

    return images if isinstance(images, Class) else open_dataset(Path(images))


def _class_texts(
    classes: Sequence[int],
    every: Sequence[Scores],
    source: ImageSource | None,
    given: Sequence[str] | None,
) -> dict[int, str]:
    """Names of the classes; their numbers where there is none."""
    stored = [s.class_names for s in every] + [None if source is None else source.classes]
    known = given if given is not None else next((n for n in stored if n is not None), ())
    return {k: str(known[k]) if k < len(known) else str(k) for k in classes}


def _page(
    sheets: list[Sheet],
    wanted: list[Measure],
    classes: list[int],
    class_texts: dict[int, str],
    gallery: list[Item],
    title: str | None,
) -> Page:
    drawn = within(sheets, wanted)
    blocks = list(dict.fromkeys(m.block for m in wanted))
    held = list(dict.fromkeys(m.block for m in drawn))
    variants = titles(sheets, wanted)
    tables, rows = {}, 0
    for measure in drawn:
        each = rows + (len(classes) + 1) * len(sheets) <= MOST_ROWS
        tables[measure.column] = groups(sheets, measure, class_texts, each)
        rows += sum(len(group.rows) for group in tables[measure.column])
    return Page(
        title=title or "FI of " + " and ".join(sheet.name for sheet in sheets),
        sets=[sheet.name for sheet in sheets],
        counts=[counts(sheet) for sheet in sheets],
        errors=[
            [(str(sheet.ids[row]), text) for row, text in sheet.errors[:_LISTED]]
            for sheet in sheets
        ],
        more_errors=[max(0, len(sheet.errors) - _LISTED) for sheet in sheets],
        about=[about(sheet, fastfi.__version__) for sheet in sheets],
        heads=HEADS,
        tables=tables,
        by="true class" if any(sheet.labelled for sheet in sheets) else "predicted class",
        gallery=gallery,
        gallery_of=variants[wanted[0].variant]
        + (f", layer {wanted[0].block}" if wanted[0].block else ""),
        variants=variants,
        blocks=held if len(blocks) > 1 else [],
        left_out=len(blocks) - len(held),
        profiled=len(blocks) > 1,
        flat=_flat(sheets),
        labelled=any(sheet.labelled for sheet in sheets),
        classes=[(k, class_texts[k]) for k in classes],
        data={
            "sheets": [pack_sheet(sheet, drawn, classes) for sheet in sheets],
            "measures": [_measure(sheets, measure) for measure in drawn],
            "classes": [class_texts[k] for k in classes],
            "titles": variants,
            "blocks": blocks,
            "profiles": _profiles(sheets, wanted, blocks) if len(blocks) > 1 else None,
            "figures": figures(sheets, blocks, max(map(len, class_texts.values()), default=0) > 3),
            "styles": styles(sheets, blocks),
        },
    )


def _flat(sheets: Sequence[Sheet]) -> bool:
    """Whether FI is exact, the same in all layers of full rank."""
    config = sheets[0].scores.config or {}
    return str(config.get("inverse", "")).lower().startswith("exact")


def _measure(sheets: Sequence[Sheet], measure: Measure) -> dict[str, Any]:
    found = distributions(sheets, measure)
    packed = {
        name: {axis: [pack(np.asarray(values)) for values in of] for axis, of in axes.items()}
        for name, axes in found.items()
    }
    return {
        "column": measure.column,
        "variant": measure.variant,
        "block": measure.block,
        "logProb": measure.log_prob,
        "rank": measure.rank,
        **limits(sheets, measure),
        **packed,
    }


def _profiles(
    sheets: Sequence[Sheet], wanted: Sequence[Measure], blocks: Sequence[str]
) -> dict[str, Any]:
    variants = dict.fromkeys(m.variant for m in wanted)
    return {v: [pack(y) for y in profiles(sheets, wanted, blocks, v)] for v in variants}
