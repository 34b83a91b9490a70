"""Samples in, columns out: one batch scored, with the samples that fail told apart.

This is the part that every way of scoring a data set shares: :func:`fastfi.score`, Ray's workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastfi
from fastfi._checks import check_model
from fastfi._extras import require
from fastfi.errors import DataError, ModelModeError, OptionError, SampleError
from fastfi.evaluate import Evaluation, evaluate_targets
from fastfi.memory import is_out_of_memory
from fastfi.scoring.measure import Measure, value_columns

__all__ = ["NO_LABEL", "BatchScorer", "Columns", "Samples", "device_of"]

NO_LABEL = int(np.iinfo(np.int64).min)
"""Stands in ``Samples.y`` for a sample without a label among others with one."""

Columns = dict[str, Any]
"""One entry for each column: a list of ids, masked arrays [b] of numbers, a list of errors."""

_PATIENCE = 8  # samples that may fail, before any has been scored, until the model is to blame
_LONGEST = 500  # characters of an error that are kept


class Samples(NamedTuple):
    """Consecutive samples of a data set.

    Attributes:
        ids: length b; None where the sample could not be read, nor its id.
        x: [b, ...], or a list of b tensors whose shapes may differ.
        y: [b] int64, or None where the data has no labels; NO_LABEL where one sample has none.
        errors: why samples could not be read, by position; their x and y have no meaning, and may
            be None in a list.
    """

    ids: Sequence[Any]
    x: Tensor | Sequence[Tensor | None]
    y: Tensor | None
    errors: Mapping[int, str] = {}


def device_of(model: Any) -> torch.device | None:
    """The device of a module's first parameter or buffer; None where it has none."""
    module = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    if isinstance(module, torch.nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return None


class BatchScorer:
    """Scores batches of samples, one after the other.

    Args:
        model: in evaluation mode: see :func:`fastfi.influence`.
        measure: what to compute.
        device: where samples go; None: where the model's parameters are, or for a model without
            any, where the samples are.
        strict: raise where a sample fails, instead of filling its column ``error``.
        whole: raise where memory does not suffice for a batch, instead of halving it.
        labelled: whether the data is known to have labels: samples without one are errors then.
            Otherwise a first batch without labels says that it has none.

    Attributes:
        blocks: names of what FI is of: ``("input",)``, the layers' names, ...
        columns: names of the value columns, and "float" or "int" for each.
        scored, failed: samples so far.

    Raises:
        OptionError, ModelModeError: the model cannot be scored, or has no such parameters.
    """

    def __init__(
        self,
        model: Any,
        measure: Measure,
        *,
        device: torch.device | str | None = None,
        strict: bool = False,
        whole: bool = False,
        labelled: bool = False,
    ) -> None:
        check_model(model)
        self.model, self.measure, self.strict = model, measure, strict
        self.device = device_of(model) if device is None else torch.device(device)
        self.blocks = measure.blocks(model)
        self.columns = value_columns(measure, self.blocks)
        self.scored = self.failed = 0
        self._whole, self._labelled = whole, labelled
        self._error: Exception | None = None  # the last one that the model itself made
        self._blamed = 0  # samples on which the model itself failed

    def __call__(self, samples: Samples) -> Columns:
        """Scores a batch.

        Returns:
            The columns in the order of :meth:`schema`. Masked where there is no value.

        Raises:
            OptionError: ``y`` needs labels and the data has none.
            Exception: with ``strict``, the first failure (a DataError where a sample could not be
                read). Otherwise, with ``whole``, out of memory; errors of options, modes and
                devices; and what the model raises if it fails for every one of the first samples.
        """
        n = len(samples.ids)
        known = self._labelled or self.scored > 0 or len(samples.errors) == n
        if samples.y is None and self.measure.y != "predicted" and not known:
            raise OptionError(
                f"y={self.measure.y!r}: expected samples with labels, got none; y='predicted' "
                "measures the influence of the predicted classes"
            )
        values = {c: _empty(n, kind) for c, kind in self.columns.items()}
        work = _Work(samples, values, self.measure.y != "predicted")
        if self.strict and work.errors:
            position, text = next(iter(work.errors.items()))
            raise DataError(f"sample {samples.ids[position]}: {text}")
        for positions in _by_shape(samples, work.errors):
            self._score(work, positions)
        if self._error is not None and self.scored + work.done == 0 and self._blamed >= _PATIENCE:
            raise self._error
        self.failed += len(work.errors)
        self.scored += n - len(work.errors)
        label = _empty(n, "int")
        if samples.y is not None:
            label[:] = samples.y.cpu().numpy()
            label[(label == NO_LABEL).filled(False)] = np.ma.masked
        if samples.errors:
            label[list(samples.errors)] = np.ma.masked
        return {
            "id": list(samples.ids),
            "label": label,
            "predicted": work.predicted,
            **work.values,
            "error": [work.errors.get(i) for i in range(n)],
        }

    def _score(self, work: _Work, positions: Sequence[int]) -> None:
        """Fills the rows of samples of one shape, cutting up what fails down to single samples."""
        left = [positions]  # a stack: recursion could be as deep as there are failing samples
        while left:
            positions = left.pop()
            if not positions:
                continue
            try:
                results = self._evaluate(work.samples, positions)
            except Exception as error:
                bad = error.indices if isinstance(error, SampleError) else ()
                several = len(positions) > 1
                if self.strict and bad:
                    first = positions[bad[0]]
                    name = work.samples.ids[first]
                    raise type(error)(f"sample {name}: {_text(error)}") from error
                starved = several and is_out_of_memory(error)
                if (self._whole if starved else self.strict) or _fatal(error):
                    raise
                if several:
                    left += reversed(_cut(positions, bad))
                    continue
                work.errors[positions[0]] = _text(error)
                if not bad or str(error).startswith("model:"):
                    self._blamed += 1
                    self._error = error.with_traceback(None)  # which would hold the tensors
            else:
                work.fill(positions, results, self.measure, len(self.blocks))

    def _evaluate(self, samples: Samples, positions: Sequence[int]) -> list[Evaluation]:
        x = _taken(samples.x, positions)
        y = None if samples.y is None else _taken(samples.y, positions)
        if self.device is not None:
            x = x.to(self.device, non_blocking=True)
        y = None if y is None or self.measure.y == "predicted" else y.to(x.device)
        return evaluate_targets(self.model, x, self.measure.targets(y), **self.measure.shared())

    def schema(self, id_type: str, metadata: Mapping[str, str] | None = None) -> Any:
        """The pyarrow.Schema of the columns.

        Args:
            id_type: "int" or "str".
            metadata: stored beside fastfi's version, torch's, and the configuration.
        """
        pa = require("pyarrow", "scoring data sets", "score")
        kinds = {"float": pa.float64(), "int": pa.int64()}
        fields = [
            pa.field("id", pa.int64() if id_type == "int" else pa.string()),
            pa.field("label", pa.int64()),
            pa.field("predicted", pa.int64()),
            *(pa.field(name, kinds[kind]) for name, kind in self.columns.items()),
            pa.field("error", pa.string()),
        ]
        common = {
            "fastfi.version": fastfi.__version__,
            "fastfi.torch": torch.__version__,
            "fastfi.config": json.dumps(self.measure.config()),
        }
        return pa.schema(fields, {**common, **(metadata or {})})

    def table(
        self, columns: Columns, id_type: str, metadata: Mapping[str, str] | None = None
    ) -> Any:
        """Columns as a pyarrow.Table of :meth:`schema`."""
        pa = require("pyarrow", "scoring data sets", "score")
        schema = self.schema(id_type, metadata)
        return pa.table([_arrow(pa, columns[f.name], f.type) for f in schema], schema=schema)


class _Work:
    """The columns of one batch while they are filled; ``labelled``: every sample needs a label."""

    def __init__(self, samples: Samples, values: Columns, labelled: bool) -> None:
        self.samples, self.values = samples, values
        self.errors = dict(samples.errors)
        if labelled:
            missing = (
                range(len(samples.ids))
                if samples.y is None
                else ((samples.y == NO_LABEL).nonzero().flatten().tolist())
            )
            self.errors = {**dict.fromkeys(missing, "no label"), **self.errors}
        self.predicted = _empty(len(samples.ids), "int")
        self.done = 0

    def fill(
        self, positions: Sequence[int], results: list[Evaluation], measure: Measure, blocks: int
    ) -> None:
        at = np.asarray(positions)
        self.done += len(at)
        self.predicted[at] = results[0].predicted.cpu().numpy()
        names = iter(self.values)
        per_kind = len(measure.objectives)
        for k in range(len(measure.kinds)):
            own = results[k * per_kind : (k + 1) * per_kind]
            self._put(names, at, [own[0].log_prob])
            self._put(names, at, [r.fi for r in own])
            rank = own[0].rank
            self._put(names, at, [rank], blocks)

    def _put(
        self, names: Any, at: NDArray[Any], tensors: list[Tensor | None], columns: int = 1
    ) -> None:
        """Fills the next columns from tensors [b] or [b, L]; None leaves so many empty."""
        for tensor in tensors:
            if tensor is None:
                for _ in range(columns):
                    next(names)
                continue
            values = tensor.cpu().numpy()
            for column in values.reshape(len(at), -1).T:
                self.values[next(names)][at] = column


def _empty(n: int, kind: str) -> Any:
    """A masked array [n] without values."""
    dtype = np.float64 if kind == "float" else np.int64
    return np.ma.masked_all(n, dtype)


def _by_shape(samples: Samples, errors: Mapping[int, str]) -> list[list[int]]:
    """Positions of the samples that were read, grouped by shape and dtype."""
    good = [i for i in range(len(samples.ids)) if i not in errors]
    if isinstance(samples.x, Tensor):
        return [good] if good else []
    groups: dict[Any, list[int]] = {}
    for i in good:
        x = samples.x[i]
        assert x is not None
        groups.setdefault((x.shape, x.dtype), []).append(i)
    return list(groups.values())


def _taken(values: Tensor | Sequence[Tensor | None], positions: Sequence[int]) -> Tensor:
    if not isinstance(values, Tensor):
        return torch.stack([values[i] for i in positions])  # type: ignore[misc]
    return values if len(positions) == len(values) else values[torch.as_tensor(positions)]


def _cut(positions: Sequence[int], bad: Sequence[int]) -> list[Sequence[int]]:
    """What to try where several samples failed together: what came before those that the error
    names, of which none fails; the rest; and those themselves, one by one, for messages of their
    own. Halves where it names none."""
    if not bad:
        middle = len(positions) // 2
        return [positions[:middle], positions[middle:]]
    alone = set(bad)
    rest = [p for i, p in enumerate(positions) if i > bad[0] and i not in alone]
    return [positions[: bad[0]], rest, *([positions[i]] for i in bad)]


def _fatal(error: BaseException) -> bool:
    """Whether every other sample would fail as this one: options, modes, a broken device."""
    broken = getattr(torch, "AcceleratorError", ())
    return isinstance(error, (OptionError, ModelModeError, broken)) and not is_out_of_memory(error)


def _text(error: BaseException) -> str:
    text = error.of_one() if isinstance(error, SampleError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _arrow(pa: Any, values: Any, kind: Any) -> Any:
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, kind, mask=np.ma.getmaskarray(values))
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # names of files may hold bytes that are no text
        plain = (v if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values)
        return pa.array(list(plain), kind)
