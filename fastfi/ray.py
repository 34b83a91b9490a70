"""Scores of a data set on a cluster, by Ray Data: ``from fastfi.ray import Scorer``.

Needs Ray Data (``pip install "fastfi[ray]"``), and fastfi on every machine of the cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfi._extras import require
from fastfi.cli._weights import load_weights
from fastfi.data._pixels import Color, ImageDecoder, stack, unit
from fastfi.errors import DataError, InputError, OptionError
from fastfi.inverse import Inverse
from fastfi.objectives import Objective
from fastfi.scoring import items
from fastfi.scoring.fingerprint import model_identity
from fastfi.scoring.measure import Labels, Measure
from fastfi.scoring.scorer import NO_LABEL, BatchScorer, Samples

_ray: Any = require("ray", "fastfi.ray", "ray")

__all__ = ["Scorer"]

Layout = Literal["CHW", "HWC"]

_X = (
    *("image", "img", "images", "image_bytes", "bytes"),
    *("pixel_values", "x", "input", "inputs", "features"),
)
_Y = ("label", "labels", "fine_label", "target", "targets", "y")
_ID = ("id", "ids", "image_id", "uid", "path")


class Scorer:
    """Scores batches of a Ray data set: a callable class for ``map_batches``.

    The result has one row for each row of the data, with the columns, types and metadata of
    :func:`fastfi.score`: ``id``, ``label``, ``predicted``, ``log_prob``, ``fi``, ``rank`` (see
    :class:`fastfi.Scores`), and ``error``, which says why a sample has no score.
    ``write_parquet`` makes a folder of them that :func:`fastfi.open_scores` opens. No other column
    of the data is kept.

    An actor that was given a GPU (``num_gpus``) computes there, others on the CPU, with as many
    threads as ``num_cpus`` says, at least one.

    Args:
        model: nn.Module in evaluation mode, which Ray copies to each actor; or a function or class
            that makes the model, called without arguments in each actor, so that a large model is
            not sent. An nn.Module that it makes is put in evaluation mode.
        weights: a safetensors file or PyTorch state dict that each actor loads into the model; its
            machine must see the file.
        image: the column of samples; None looks for image, img, images, image_bytes, bytes,
            pixel_values, x, input, inputs, features. Of one of these:

            - compressed images as binary, or as a struct with the field "bytes" as the Hugging Face
              hub stores them: decoded to [C, H, W] in 0..1;
            - tensors or arrays: bool, uint8 and uint16 as pixels, divided by their type's largest
              value; other numbers as they are.
        label: the column of integer labels; None looks for label, labels, fine_label, target,
            targets, y. Samples without one (null) can be scored with ``y="predicted"`` only.
        id: the column of ids, integers or strings (uint64 become strings); None looks for id, ids,
            image_id, uid, path. Ray does not know positions of rows, so there must be one, and to
            be of use it must be unique.
        transform: makes of one sample what the model takes, a floating-point tensor. It gets a
            PIL image where images are compressed, otherwise the array as it is stored, and takes
            the place of the decoding to 0..1. Samples may have different shapes.
        layout: of arrays without ``transform``: "CHW" as they are, "HWC" for channels last
            ([H, W] as one channel), as ``ray.data.read_images`` makes them.
        color: of compressed images: "gray", "rgb", or "auto", what each image is.
        wrt, inverse, objective, outputs, lump, assume_full_rank, memory_budget: as in
            :func:`fastfi.influence`; several objectives as a tuple.
        y: "label", "predicted" or "both", as in :func:`fastfi.score`.
        device: instead of the actor's GPU or CPU.
        threads: instead of ``num_cpus``.
        strict: fail where a sample fails, instead of filling its column ``error``.

    Raises:
        OptionError, WeightsError, ModelModeError: the arguments do not fit together. Ray reports it
            from the actor.
        DataError: of a batch: no such column, or ids that are missing.

    Example:
        >>> data = ray.data.read_parquet("images")
        >>> scores = data.map_batches(
        ...     fastfi.ray.Scorer, fn_constructor_args=(make_model, "weights.safetensors"),
        ...     compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1, batch_size=256,
        ... )
        >>> scores.write_parquet("scores")
        >>> fastfi.open_scores("scores").percentiles()
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], Any],
        weights: str | PathLike[str] | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
        id: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        layout: Layout = "CHW",
        color: Color = "auto",
        wrt: str | Sequence[str] = "input",
        inverse: Inverse | str = "exact",
        y: Labels = "label",
        objective: str | Objective | tuple[str | Objective, ...] = "cross_entropy",
        outputs: str = "logits",
        lump: float | None = None,
        assume_full_rank: bool = False,
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        threads: int | None = None,
        strict: bool = False,
    ) -> None:
        for name, value, known in (("layout", layout, Layout), ("color", color, Color)):
            if value not in get_args(known):
                raise OptionError(f"{name}: expected one of {get_args(known)}, got {value!r}")
        measure = Measure(
            wrt=wrt if isinstance(wrt, str) else tuple(wrt), inverse=inverse, y=y,
            objective=objective, outputs=outputs, lump=lump, assume_full_rank=assume_full_rank,
            memory_budget=memory_budget,
        )  # fmt: skip
        self._keys = (id, image, label)
        self._transform, self._layout, self._color = transform, layout, color
        given, cpus = _assigned()
        if threads is not None or cpus is not None:
            torch.set_num_threads(threads or max(1, int(cpus or 1)))
        device = given if device is None else torch.device(device)
        own = _model(model, weights, device)
        self._scorer = BatchScorer(own, measure, device=device, strict=strict)
        self._metadata = {"fastfi.model": json.dumps(model_identity(own))}

    def __call__(self, batch: Any) -> Any:
        """Scores one batch.

        Args:
            batch: in any of Ray's formats: a dict of arrays, a pyarrow.Table or a pandas.DataFrame.

        Returns:
            A pyarrow.Table with as many rows.
        """
        columns = _columns(batch)
        names = [
            _named(columns, key, usual)
            for key, usual in zip(self._keys, (_ID, _X, _Y), strict=True)
        ]
        if names[0] is None or names[1] is None:
            what, key, usual = ("ids", "id", _ID) if names[0] is None else ("samples", "image", _X)
            raise DataError(
                f"data: expected a column of {what} ({', '.join(usual)}), got "
                f"{', '.join(columns)}; {key}= names it"
            )
        ids, id_type = _ids(columns[names[0]], names[0])
        if not ids:
            return self._scorer.schema(id_type, self._metadata).empty_table()
        labels = None if names[2] is None else columns[names[2]]
        samples = self._samples(ids, columns[names[1]], labels)
        return self._scorer.table(self._scorer(samples), id_type, self._metadata)

    def _samples(self, ids: Sequence[Any], x: NDArray[Any], y: Any) -> Samples:
        """A batch, with the reasons why samples of it cannot be read."""
        errors: dict[int, str] = {}
        labels = np.full(len(ids), NO_LABEL)  # [b] int64
        if y is not None:
            for i, given in enumerate(y):
                try:
                    labels[i] = NO_LABEL if _is_null(given) else items.label(_whole(given))
                except Exception as error:
                    errors[i] = f"{type(error).__name__}: {error}"
        tensors: Any
        if self._transform is None and x.dtype != object:
            tensors = self._pixels(x)
        else:
            tensors = [None] * len(ids)
            for i, given in enumerate(x):
                try:
                    tensors[i] = self._x(given)
                except Exception as error:  # transform is the user's
                    errors.setdefault(i, f"{type(error).__name__}: {error}")
        # A batch without any label may belong to data that has some.
        return Samples(ids, tensors, None if y is None else torch.from_numpy(labels), errors)

    def _x(self, given: Any) -> Tensor:
        """One sample as the model takes it."""
        if isinstance(given, Mapping) and "bytes" in given:
            given = given["bytes"]
        if given is None:
            raise DataError("no image (null)")
        encoded = isinstance(given, bytes)
        if encoded:
            given = ImageDecoder(self._color)(given, "image")
        if self._transform is None:
            return stack([given])[0] if encoded else self._pixels(np.asarray(given)[None])[0]
        if encoded:
            given = require("PIL.Image", "decoding images").fromarray(given)
        x = self._transform(given)
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(x)
        if not isinstance(x, Tensor):
            raise InputError(f"transform: expected a tensor, got {type(x).__name__}")
        return x.detach()

    def _pixels(self, arrays: NDArray[Any]) -> Tensor:
        """Arrays [b, ...] in the model's layout, pixels in 0..1."""
        if arrays.dtype.kind not in "biuf":
            raise InputError(f"expected numbers or compressed images, got {arrays.dtype}")
        arrays = np.array(arrays)  # Ray's arrays are read-only
        x = unit(arrays) if arrays.dtype in (bool, "u1", "u2") else torch.from_numpy(arrays)
        if self._layout == "CHW":
            return x
        if x.dim() not in (3, 4):
            raise InputError(
                f"layout='HWC': expected images [H, W] or [H, W, C], got {list(x.shape[1:])}"
            )
        return x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()


