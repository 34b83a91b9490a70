"""``score``: FI of every sample of a data set, into a directory of Parquet files."""

from __future__ import annotations

import json
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

import fastfi
from fastfi._extras import require
from fastfi.errors import DataError, InputError, OptionError
from fastfi.inverse import Inverse
from fastfi.objectives import Objective
from fastfi.scoring.batch_size import BatchSize
from fastfi.scoring.fingerprint import data_identity, model_identity, tried_on
from fastfi.scoring.items import Reader
from fastfi.scoring.manifest import all_there, begin, finish, resumed
from fastfi.scoring.measure import Labels, Measure
from fastfi.scoring.parts import PART_ROWS, PART_SECONDS
from fastfi.scoring.ranks import joined
from fastfi.scoring.result import Scores, open_scores
from fastfi.scoring.run import Run
from fastfi.scoring.scorer import BatchScorer, Samples
from fastfi.scoring.sources import as_source

__all__ = ["score"]

_MANY = 8  # samples, none of which can be read: the data is not what it should be


def score(
    model: Any,
    data: Any,
    *,
    out: str | PathLike[str],
    wrt: str | Sequence[str] = "input",
    inverse: Inverse | str = "exact",
    y: Labels = "label",
    objective: str | Objective | Sequence[str | Objective] = "cross_entropy",
    outputs: str = "logits",
    lump: float | None = None,
    assume_full_rank: bool = False,
    batch_size: int | Literal["auto"] = "auto",
    memory_budget: int | None = None,
    device: torch.device | str | None = None,
    workers: int | None = None,
    transform: Callable[[Any], Any] | None = None,
    id_key: str | None = None,
    x_key: str | None = None,
    y_key: str | None = None,
    limit: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool | None = None,
    part_rows: int = PART_ROWS,
    part_seconds: float = PART_SECONDS,
    data_id: str | None = None,
    shard: tuple[int, int] | None = None,
    notes: Mapping[str, Any] | None = None,
    distributed: bool | None = None,
) -> Scores:
    """Scores every sample of a data set, into a directory of Parquet files.

    Samples are streamed: memory does not grow with their number. What is scored is written as
    parts, each complete or not there, so that a run which is killed at any moment goes on where it
    stopped when the same call is made again. No row is lost or doubled; results of another model,
    other data or another configuration are not mixed in.

    A sample that fails (an image that cannot be read, NaN pixels, a label out of range, logits that
    are not finite) becomes a row whose column ``error`` says why, and the run goes on. A model that
    fails on every one of the first samples is an error, and so is data of which none of the
    samples looked at beforehand, eight or more, can be read.

    Args:
        model: see :func:`fastfi.influence`; in evaluation mode.
        data: a Dataset with a length, a DataLoader, a Hugging Face data set, whole tensors or
            arrays (x, y), an :func:`fastfi.data.open_dataset`, or any iterable. Items are (x, y),
            (id, x, y), x alone (with ``y="predicted"``), or mappings with such columns. x is a
            tensor, a NumPy array, or a PIL image, which becomes [C, H, W] float32 in 0..1; y is an
            integer; an id is an integer or a string, and by default the row's number, or with a
            DataLoader the number that its sampler gave. Iterables may yield single samples or
            batches whose labels are [b]. What is read must be the same each time: no shuffling, no
            random transforms. All samples are scored, those too that a DataLoader's ``drop_last``
            would leave out.
        out: the directory; made if it is not there.
        wrt, inverse, outputs, lump, assume_full_rank, memory_budget: see :func:`fastfi.influence`.
        y: whose influence: ``"label"`` (the paper's Setups 1 and 2), ``"predicted"`` (Setups 3 and
            4), or ``"both"``, for one and the same backward passes.
        objective: one, or several with different names, which share the backward passes if their
            gradients in the logits sum to zero and ``lump`` is None.
        batch_size: samples scored at once; ``"auto"`` tries sizes from 32 up to 1,024 on the way
            and keeps the fastest. Out of memory, on the CPU or the GPU, halves it. FI of a sample
            may differ in its last digits between sizes: a number makes runs repeatable bit by bit.
        device: where the model computes; None: where its parameters are. It is not moved.
        workers: processes that read a Dataset or image folder; None: a DataLoader's own number,
            else 0. Iterables and streams are read in this process.
        transform: applied to each sample's x: normalisation, or making a tensor of it.
        id_key, x_key, y_key: columns of items that are mappings; None looks for usual names.
        limit: score only the first so many samples.
        resume: go on with what ``out`` holds; False: refuse if it holds scores.
        overwrite: remove scores that ``out`` holds, and begin anew.
        strict: raise where a sample fails. What was scored before stays.
        progress: None shows it on a terminal only; True also elsewhere, as lines; False never.
        part_rows: rows of a part at most; also the unit by which several processes share the data.
        part_seconds: a part is written after so many seconds even if it has fewer rows: a killed
            run loses no more than that.
        data_id: a name for the data, compared instead of samples when a run goes on: for data
            whose samples are not the same in each reading.
        shard: (k, n): score the k-th of n shares of the data, k from 0, for machines that know
            nothing of each other: each into a directory of its own, with the same ``part_rows``.
            ``fastfi merge`` puts the shares together.
        notes: kept in the manifest as "notes": whatever JSON can hold.
        distributed: under torchrun, or where torch.distributed is initialised, processes share the
            work and the directory; each calls this function with the whole data set. False: this
            process does all.

    Returns:
        The scores, opened from ``out``: see :class:`Scores`. In every process, when all are done.

    Raises:
        ResumeError: ``out`` holds scores of another model, data set or configuration; the message
            says what differs.
        OptionError: an option has no meaning; ``out`` holds other files, or another run writes
            there.
        InputError, LabelError, OutputError, ModelModeError: what :func:`fastfi.influence` raises
            for the model or for all samples.
        DataError: with ``strict``, a sample that cannot be read; a damaged part.
        WriteError: the disk is full, no permission, ...
        MissingExtraError: pyarrow is not installed.
    """
    require("pyarrow.parquet", "scoring data sets", "score")
    given = tuple(objective) if isinstance(objective, Sequence) and not isinstance(
        objective, str
    ) else objective  # fmt: skip
    measure = Measure(
        wrt if isinstance(wrt, str) else tuple(wrt), inverse, y, given, outputs, lump,
        assume_full_rank, memory_budget,
    )  # fmt: skip
    _check_options(batch_size, workers, limit, part_rows, part_seconds, resume, overwrite)
    _check_shard(shard)
    _check_notes(notes)
    limit = None if limit is None else int(limit)  # NumPy's integers have no place in JSON
    source = as_source(data, Reader(transform, (id_key, x_key, y_key)), limit)
    folder = Path(out)
    with joined(distributed) as ranks, ExitStack() as stack:
        probes = source.probes()
        _check_probes(probes, measure)
        scorer = BatchScorer(
            model, measure, device=device, strict=strict, whole=True, labelled=probes.y is not None
        )
        manifest = {
            "fastfi": fastfi.__version__,
            "torch": torch.__version__,
            "config": measure.config(),
            "model": {
                **model_identity(model, trainable=measure.wrt != "input"),
                "sample": None if data_id else tried_on(model, probes, measure, scorer.device),
            },
            "data": data_identity(source, probes, data_id),
            "id_type": "str" if any(isinstance(name, str) for name in probes.ids) else "int",
            "blocks": list(scorer.blocks),
            "class_names": None if source.class_names is None else list(source.class_names),
            "notes": dict(notes or {}),
        }
        if ranks.first:
            ranks.together(lambda: begin(folder, manifest, resume, overwrite, stack))
        else:
            ranks.together(lambda: None)
        # Every process has the same model and data, or none goes on.
        found = ranks.together(lambda: resumed(folder, manifest))
        # Asked together, before anybody writes: the first process's answer is everybody's.
        done = ranks.gathered(found["complete"] and all_there(folder, found["rows"]))[0]
        if done and (data_id is not None or not source.streamed):  # a stream is compared
            return open_scores(folder)
        run = Run(scorer, source, found, folder, ranks, shard or (0, 1), part_rows, part_seconds)
        own = data.num_workers if isinstance(data, DataLoader) else 0
        rows = run(
            BatchSize(batch_size if isinstance(batch_size, str) else int(batch_size)),
            own if workers is None else int(workers),
            progress,
        )
        counts = ranks.gathered(rows)
        if len(set(counts)) > 1:
            raise DataError(
                f"data: expected the same samples in every process, got {counts} of them"
            )
        if shard is None or shard[1] == 1:
            ranks.together(lambda: finish(folder, rows) if ranks.first else None)
    scores = open_scores(folder)
    if len(scores) > 0 and scores.errors == len(scores):
        first = scores.to_table(["error"]).column(0)[0].as_py()
        warnings.warn(f"none of the {len(scores)} samples has a score; the first: {first}",
                      stacklevel=2)  # fmt: skip
    return scores


