"""Batches of a data set through a model, one after the other.

One batch of images is held at a time; with the model on a GPU, two: the next one is read and copied
while one is worked on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastfi.data import Batch, ImageSource
from fastfi.errors import FastfiError, OptionError, OutputError, SampleError
from fastfi.scoring.prefetch import on_device

__all__ = ["Labels", "Normalisation", "ScoreOptions", "process"]

Labels = Literal["true", "predicted"]
T = TypeVar("T")
_LISTED = 8  # images that an error lists


@dataclass(frozen=True)
class Normalisation:
    """(x - mean) / std, per colour channel.

    Attributes:
        mean, std: one number for all channels, or one each.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def check(self, channels: int) -> None:
        """Raises OptionError unless the numbers fit the channels."""
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (1, channels):
                raise OptionError(
                    f"{name}: expected 1 number or {channels}, one per channel, got {len(values)}"
                )
            if not all(map(math.isfinite, values)):
                raise OptionError(f"{name}: expected finite numbers, got {list(values)}")
        if min(self.std) <= 0:
            raise OptionError(f"--std: expected positive numbers, got {list(self.std)}")

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return not any(self.mean) and set(self.std) == {1.0}

    def __call__(self, x: Tensor) -> Tensor:
        """[C, H, W] or [B, C, H, W] to the same shape; x stays as it is."""
        if self.idle:
            return x
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean).div_(std)

    on_batch = __call__  # fastfi.score may call it with many images at once


@dataclass(frozen=True)
class ScoreOptions:
    """What to compute of every image.

    Attributes:
        labels: "true": of the data's labels (the paper's Setup 1); "predicted": of the model's
            predictions (Setups 3 and 4).
        influence: keyword arguments of :func:`fastfi.evaluate.evaluate`, or of
            :func:`fastfi.influence_map`.
        device: where the model is.
        batch_size: images read and scored at once.
        limit: score only so many images; None for all.
        normalisation: applied to the pixels.
    """

    labels: Labels
    influence: dict[str, Any]
    device: torch.device
    batch_size: int = 256
    limit: int | None = None
    normalisation: Normalisation = Normalisation()


def process(
    model: nn.Module,
    source: ImageSource,
    options: ScoreOptions,
    work: Callable[[Tensor, Tensor | None, Batch], T],
) -> Iterator[T]:
    """Calls ``work`` with one batch after the other, in order.

    Args:
        model: in evaluation mode, on ``options.device``.
        source: the images.
        options: see :class:`ScoreOptions`.
        work: called with the normalised images [b, C, H, W] on the device, the labels [b] or None
            (the predicted ones), and the batch as it was read.

    Yields:
        What ``work`` returns.

    Raises:
        OptionError: true labels of a data set without labels; not enough memory.
        LabelError, NonFiniteError: a batch that cannot be scored; the message names the images.
        DataError: the data cannot be read.
        OutputError: the model fails on the images.
    """
    options.normalisation.check(source.shape[0])
    if options.labels == "true" and not source.labelled:
        raise OptionError(
            f"{source.path} has no labels; --labels predicted uses the model's predictions"
        )
    first = True
    try:
        batches = on_device(source.batches(options.batch_size, options.limit), options.device)
        with closing(batches):
            for batch, x in batches:
                x = options.normalisation(x)
                if first:
                    _try(model, x[:1])
                    first = False
                try:
                    yield work(x, batch.y if options.labels == "true" else None, batch)
                except SampleError as error:
                    raise _named(error, batch, source) from error
                del batch, x
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"not enough memory on {options.device} for batches of {options.batch_size}: "
            f"choose a smaller --batch-size or --memory-budget ({error})"
        ) from error


def _try(model: nn.Module, x: Tensor) -> None:
    """Runs the model on one image, so that its own failures are told apart from fastfi's."""
    try:
        with torch.no_grad():
            model(x.clone())
    except Exception as error:  # the user's code
        raise OutputError(
            f"the model fails on an image of shape {list(x.shape)} ({x.dtype}, {x.device}): "
            f"{type(error).__name__}: {error}"
        ) from error


def _named(error: SampleError, batch: Batch, source: ImageSource) -> FastfiError:
    """The same error, naming the images instead of positions in a batch."""
    ids = [str(batch.ids[i]) for i in error.indices[:_LISTED]]
    more = f" and {len(error.indices) - _LISTED} more" if len(error.indices) > _LISTED else ""
    which = f"{'image' if len(error.indices) == 1 else 'images'} {', '.join(ids)}{more}"
    begin = f" (positions in the batch that begins with {batch.ids[0]})"
    return type(error)(f"{source.path}, {which}: {error}{begin}", error.indices)
