"""Chosen images of a data set."""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fastfi.data._source import Batch, ImageSource, SeekableSource
from fastfi.data.folder import EncodedFiles
from fastfi.errors import DataError, OptionError

__all__ = ["select"]

_LISTED = 8  # ids that an error lists


def select(source: ImageSource, texts: Sequence[str]) -> ImageSource:
    """The images of the given ids, in the data set's order.

    Args:
        source: the data set.
        texts: ids, or several ids separated by commas. A text that is an id of the data set as it
            stands is not taken apart.

    Returns:
        A source of these images. Folders and files read nothing else; other formats are read from
        the first chosen image to the last one.

    Raises:
        OptionError: no id, or an id that the data set does not have; the message says which ids it
            has.
    """
    known = _known(source)
    wanted = [part for text in texts for part in _parts(text, known)]
    if not wanted:
        raise OptionError("--ids: expected at least one id, got none")
    if source.id_type == "int":
        ids = [int(w) if w.isascii() and w.isdigit() else -1 for w in wanted]
        bad = [i < 0 or (known is not None and i not in known) for i in ids]
    else:
        bad = [known is not None and w not in known for w in wanted]
    unknown = [w for w, wrong in zip(wanted, bad, strict=True) if wrong]
    if unknown:
        raise OptionError(f"--ids: {source.path} has no image {_some(unknown)}; {_range(source)}")
    if isinstance(source, EncodedFiles):
        return source.only(set(wanted))
    return _Selected(source, set(ids) if source.id_type == "int" else set(wanted))


def _known(source: ImageSource) -> Container[int | str] | None:
    ids = source.ids()
    return ids if ids is None or isinstance(ids, range) else set(ids)


def _parts(text: str, known: Container[int | str] | None) -> list[str]:
    if known is not None and text in known:  # a path may hold commas
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def _range(source: ImageSource) -> str:
    known = source.ids()
    if isinstance(known, range):
        return f"its ids are 0 to {len(known) - 1}"
    if known is None:
        return "its ids are row numbers" if source.id_type == "int" else "its ids are paths"
    return f"its ids are {_some([str(k) for k in known])}"


class _Selected(SeekableSource):
    """The images whose ids are in a set, read from another source until all were found."""

    def __init__(self, source: ImageSource, wanted: set[Any]) -> None:
        self._source, self._wanted = source, wanted
        self.path, self.format, self.shape = source.path, source.format, source.shape
        self.labelled, self.classes, self.id_type = source.labelled, source.classes, source.id_type
        self.length = len(wanted)

    def ids(self) -> Sequence[int] | Sequence[str] | None:
        return sorted(self._wanted) if self.id_type == "int" else None

    def _span(
        self, batch_size: int, start: int, stop: int | None, keep_errors: bool
    ) -> Generator[Batch, None, None]:
        left = len(self._starts(1, start, stop))  # images to come
        wanted, begin, end, unwanted = self._wanted, 0, None, start
        if left and self.id_type == "int":  # row numbers, which say where to read
            rows = sorted(wanted)[start : start + left]
            wanted, begin, end, unwanted = set(rows), rows[0], rows[-1] + 1, 0
        if left == 0:
            return
        ids: list[Any] = []
        x: list[Tensor] = []
        y: list[Tensor] = []
        errors: dict[int, str] = {}
        with closing(self._source._span(batch_size, begin, end, keep_errors)) as blocks:
            for block in blocks:
                at = [i for i, name in enumerate(block.ids) if name in wanted]
                passed = at[:unwanted]  # chosen, but before the start
                unwanted -= len(passed)
                for i in at[len(passed) :]:
                    if i in block.errors:
                        errors[len(ids)] = block.errors[i]
                    ids.append(block.ids[i])
                    x.append(block.x[i].clone())  # not a view, which would keep the whole block
                    y += [] if block.y is None else [block.y[i]]
                    left -= 1
                    if len(ids) == batch_size or left == 0:
                        yield Batch(ids, torch.stack(x), torch.stack(y) if y else None, errors)
                        ids, x, y, errors = [], [], [], {}
                    if left == 0:
                        return
                del block
        raise DataError(f"{self.path}: {left} of the {len(self._wanted)} images are not there")
