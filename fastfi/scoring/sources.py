"""Recognises what :func:`fastfi.score` was given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

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
from fastfi.scoring.items import Reader
from fastfi.scoring.mapped import WORKER_OPTIONS, MapSource
from fastfi.scoring.source import Source
from fastfi.scoring.streamed import ImagesSource, StreamSource

__all__ = ["as_source"]


def _of_loader(loader: Any, reader: Reader, limit: int | None) -> Source:
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
    order = None if isinstance(sampler, SequentialSampler) else [int(i) for i in sampler]
    own = loader.collate_fn
    standard = getattr(own, "__module__", "").startswith("torch.utils.data")
    names = (*WORKER_OPTIONS, "worker_init_fn", "generator", "pin_memory")
    options = {name: getattr(loader, name) for name in names}
    return MapSource(loader.dataset, reader, order, None if standard else own, options, limit)


def as_source(data: Any, reader: Reader, limit: int | None = None) -> Source:
    """A source of what :func:`fastfi.score` was given.

    Raises:
        InputError: it is no data set.
        OptionError: a DataLoader that reads in random order.
    """
    if isinstance(data, Tensor) or (
        isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data)
    ):
        data = TensorDataset(*((data,) if isinstance(data, Tensor) else data))
    if isinstance(data, DataLoader):
        return _of_loader(data, reader, limit)
    if isinstance(data, ImageSource) and not isinstance(data, EncodedFiles):
        return ImagesSource(data, reader, limit)
    readable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if readable and not isinstance(data, (str, bytes, Mapping)):
        return MapSource(data, reader, limit=limit)
    if hasattr(data, "__iter__") and not isinstance(data, (str, bytes, Mapping)):
        return StreamSource(data, reader, limit=limit)
    raise InputError(
        "data: expected a Dataset, a DataLoader, tensors (x, y) or an iterable of (x, y), got "
        f"{type(data).__name__}"
    )
