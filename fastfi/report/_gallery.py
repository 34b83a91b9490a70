"""The most influential images and their maps, as PNG inside the page."""

from __future__ import annotations

import base64
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastfi._extras import require
from fastfi.data import ImageSource, select
from fastfi.errors import DataError, OptionError
from fastfi.plot.shared import as_images, displayed, grey_limits, pooled
from fastfi.report._sheet import Measure, Sheet
from fastfi.report._tables import number

__all__ = ["Item", "MapsFile", "items"]

_LONGEST = 256  # pixels of a picture's longer side
_MAP = "Magma"


@dataclass(frozen=True)
class Item:
    """One image of the gallery.

    Attributes:
        row: of the first set of scores.
        identity: its id, as text.
        label, predicted: names of classes, "" where there is none.
        wrong: whether they differ.
        fi: as text.
        image: a data URL of a PNG; "" where the image could not be read.
        maps: (title, data URL) for each scale.
        note: what is to be said about the picture.
        pixelated: whether it is so small that its pixels are shown as squares.
    """

    row: int
    identity: str
    label: str
    predicted: str
    wrong: bool
    fi: str
    image: str
    maps: list[tuple[str, str]]
    note: str
    pixelated: bool


def _png(pixels: NDArray[np.uint8], palette: list[int] | None = None) -> str:
    """A data URL of pixels [H, W] or [H, W, 3]."""
    image = require("PIL.Image", "drawing images", "report").fromarray(pixels)
    if palette is not None:
        image = image.convert("L").point(list(range(256)))
        image.putpalette(palette)
    if max(image.size) > _LONGEST:
        if palette is not None:
            image = image.convert("RGB")
        image.thumbnail((_LONGEST, _LONGEST))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _colours() -> list[int]:
    """256 colours of magma, red, green and blue in turn, between the ten that plotly has."""
    colours = require("plotly.colors", "writing reports", "report")
    stops = getattr(colours.sequential, _MAP)
    rgb = np.array([colours.hex_to_rgb(stop) for stop in stops], np.float64)  # [10, 3]
    at = np.linspace(0, len(rgb) - 1, 256)
    between = [np.interp(at, np.arange(len(rgb)), channel) for channel in rgb.T]
    return [int(v) for v in np.stack(between, 1).round().astype(np.uint8).ravel()]


def _scaled(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    share = (np.clip(values, low, high) - low) / (high - low if high > low else 1.0)
    return np.nan_to_num(share * 255).round().astype(np.uint8)


class MapsFile:
    """The maps of ``fastfi map --out maps.npz``; only those that are wanted are read.

    Raises:
        DataError: not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            if not {"maps", "id", "scales"} <= set(file.files):
                raise DataError(
                    f"{path}: expected the arrays maps, id and scales of fastfi map, got "
                    f"{', '.join(file.files) or 'none'}"
                )
            ids, self.scales = file["id"].tolist(), file["scales"].tolist()
            with file.zip.open("maps.npy") as member:
                self._shape, self._dtype = _header(member)
                self._start = member.tell()
        if len(self._shape) not in (4, 5) or self._shape[:2] != (len(ids), len(self.scales)):
            raise DataError(
                f"{path}: expected maps [{len(ids)}, {len(self.scales)}, ...], got "
                f"{list(self._shape)}"
            )
        self._at = {str(name): i for i, name in enumerate(ids)}

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with np.load(self.path) as file:
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                yield file
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: not an npz file of fastfi map ({error})") from error

    def read(self, ids: Sequence[int | str]) -> dict[int | str, NDArray[np.float32]]:
        """The maps of those ids that the file has, [S, C, H, W] or [S, H, W] each."""
        size = math.prod(self._shape[1:]) * self._dtype.itemsize
        found: dict[int | str, NDArray[np.float32]] = {}
        wanted = sorted((self._at[str(i)], i) for i in ids if str(i) in self._at)
        with self._open() as file, file.zip.open("maps.npy") as member:
            for at, name in wanted:
                member.seek(self._start + at * size)
                raw = np.frombuffer(member.read(size), self._dtype)
                found[name] = raw.reshape(self._shape[1:]).astype(np.float32)
        return found

    def pictures(
        self, maps: NDArray[np.float32], image: NDArray[np.float64]
    ) -> list[tuple[str, str]]:
        """One PNG for each scale, the mean over channels, with colours in common: from 0 to the
        largest finite value.

        Args:
            maps: [S, C, H, W] or [S, H, W].
            image: [1, C, H, W].
        """
        fi = pooled(maps, image, False, "mean")[0]  # [S, H, W]
        finite = fi[np.isfinite(fi)]
        low, high = min(0.0, float(finite.min(initial=0.0))), float(finite.max(initial=0.0))
        palette = _colours()
        return [
            (f"{k} x {k}", _png(_scaled(each, low, high), palette))
            for k, each in zip(self.scales, fi, strict=True)
        ]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an npy file, read up to its numbers."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind != "f" or fortran:
        raise ValueError(f"maps of dtype {dtype}" + ", Fortran order" * fortran)
    return shape, dtype


def _read(source: ImageSource, ids: Sequence[int | str]) -> dict[int | str, NDArray[np.float64]]:
    """The images of the ids, [1, C, H, W] each."""
    found: dict[int | str, NDArray[np.float64]] = {}
    try:
        chosen = select(source, [str(i) for i in ids])
    except OptionError as error:  # it speaks of ids that the user has not given
        reason = str(error).removeprefix("--ids: ")
        raise DataError(f"not the images that were scored: {reason}") from error
    for batch in chosen.batches(32):
        names: Sequence[int | str] = [*batch.ids]
        for name, x in zip(names, batch.x, strict=True):
            found[name] = as_images(x)[0]
    return found


def items(
    sheet: Sheet,
    measure: Measure,
    source: ImageSource,
    maps: MapsFile | None,
    names: dict[int, str],
    count: int,
) -> list[Item]:
    """The samples with the largest FI, in descending order, with their images.

    Raises:
        DataError: the ids of the scores are not those of the images.
    """
    if sheet.scores.id_type != source.id_type:
        kinds = {"int": "row numbers", "str": "paths"}
        raise DataError(
            f"{source.path}: its ids are {kinds[source.id_type]}, those of {sheet.scores.path} are "
            f"{kinds[sheet.scores.id_type]}: these are not the images that were scored"
        )
    fi = sheet.columns[measure.column]
    order = np.argsort(-np.nan_to_num(fi, nan=-1.0, posinf=np.inf), kind="stable")
    rows = [int(row) for row in order[:count] if not np.isnan(fi[row])]
    if not rows:
        return []
    ids = [sheet.ids[row] for row in rows]
    images = _read(source, ids)
    known = {} if maps is None else maps.read(ids)
    found = []
    for row in rows:
        image = images[sheet.ids[row]]
        pixels = displayed(image[0])
        limits = grey_limits(pixels)
        found.append(
            Item(
                row=row,
                identity=str(sheet.ids[row]),
                label=names.get(int(sheet.label[row]), ""),
                predicted=names.get(int(sheet.predicted[row]), ""),
                wrong=bool(sheet.wrong[row]),
                fi=number(float(fi[row])),
                image=_png(_scaled(pixels, *limits)),
                maps=[]
                if maps is None or sheet.ids[row] not in known
                else maps.pictures(known[sheet.ids[row]], image),
                note="" if limits == (0.0, 1.0) else "rescaled",
                pixelated=max(pixels.shape[:2]) < 96,
            )
        )
    return found
