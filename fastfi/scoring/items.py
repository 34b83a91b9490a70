"""What a data set's items mean: (x, y), (id, x, y), or the columns of a row."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfi.data._pixels import GRAY_MODES, RGB_MODES, stack
from fastfi.errors import InputError, LabelError
from fastfi.scoring.scorer import NO_LABEL, Samples

__all__ = ["Item", "Reader", "own_array"]

_X = ("image", "img", "images", "pixel_values", "x", "input", "inputs", "features")
_Y = ("label", "labels", "fine_label", "target", "targets", "y")
_ID = ("id", "ids", "image_id", "uid")


class Item(NamedTuple):
    """One sample, or a batch of them, as the data gave it; None where it has no such part."""

    id: Any
    x: Any
    y: Any


@dataclass(frozen=True)
class Reader:
    """Makes tensors of items.

    Attributes:
        transform: applied to each sample's x before anything else.
        keys: names of the id, x and y of items that are mappings; None looks for usual names.
    """

    transform: Callable[[Any], Any] | None = None
    keys: tuple[str | None, str | None, str | None] = (None, None, None)

    def item(self, given: Any) -> Item:
        """The parts of an item.

        Raises:
            InputError: it is neither x, (x, y), (id, x, y) nor a mapping with such columns.
        """
        if isinstance(given, Mapping):
            names = [
                _named(given, key, usual)
                for key, usual in zip(self.keys, (_ID, _X, _Y), strict=True)
            ]
            if names[1] is None:
                raise InputError(
                    f"data: expected a column of inputs ({' or '.join(_X)}), got "
                    f"{', '.join(map(str, given))}; x_key names it"
                )
            return Item(*(None if name is None else given[name] for name in names))
        if isinstance(given, (tuple, list)):
            if len(given) == 3:
                return Item(*given)
            if len(given) == 2:
                return Item(None, *given)
            if len(given) != 1:
                raise InputError(
                    f"data: expected (x, y) or (id, x, y), got a {type(given).__name__} of "
                    f"{len(given)}"
                )
            (given,) = given
        return Item(None, given, None)

    def class_names(self, dataset: Any) -> tuple[str, ...] | None:
        """The classes' names, if the data set knows them: torchvision's ``classes``, or those of
        the label column in Hugging Face's ``features``."""
        names = getattr(dataset, "classes", None)
        features = getattr(dataset, "features", None)
        if names is None and isinstance(features, Mapping):
            key = next((n for n in (self.keys[2], *_Y) if n is not None and n in features), None)
            names = getattr(features.get(key), "names", None)
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return tuple(names)
        return None

    def x(self, given: Any) -> Tensor:
        """One sample: tensors as they are, arrays as tensors, images as [C, H, W] in 0..1."""
        if self.transform is not None:
            given = self.transform(given)
        if isinstance(given, Tensor):
            return given.detach()
        if hasattr(given, "getbands") and hasattr(given, "convert"):
            return _of_pil(given)
        if isinstance(given, np.ndarray):
            return torch.from_numpy(np.array(given))
        if isinstance(given, (list, tuple)):
            return torch.tensor(given)
        raise InputError(
            f"data: expected x to be a tensor, an array or an image, got {type(given).__name__}; "
            "transform= can make a tensor of it"
        )

    def samples(self, ids: Sequence[Any], items: Sequence[Item | str]) -> Samples:
        """A batch of single samples.

        Args:
            ids: used where an item has no id of its own.
            items: or texts, for those that could not be read.
        """
        out_ids, xs, ys = [], [], []
        errors: dict[int, str] = {}
        for i, (position, item) in enumerate(zip(ids, items, strict=True)):
            name: Any = position
            x, y = None, NO_LABEL
            if isinstance(item, str):
                errors[i] = item
            else:
                try:
                    if item.id is not None:
                        name = None
                        name = identity(item.id)
                    y = NO_LABEL if item.y is None else label(item.y)
                    x = self.x(item.x)
                except Exception as error:  # transform is the user's code
                    errors[i] = f"{type(error).__name__}: {error}"
                    if name is None:  # told by its place instead
                        errors[i] = f"item {position}: {errors[i]}"
            out_ids.append(name)
            xs.append(x)
            ys.append(y)
        labels = torch.tensor(ys, dtype=torch.int64)
        y_all = labels if bool((labels != NO_LABEL).any()) else None
        return Samples(out_ids, stacked(xs), y_all, errors)

    def batch(self, first: int, item: Item) -> Samples:
        """A batch that came as one: x [b, ...], y [b].

        Args:
            first: position of its first sample.

        Raises:
            InputError, LabelError: its parts do not belong together.
        """
        errors: dict[int, str] = {}
        if self.transform is not None or not isinstance(item.x, (Tensor, np.ndarray)):
            xs: list[Tensor | None] = [None] * len(item.x)
            for i, given in enumerate(item.x):
                try:
                    xs[i] = self.x(given)
                except Exception as error:  # transform is the user's code
                    errors[i] = f"{type(error).__name__}: {error}"
            x: Any = stacked(xs)
        else:
            x = (
                item.x.detach()
                if isinstance(item.x, Tensor)
                else torch.from_numpy(own_array(item.x))
            )
        n = len(x)
        ids: Sequence[Any] = range(first, first + n)
        if item.id is not None:
            ids = [identity(i) for i in item.id]
        y = item.y if not isinstance(item.y, np.ndarray) else own_array(item.y)
        y = None if y is None else torch.as_tensor(y)
        if y is not None and (y.is_floating_point() or y.dtype == torch.bool or y.dim() != 1):
            raise LabelError(f"data: expected integer labels [{n}], got {y.dtype} {list(y.shape)}")
        if len(ids) != n or (y is not None and len(y) != n):
            raise InputError(
                f"data: expected as many ids and labels as samples, got {len(ids)} ids and "
                f"{'no' if y is None else len(y)} labels for {n} samples"
            )
        return Samples(ids, x, None if y is None else y.to(torch.int64), errors)