def _check_options(
    batch_size: Any, workers: Any, limit: Any, part_rows: Any, part_seconds: Any,
    resume: bool, overwrite: bool,
) -> None:  # fmt: skip
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("limit", limit, 1),
        ("part_rows", part_rows, 1),
    ):
        free = value is None if name in ("workers", "limit") else value == "auto"
        if name == "part_rows":
            free = False
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not free and not (whole and value >= least):
            also = {"batch_size": " or 'auto'"}.get(name, "")
            raise OptionError(f"{name}: expected a number from {least} up{also}, got {value!r}")
    if not (isinstance(part_seconds, (int, float)) and part_seconds > 0):
        raise OptionError(f"part_seconds: expected seconds above 0, got {part_seconds!r}")
    if overwrite and not resume:
        raise OptionError("expected resume=False or overwrite=True, got both")


def _check_notes(notes: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(notes or {}))
    except (TypeError, ValueError) as error:
        raise OptionError(f"notes: expected what JSON can hold, got others ({error})") from error


def _check_probes(probes: Samples, measure: Measure) -> None:
    """Raises where no sample looked at can be read, or none has a label that is needed."""
    n = len(probes.ids)
    if n >= _MANY and len(probes.errors) == n:
        raise InputError(
            f"data: expected samples that can be read, got none among {n}; the first: "
            f"{probes.errors[0]}"
        )
    if measure.y != "predicted" and probes.y is None and len(probes.errors) < n:
        raise OptionError(
            f"y={measure.y!r}: expected samples with labels, got none; y='predicted' measures the "
            "influence of the predicted classes"
        )


def _check_shard(shard: Any) -> None:
    if shard is None:
        return
    pair = isinstance(shard, (tuple, list)) and len(shard) == 2
    if not (pair and all(isinstance(i, int) for i in shard) and 0 <= shard[0] < shard[1]):
        raise OptionError(f"shard: expected (k, n) with 0 <= k < n, got {shard!r}")
