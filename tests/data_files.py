"""Small data sets in every format, the real ones, and what to read from them."""

from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastfi.data import ImageSource

__all__ = [
    "assert_scaled",
    "encoded",
    "pixels",
    "read",
    "real_data",
    "write_idx",
    "write_parquet",
]


def real_data(name: str) -> Path:
    """The folder of a real data set; skips the test where it is absent."""
    root = Path(__file__).parents[1]
    for base in (os.environ.get("FASTFI_DATA"), root.parent / "shared" / "data"):
        if base is not None and (Path(base) / name).is_dir():
            return Path(base) / name
    pytest.skip(f"no {name} data (FASTFI_DATA or ../shared/data)")


def pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random uint8 pixels of that shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_idx(
    folder: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8] | None,
    split: str = "train",
    compress: bool = True,
) -> Path:
    """Writes ``{split}-images-idx3-ubyte[.gz]`` and its labels; returns the image file."""
    end = ".gz" if compress else ""
    target = folder / f"{split}-images-idx3-ubyte{end}"
    arrays = [(target, images)]
    if labels is not None:
        arrays.append((folder / f"{split}-labels-idx1-ubyte{end}", labels))
    for path, array in arrays:
        header = struct.pack(f">2x2B{array.ndim}i", 8, array.ndim, *array.shape)
        content = header + array.tobytes()
        path.write_bytes(gzip.compress(content) if compress else content)
    return target


def encoded(image: NDArray[np.uint8], kind: str = "png") -> bytes:
    """A compressed image."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None] | None,
    row_group: int = 1000,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes the Hugging Face image layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None if i is None else {"bytes": i, "path": None} for i in images]
    columns = {"image": pa.array(rows, kind)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=row_group)
    return path


def read(
    source: ImageSource, batch_size: int = 4, limit: int | None = None
) -> tuple[list[int] | list[str], torch.Tensor, torch.Tensor | None]:
    """All batches as (ids, x, y), checked against the source's description."""
    batches = list(source.batches(batch_size, limit))
    assert all(0 < len(b.ids) <= batch_size for b in batches)
    assert all(len(b.x) == len(b.ids) and b.x.is_contiguous() for b in batches)
    ids = [i for b in batches for i in b.ids]
    x = torch.cat([b.x for b in batches])
    assert x.dtype == torch.float32
    assert tuple(x.shape[1:]) == source.shape
    if not source.labelled:
        assert all(b.y is None for b in batches)
        return ids, x, None
    y = torch.cat([b.y for b in batches])
    assert y.dtype == torch.int64
    return ids, x, y


def assert_scaled(x: torch.Tensor, expected: NDArray[np.uint8]) -> None:
    """x is exactly ``expected`` (uint8) over 255 in float32."""
    want = torch.from_numpy(expected.astype(np.float32)) / 255
    assert torch.equal(x, want)
