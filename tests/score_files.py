"""Score directories written by hand, as :func:`fastfi.score` and others leave them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["CONFIG", "manifest", "score_table", "write_folder", "write_part"]

CONFIG = {
    "wrt": "input",
    "inverse": "Exact(rtol=None)",
    "y": "label",
    "objective": ["cross_entropy"],
    "outputs": "logits",
    "lump": None,
    "assume_full_rank": False,
}


def score_table(
    start: int,
    stop: int,
    ends: Sequence[str] = ("",),
    *,
    ids: str = "int",
    both: bool = False,
    errors: Sequence[int] = (),
    fi: Sequence[float] | None = None,
    seed: int = 0,
) -> pa.Table:
    """Rows [start, stop) of a data set; the same row has the same numbers in any range.

    Args:
        ends: behind "fi": "", ":conv1", "@margin", ":conv1@margin", ...
        ids: "int", or "str" for paths.
        both: y="both".
        errors: rows that have no score.
        fi: of these rows, in every column of FI; None draws lognormal numbers.
    """
    count = np.arange(start, stop)
    rows = [np.random.default_rng([seed, i]) for i in count]
    drawn = np.array([g.lognormal(0, 3, 2) for g in rows]).reshape(-1, 2)
    given = drawn[:, 0] if fi is None else np.asarray(fi, float)
    bad = np.isin(count, errors)

    def column(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(np.asarray(values), kind, mask=bad)

    columns: dict[str, pa.Array] = {
        "id": pa.array(count, pa.int64())
        if ids == "int"
        else pa.array([f"ü {i % 3}/{i}.png" for i in count.tolist()], pa.string()),
        "label": pa.array(count % 3, pa.int64()),
        "predicted": column(np.where(count % 4, count % 3, (count + 1) % 3), pa.int64()),
    }
    ranks = dict.fromkeys(re.sub("@(cross_entropy|margin|logit)$", "", end) for end in ends)
    for prefix in ("", "predicted_") if both else ("",):
        columns[f"{prefix}log_prob"] = column(-drawn[:, 1], pa.float64())
        for k, end in enumerate(ends):
            columns[f"{prefix}fi{end}"] = column(given * (k + 1), pa.float64())
        for end in ranks:
            columns[f"{prefix}rank{end}"] = column(np.full(len(count), 2), pa.int64())
    text = [f"row {i}: no image" if b else None for i, b in zip(count.tolist(), bad, strict=True)]
    columns["error"] = pa.array(text, pa.string())
    return pa.table(columns)


def write_part(folder: Path, start: int, stop: int, *, table: Any = None, **how: Any) -> Path:
    """Writes a part; ``how``: see :func:`score_table`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"part-{start:012}-{stop:012}.parquet"
    table = score_table(start, stop, **how) if table is None else table
    metadata = {"fastfi.version": "0.1.0", "fastfi.config": json.dumps(CONFIG)}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def manifest(folder: Path, length: int | None, complete: bool = True, **changes: Any) -> None:
    """Writes a manifest."""
    content = {
        "format": 1,
        "fastfi": "0.1.0",
        "torch": "2.13.0",
        "created": "2026-01-01T00:00:00Z",
        "config": CONFIG,
        "model": {"class": "nets.Net", "digest": "a" * 64},
        "data": {"kind": "TensorDataset", "length": length, "digest": "d" * 64},
        "id_type": "int",
        "blocks": ["input"],
        "class_names": ["zero", "one", "two"],
        "complete": complete,
        "rows": length if complete else None,
    }
    folder.mkdir(exist_ok=True)
    (folder / "_fastfi.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")


def write_folder(folder: Path, bounds: Sequence[int], **how: Any) -> Path:
    """A complete score directory with parts [bounds[0], bounds[1]), [bounds[1], bounds[2]), ..."""
    for start, stop in pairwise(bounds):
        write_part(folder, start, stop, **how)
    manifest(folder, bounds[-1], id_type=how.get("ids", "int"))
    return folder
