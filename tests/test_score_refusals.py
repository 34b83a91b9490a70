"""What ``fastfi.score`` refuses; full disks and Ctrl-C, which leave a directory that is right."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from score_runs import (
    check_values,
    contents,
    data,
    files,
    network,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)  # fmt: skip

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")

N = 30
X, Y = data(N)
SET = TensorDataset(X, Y)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(SET, shuffle=True),
        lambda: DataLoader(SET, sampler=SubsetRandomSampler(range(9))),
        lambda: DataLoader(SET, sampler=WeightedRandomSampler([1.0] * N, N)),
        lambda: DataLoader(SET, batch_sampler=BatchSampler(RandomSampler(SET), 4, False)),
        lambda: DataLoader(SET, sampler=DistributedSampler(SET, 2, 0)),
    ],
)
def test_loaders_in_random_order(loader: Any, tmp_path: Path) -> None:
    with pytest.raises(fastfi.OptionError, match="data: expected"):
        fastfi.score(network(), loader(), out=tmp_path / "s")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size: expected a number from 1 up or 'auto', got 0"),
        ({"batch_size": "all"}, "batch_size: expected"),
        ({"batch_size": True}, "batch_size: expected"),
        ({"workers": -1}, "workers: expected a number from 0 up, got -1"),
        ({"limit": 0}, "limit: expected a number from 1 up, got 0"),
        ({"part_rows": None}, "part_rows: expected a number from 1 up, got None"),
        ({"part_rows": "auto"}, "part_rows: expected"),
        ({"part_seconds": 0}, "part_seconds: expected seconds above 0, got 0"),
        ({"part_seconds": float("nan")}, "part_seconds: expected seconds above 0"),
        ({"resume": False, "overwrite": True}, "resume=False or overwrite=True, got both"),
        ({"y": "labels"}, "y: expected 'label', 'predicted' or 'both', got 'labels'"),
        ({"objective": []}, "objective: expected at least one"),
        ({"objective": ["margin", "margin"]}, "objective: expected different names"),
        ({"objective": "hinge"}, "objective: expected"),
        ({"wrt": "layer"}, "wrt: expected one of"),
        ({"wrt": ["nowhere"]}, "nowhere"),
        ({"inverse": "pinv"}, "inverse: expected"),
        ({"outputs": "scores"}, "outputs: expected"),
        ({"memory_budget": 0}, "memory_budget: expected"),
        ({"lump": 2.0}, "lump: expected"),
        ({"assume_full_rank": True, "inverse": "damped"}, "assume_full_rank: expected"),
        ({"assume_full_rank": True, "wrt": "layers"}, "assume_full_rank: expected"),
    ],
    ids=str,
)
def test_bad_options(options: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(fastfi.OptionError, match=re.escape(text)):
        fastfi.score(network(), SET, out=tmp_path / "s", **options)
    assert not list(tmp_path.glob("s/*.parquet"))


@pytest.mark.parametrize("given", [3, "folder", b"bytes", {"x": X}, None, (X, Y[:3])], ids=str)
def test_no_data_set(given: Any, tmp_path: Path) -> None:
    with pytest.raises((fastfi.InputError, AssertionError), match=r"data: expected|Size mismatch"):
        fastfi.score(network(), given, out=tmp_path / "s")


def test_a_directory_that_cannot_be_the_place(tmp_path: Path) -> None:
    """Refused, and nothing in it is touched: not even what looks unfinished."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    (foreign / ".thesis.tmp").write_text("mine")
    (tmp_path / "file").write_text("mine")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "part-000000000000-000000000003.parquet").write_text("whose?")
    for out, error, text in (
        (foreign, fastfi.OptionError, "expected an empty or new folder, or scores; got"),
        (tmp_path / "file", fastfi.OptionError, "expected a folder, got a file"),
        (tmp_path / "no" / "where", fastfi.OptionError, "there is no folder"),
        (parts, fastfi.DataError, "holds parts but no _fastfi.json"),
    ):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for overwrite in (False, True)[: 1 if out is parts else 2]:
            with pytest.raises(error, match=text):
                fastfi.score(network(), SET, out=out, overwrite=overwrite)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond a number of bytes: a real write error, as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "name", "left"),
    [
        (30_000, "part-000000000000-000000002000.parquet", ["_fastfi.json"]),
        (100, "_fastfi.json", []),
    ],
)
def test_a_full_disk(size: int, name: str, left: list[str], tmp_path: Path) -> None:
    """Nothing unfinished is left, and the same call goes on once there is space."""
    x, y = data(4000)
    options: Any = {"out": tmp_path / "s", "batch_size": 500, "part_rows": 2000}
    problem = pytest.raises(fastfi.WriteError, match=rf"^cannot write .*{name}: File too large$")
    with problem, largest_file(size):
        fastfi.score(network(), (x, y), **options)
    assert files(tmp_path / "s") == left
    check_values(fastfi.score(network(), (x, y), **options), network(), x, y)


class Interrupting(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner, self.calls, self.at = network(), 0, at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        z: Tensor = self.inner(x)
        return z


def test_ctrl_c_keeps_the_rows(tmp_path: Path) -> None:
    net = Interrupting(5).eval()
    with pytest.raises(KeyboardInterrupt):
        fastfi.score(net, SET, out=tmp_path / "s", batch_size=4)
    there = fastfi.open_scores(tmp_path / "s")
    assert 0 < len(there) < N
    before = contents(tmp_path / "s")
    check_values(fastfi.score(net, SET, out=tmp_path / "s", batch_size=4), network(), X, Y)
    kept = [name for name in before if name.endswith(".parquet")]
    assert all(contents(tmp_path / "s")[name] == before[name] for name in kept)
