"""Score directories made up for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["columns", "write_scores"]

_WHOLE = ("label", "predicted", "rank")


def columns(
    n: int, *, seed: int = 0, classes: int = 10, names: Sequence[str] = ("fi",), wrong: float = 0.02
) -> dict[str, Any]:
    """n samples of equally likely classes; FI log-normal around a middle of their class's own.

    Args:
        names: the columns of FI.
        wrong: the share of samples whose prediction is another class than the label.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=n)
    predicted = np.where(rng.random(n) < wrong, (label + 1) % classes, label)
    middles = rng.normal(-3.0, 0.5, classes)
    found: dict[str, Any] = {
        "id": list(range(n)),
        "label": label,
        "predicted": predicted,
        "log_prob": -rng.exponential(0.1, n),
    }
    for i, name in enumerate(names):
        found[name] = 10.0 ** (middles[label] + rng.normal(0.3 * i, 1.0, n))
    for name in names:
        if "@" not in name and not name.startswith("predicted_"):
            found[name.replace("fi", "rank", 1)] = np.full(n, classes - 1)
    return found


def write_scores(
    folder: Path,
    values: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    errors: Mapping[int, str] | None = None,
    rows: int = 8192,
    complete: bool = True,
) -> Path:
    """Writes a score directory: columns in parts of so many rows, and the manifest.

    Args:
        values: a sequence for each column; ``None`` among its values is null.
        errors: row -> why it has no score; its other columns, but id and label, become null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n = len(values["id"])
    failed = dict(errors or {})
    arrays = {}
    for name, given in values.items():
        listed = given.tolist() if isinstance(given, np.ndarray) else list(given)
        if name not in ("id", "label"):
            listed = [None if row in failed else value for row, value in enumerate(listed)]
        kind = pa.int64() if name.partition(":")[0] in _WHOLE else None
        if name == "id" and isinstance(listed[0], str):
            kind = pa.string()
        arrays[name] = pa.array(listed, kind)
    arrays["error"] = pa.array([failed.get(row) for row in range(n)], pa.string())
    table = pa.table(arrays)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        part = table.slice(start, stop - start)
        pq.write_table(part, folder / f"part-{start:012d}-{stop:012d}.parquet")
    manifest = {
        "format": 1,
        "fastfi": "0.1.0",
        "torch": "2.13.0",
        "created": "2026-01-01T00:00:00Z",
        "config": {
            "wrt": "input",
            "inverse": "Exact(rtol=None)",
            "y": "label",
            "objective": ["cross_entropy"],
            **(config or {}),
        },
        "model": {"class": "package.module.Net", "digest": "ab" * 32},
        "data": {"kind": "TensorDataset", "length": n, "digest": "cd" * 32},
        "id_type": "str" if isinstance(values["id"][0], str) else "int",
        "blocks": ["input"],
        "class_names": None if class_names is None else list(class_names),
        "complete": complete,
        "rows": n if complete else None,
    }
    (folder / "_fastfi.json").write_text(json.dumps(manifest))
    return folder
