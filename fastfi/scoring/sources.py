"""Recognises what :func:`fastfi.score` was given."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fastfi.data import ImageSource
from fastfi.data.folder import EncodedFiles
from fastfi.errors import InputError, OptionError
from fastfi.scoring.items import Reader, own_array
from fastfi.scoring.mapped import WORKER_OPTIONS, MapSource
from fastfi.scoring.source import Source
from fastfi.scoring.streamed import ImagesSource, StreamSource

__all__ = ["as_source"]


def _of_loader(loader: Any, reader: Reader, limit: int | None) -> Source:
    if loader.drop_last and isinstance(loader.dataset, IterableDataset):
        raise OptionError("data: expected a DataLoader that yields all samples, got drop_last=True")
    if isinstance(loader.dataset, IterableDataset):
        return StreamSource(loader, reader, loader.batch_size is not None, limit)
    sampler = loader.sampler
    if type(loader.batch_sampler) is BatchSampler:
        sampler = loader.batch_sampler.sampler  # loader.sampler means nothing beside it
    elif loader.batch_sampler is not None:
        sampler = itertools.chain.from_iterable(loader.batch_sampler)
    if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise OptionError(
            "data: expected a DataLoader that reads in a fixed order (shuffle=False), got a "
            f"{type(sampler).__name__}: an interrupted run could not be continued"
        )
    if isinstance(sampler, DistributedSampler):
        raise OptionError(
            "data: expected the whole data set in every process, got a DistributedSampler; under "
            "torchrun, fastfi.score divides the rows itself"
        )
    order = None if isinstance(sampler, SequentialSampler) else list(sampler)
    if order is not None and not all(isinstance(i, numbers.Integral) for i in order):
        raise OptionError(
            "data: expected a sampler of numbers of samples, got one of "
            f"{type(next(i for i in order if not isinstance(i, numbers.Integral))).__name__}; "
            "batches of them belong into batch_sampler="
        )
    own = loader.collate_fn
    standard = getattr(own, "__module__", "").startswith("torch.utils.data")
    names = (*WORKER_OPTIONS, "worker_init_fn", "generator", "pin_memory")
    options = {name: getattr(loader, name) for name in names}
    return MapSource(loader.dataset, reader, order, None if standard else own, options, limit)


def _whole_arrays(parts: Sequence[Any]) -> bool:
    """Whether these are x, or x and y, or ids, x and y, of all samples: the labels tell."""
    if not all(isinstance(part, (Tensor, np.ndarray)) and part.ndim > 0 for part in parts):
        return False
    if isinstance(parts, tuple):
        return True
    labels = parts[-1]  # of a list, which may as well be a data set of so many samples
    integers = not (labels.is_floating_point() if isinstance(labels, Tensor) else
                    labels.dtype.kind == "f")  # fmt: skip
    return len(parts) > 1 and labels.ndim == 1 and integers and len(labels) == len(parts[-2])


def as_source(data: Any, reader: Reader, limit: int | None = None) -> Source:
    """A source of what :func:`fastfi.score` was given.

    Raises:
        InputError: it is no data set.
        OptionError: a DataLoader that reads in random order.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        data = (data,)
    if isinstance(data, (tuple, list)) and 1 <= len(data) <= 3 and _whole_arrays(data):
        if isinstance(data, list):
            raise InputError(
                "data: expected a tuple (x, y) of whole tensors or arrays, got a list of them"
            )
        lengths = [len(part) for part in data]
        if len(set(lengths)) > 1:
            raise InputError(f"data: expected tensors of one length, got {lengths}")
        data = TensorDataset(
            *(
                part if isinstance(part, Tensor) else torch.from_numpy(own_array(part))
                for part in data
            )
        )
    if isinstance(data, DataLoader):
        return _of_loader(data, reader, limit)
    if isinstance(data, ImageSource) and not isinstance(data, EncodedFiles):
        return ImagesSource(data, reader, limit)
    readable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    readable = readable and not isinstance(data, IterableDataset)  # which inherits the first
    if readable and not isinstance(data, (str, bytes, Mapping)):
        return MapSource(data, reader, limit=limit)
    if hasattr(data, "__iter__") and not isinstance(data, (str, bytes, Mapping)):
        return StreamSource(data, reader, limit=limit)
    raise InputError(
        "data: expected a Dataset, a DataLoader, tensors (x, y) or an iterable of (x, y), got "
        f"{type(data).__name__}"
    )
