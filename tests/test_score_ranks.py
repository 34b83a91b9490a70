"""Several processes score one data set: each row once, whatever their number, before and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from score_runs import Items, Stream, check_values, contents, data, network, rows, simulated, stored

import fastfi
from fastfi.errors import OptionError
from fastfi.scoring.parts import wanted

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

N = 90
X, Y = data(N)


Together = Callable[..., None]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """Lets so many processes score together, by tests/score_ranks.py."""
    said = tmp_path_factory.mktemp("ranks") / "stderr"
    paths = os.pathsep.join(sys.path)
    with said.open("w") as stderr, subprocess.Popen(
        [sys.executable, "-W", "error", str(Path(__file__).parent / "score_ranks.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def run(world: int, folder: Path, kind: str, what: str = "score") -> None:
            print(json.dumps([str(folder), world, kind, what]), file=process.stdin, flush=True)
            failed = process.stdout.readline().strip()
            assert failed == str(int(what.startswith("stop"))), said.read_text()

        yield run
        process.stdin.close()
        assert process.wait(60) == 0, said.read_text()


@contextmanager
def as_one_of(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``fastfi.score`` takes itself for one of several processes, the others of which agree."""
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fastfi.score"], "joined", lambda _: simulated(rank, world))
        yield


def half(rank: int, world: int, folder: Path, given: Any, patch: pytest.MonkeyPatch) -> None:
    """What one of several processes does; the first then finds that rows are missing."""
    with as_one_of(rank, world, patch), suppress(fastfi.WriteError):
        fastfi.score(network(), given, out=folder, batch_size=4, part_rows=8)


def test_two_processes_killed_and_continued_by_others(together: Together, tmp_path: Path) -> None:
    """Two, of which one dies, then three of a stream's, then one: the table of a single run."""
    together(2, tmp_path / "s", "map", "stop4")
    there = stored(tmp_path / "s")
    assert 0 < sum(n for _, n in there) < N
    before = contents(tmp_path / "s")
    together(3, tmp_path / "s", "map")
    after = contents(tmp_path / "s")
    assert all(after[name] == before[name] for name, _ in there)
    check_values(fastfi.open_scores(tmp_path / "s"), network(), X, Y)
    one = fastfi.score(network(), (X, Y), out=tmp_path / "one", batch_size=4, part_rows=8)
    assert rows(one) == rows(fastfi.open_scores(tmp_path / "s"))


@pytest.mark.parametrize("what", ["score", "initialised"])
def test_streams(what: str, together: Together, tmp_path: Path) -> None:
    """Each process reads the whole stream and scores its own blocks; a group that is there already
    is used and left."""
    together(2, tmp_path / "s", "stream", what)
    check_values(fastfi.open_scores(tmp_path / "s"), network(), X, Y)


def test_another_model_in_one_process_stops_all(together: Together, tmp_path: Path) -> None:
    together(2, tmp_path / "s", "map", "model")
    own, other = ((tmp_path / f"error-{rank}").read_text() for rank in (1, 0))
    assert own.startswith("ResumeError: ") and "model, other parameters" in own
    assert other.startswith("FastfiError: process 1 of 2: ") and "other parameters" in other
    assert stored(tmp_path / "s") == []


def test_each_for_itself(together: Together, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    together(2, tmp_path / "s", "map", "alone")
    for rank in ("0", "1"):
        check_values(fastfi.open_scores(tmp_path / "s" / rank), network(), X, Y)


@pytest.mark.parametrize("form", ["map", "samples", "batches"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (3, 3)])
def test_numbers_of_processes_that_change(
    before: int, after: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the first processes gets done, the others do not begin; then others take over, one
    after the other."""

    def given() -> Any:
        if form == "map":
            return X, Y
        pairs = list(zip(X, Y, strict=True))
        return Stream(
            pairs if form == "samples" else list(zip(X.split(5), Y.split(5), strict=True))
        )

    half(before - 1, before, tmp_path / "s", given(), monkeypatch)
    scored = sum(n for _, n in stored(tmp_path / "s"))
    assert 0 < scored < N or before == 1
    if before == 1:
        sorted((tmp_path / "s").glob("*.parquet"))[3].unlink()
    for rank in reversed(range(after)):
        half(rank, after, tmp_path / "s", given(), monkeypatch)
    check_values(fastfi.open_scores(tmp_path / "s"), network(), X, Y)


def test_another_stream_is_noticed_behind_rows_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 8 to 15 are there, those before are another process's: batches of 5 lie across."""
    batches = list(zip(X.split(5), Y.split(5), strict=True))
    half(1, 3, tmp_path / "s", Stream(batches), monkeypatch)
    changed = X.index_fill(0, torch.tensor(9), 0.5)
    other = Stream(list(zip(changed.split(5), Y.split(5), strict=True)))
    with as_one_of(2, 3, monkeypatch), pytest.raises(fastfi.ResumeError, match="samples 8 to 15"):
        fastfi.score(network(), other, out=tmp_path / "s", batch_size=4, part_rows=8)


@pytest.mark.parametrize("length", [0, 1, 64, 100])
@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("done", [[], [(0, 3)], [(4, 8), (8, 13), (60, 64)], [(0, 100)]])
def test_wanted_ranges_of_all_processes_are_the_rest(
    length: int, world: int, done: list[tuple[int, int]]
) -> None:
    block = 16
    found = [r for rank in range(world) for r in wanted(done, length, block, rank, world)]
    assert all(a < b and a // block == (b - 1) // block for a, b in found)
    covered = sorted(i for a, b in found for i in range(a, b))
    there = {i for a, b in done for i in range(a, b)}
    assert covered == [i for i in range(length) if i not in there]


def test_a_share_reads_nothing_else(tmp_path: Path) -> None:
    x, y = data(40)
    rows = []
    for k in range(2):
        items = Items(list(zip(x, y, strict=True)))
        scores = fastfi.score(
            network(), items, out=tmp_path / str(k), shard=(k, 2), part_rows=8, progress=False
        )
        assert not scores.complete
        rows += scores.to_table(["id"]).column(0).to_pylist()
        assert items.reads == len(scores) + 16  # those by which the data is recognised
    assert sorted(rows) == list(range(40))


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), 1, ("0", "2")])
def test_shares_that_cannot_be(tmp_path: Path, shard: Any) -> None:
    with pytest.raises(OptionError, match="shard: expected"):
        fastfi.score(network(), data(4), out=tmp_path / "s", shard=shard)