def _assigned() -> tuple[torch.device | None, float | None]:
    """The device and the number of CPUs that Ray gave to this actor; None outside of actors."""
    if not _ray.is_initialized():
        return None, None
    context = _ray.get_runtime_context()
    if context.get_actor_id() is None:
        return None, None
    cpus = float(context.get_assigned_resources().get("CPU", 0))
    if not context.get_accelerator_ids().get("GPU"):
        return torch.device("cpu"), cpus
    if not torch.cuda.is_available():
        raise OptionError(
            "num_gpus: Ray gave this actor a GPU that torch cannot use "
            f"(torch {torch.__version__}; 'python -m fastfi.doctor' says more)"
        )
    return torch.device("cuda"), cpus  # Ray makes it the only one that can be seen


def _model(model: Any, weights: str | PathLike[str] | None, device: torch.device | None) -> Any:
    """The model on its device, with its weights."""
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise OptionError(
                "model: expected an nn.Module, or a function that makes the model, got "
                f"{type(model).__name__}"
            )
        model = model()
        if isinstance(model, nn.Module):
            model.eval()
    if weights is not None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"weights: expected an nn.Module to load them into, got {model!r}")
        load_weights(model, Path(weights))
    return model.to(device) if isinstance(model, nn.Module) and device is not None else model


