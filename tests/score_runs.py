"""Data sets, models and children for tests of ``fastfi.score``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from networks import mlp
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastfi
from fastfi.scoring import Scores

__all__ = [
    "CLASSES", "Broken", "Items", "Stream", "before_forks", "check_values", "contents", "data",
    "files", "forked", "measured", "network", "rewrite_manifest", "rows", "run_child", "simulated",
]  # fmt: skip

CLASSES = 4
SHAPE = (1, 4, 5)


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [n, 1, 4, 5] float64 and labels [n]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand((n, *SHAPE), generator=g, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=g)


def network(seed: int = 0) -> nn.Module:
    """A float64 network for :func:`data`."""
    inner = mlp(20, CLASSES, seed)
    assert isinstance(inner, nn.Sequential)
    return nn.Sequential(nn.Flatten(), *inner).eval()


class Items(Dataset):
    """A data set of such items; what :attr:`broken` names raises. It counts what is read."""

    def __init__(self, items: list[Any], broken: dict[int, Exception] | None = None) -> None:
        self.items, self.broken, self.reads = items, broken or {}, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        if i in self.broken:
            raise self.broken[i]
        return self.items[i]


class Stream:
    """An iterable of such items, from the beginning each time."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Broken(nn.Module):
    """A network that does something else for samples whose first pixel is a certain number."""

    def __init__(self, actions: dict[float, Any]) -> None:
        super().__init__()
        self.inner, self.actions = network(), actions

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x)
        for value, action in self.actions.items():
            hit = x.reshape(len(x), -1)[:, 0] == value
            if bool(hit.any()) and isinstance(action, Exception):
                raise action
            if not isinstance(action, Exception):
                z = z * torch.where(hit, action, 1.0)[:, None].to(z)
        return z


def before_forks() -> None:
    """Has what first calls import imported once, and not in each child."""
    torch.set_num_threads(1)
    fastfi.influence(network(), *data(2))
    pa.array(np.zeros(1), mask=np.zeros(1, bool))
    import rich.console  # noqa: F401


def forked(work: Callable[[], object]) -> int:
    """Starts a child that does this and ends, with status 1 if it raised; its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def rows(scores: Scores) -> dict[str, list[Any]]:
    """All columns as lists."""
    table: dict[str, list[Any]] = scores.to_table().to_pydict()
    return table


def measured(model: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> fastfi.Influence:
    """:func:`fastfi.influence`, float64, with all that it tells."""
    found = fastfi.influence(model, x, y, full_output=True, dtype=torch.float64, **options)
    assert isinstance(found, fastfi.Influence)
    return found


def check_values(scores: Scores, model: Any, x: Tensor, y: Tensor | None, **options: Any) -> None:
    """The rows are those of :func:`fastfi.influence` for the whole data at once."""
    expected = measured(model, x, y, **options)
    got = rows(scores)
    assert scores.complete
    assert got["error"] == [None] * len(x)
    assert got["predicted"] == model(x).argmax(1).tolist()
    assert expected.rank is not None and got["rank"] == expected.rank.tolist()
    for name, values in (("fi", expected.fi), ("log_prob", expected.log_prob)):
        found = torch.tensor(got[name], dtype=torch.float64)
        torch.testing.assert_close(found, values.double(), rtol=1e-9, atol=1e-12)


def files(folder: Path) -> list[str]:
    """Names of all files, hidden ones too."""
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """What all files hold."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Replaces entries of the manifest."""
    path = folder / "_fastfi.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def stored(folder: Path) -> list[tuple[str, int]]:
    """Each part and its rows."""
    return [(p.name, pq.read_metadata(p).num_rows) for p in sorted(folder.glob("*.parquet"))]


def run_child(code: str, *arguments: Any, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own that finds this module."""
    paths = [str(Path(__file__).parent), *sys.path]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


@contextmanager
def simulated(rank: int, world: int) -> Iterator[Any]:
    """One of several processes, the others of which agree with whatever it says; each of them does
    what is done once."""
    from fastfi.scoring.ranks import Ranks

    class Alone(Ranks):
        first = True

        def gathered(self, value: Any) -> list[Any]:
            return [value] * self.world

    yield Alone(rank, world)