def stacked(xs: Sequence[Tensor | None]) -> Tensor | Sequence[Tensor | None]:
    """Samples as one tensor, where all are there and alike."""
    kinds = {None if x is None else (x.shape, x.dtype, x.device) for x in xs}
    return torch.stack(xs) if len(kinds) == 1 and None not in kinds else xs  # type: ignore[arg-type]


def _of_pil(image: Any) -> Tensor:
    """A PIL image as [C, H, W] in 0..1, as :mod:`fastfi.data` reads files."""
    if image.mode.startswith("I;16"):
        return stack([np.array(image).astype(np.uint16)])[0]
    if image.mode not in (*GRAY_MODES, *RGB_MODES):
        raise InputError(
            f"data: expected images of 8 or 16 bits, got a PIL image of mode {image.mode!r}; "
            "transform= can make a tensor of it"
        )
    return stack([np.array(image.convert("L" if image.mode in GRAY_MODES else "RGB"))])[0]


def own_array(array: NDArray[Any]) -> NDArray[Any]:
    """An array that torch can share: as it is where it may be written, else a copy."""
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()


def is_batch(item: Item) -> bool:
    """Whether an item of an iterable is a batch: it has as many labels as samples."""
    several = getattr(item.y, "ndim", 0) == 1 or isinstance(item.y, (list, tuple))
    return several and hasattr(item.x, "__len__") and len(item.y) == len(item.x)


def identity(given: Any) -> int | str:
    """An id as an int or a str.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim == 0:
        given = given.item()
    if isinstance(given, (str, os.PathLike)):
        return str(given)
    if _whole(given):
        return int(given)
    raise InputError(
        f"data: expected ids to be integers of 64 bits or strings, got {type(given).__name__} "
        f"{str(given)[:50]}"
    )


def _whole(given: Any) -> bool:
    integer = isinstance(given, numbers.Integral) and not isinstance(given, bool)
    return integer and -(2**63) <= int(given) < 2**63


def label(given: Any) -> int:
    """A single label as an int.

    Raises:
        LabelError: it is no integer.
    """
    if isinstance(given, (Tensor, np.ndarray)) and math.prod(given.shape) == 1:
        given = given.item()
    if _whole(given):
        return int(given)
    raise LabelError(
        f"data: expected integer labels, got {type(given).__name__} "
        f"{list(given.shape) if hasattr(given, 'shape') else repr(given)}"
    )


def _named(row: Mapping[str, Any], key: str | None, usual: Sequence[str]) -> str | None:
    if key is not None and key not in row:
        raise InputError(f"data: expected a column {key!r}, got {', '.join(map(str, row))}")
    return key or next((name for name in usual if name in row), None)