def _columns(batch: Any) -> Mapping[str, NDArray[Any]]:
    """The batch as arrays [b, ...] by name."""
    if isinstance(batch, Mapping):
        return batch
    block = require("ray.data.block", "fastfi.ray", "ray").BlockAccessor.for_block(batch)
    columns: Mapping[str, NDArray[Any]] = block.to_batch_format("numpy")
    return columns


def _named(columns: Mapping[str, Any], key: str | None, usual: Sequence[str]) -> str | None:
    if key is not None and key not in columns:
        raise DataError(f"data: expected a column {key!r}, got {', '.join(columns)}")
    return key or next((name for name in usual if name in columns), None)


def _ids(values: Any, name: str) -> tuple[list[Any], str]:
    """The ids and their type, "int" or "str"; 64 bits without a sign do not fit into "int"."""
    values = np.asarray(values)
    if values.dtype.kind in "iu":
        wide = values.dtype == np.uint64
        return [str(v) if wide else int(v) for v in values], "str" if wide else "int"
    ids = values.tolist()
    if values.dtype.kind in "OUT" and all(isinstance(v, str) for v in ids):
        return [str(v) for v in ids], "str"
    wrong = next((v for v in ids if not isinstance(v, str)), None)
    raise DataError(
        f"column {name!r}: expected ids that are integers or strings, none of them null, got "
        f"{wrong!r} ({values.dtype})"
    )


def _is_null(given: Any) -> bool:
    return given is None or (isinstance(given, (float, np.floating)) and bool(np.isnan(given)))


def _whole(given: Any) -> Any:
    """A float that is an integer as int: Ray's arrays hold integers with nulls as float64."""
    if isinstance(given, (float, np.floating)) and float(given).is_integer():
        return int(given)
    return given
