"""Runs of ``fastfi.score`` that are killed: a process that forks children and never scores itself.

``python score_kills.py SCENARIO FOLDER`` prints what happened as JSON. One process imports torch,
for any number of kills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import sharedctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from score_runs import before_forks, data, files, forked, network, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastfi
from fastfi.data import open_dataset

N, BATCH, BLOCK = 400, 8, 64
CALLS = sharedctypes.RawValue("q", 0)  # forward passes of the child's model


class Slow(nn.Module):
    """A network that takes its time, and whose calls the parent can count."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = network(), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        CALLS.value += 1
        z: Tensor = self.inner(x)
        return z


def make_data(kind: str, folder: Path) -> Any:
    x, y = data(N)
    if kind == "tensors":
        return x, y
    if kind == "workers":
        return DataLoader(TensorDataset(x, y), num_workers=1)
    if kind == "samples":
        return zip((f"n{i}" for i in range(N)), x, y, strict=True)
    if kind == "batches":
        return iter(list(zip(x.split(5), y.split(5), strict=True)))
    if not (folder / "data.npz").exists():
        np.savez(folder / "data.npz", x=(x * 255).byte().numpy(), y=y.numpy())
    return open_dataset(folder / "data.npz")


def scored(kind: str, folder: Path, out: str, seconds: float = 0.0, **options: Any) -> Any:
    """All rows, once they are there."""
    transform = (lambda x: x.double()) if kind == "npz" else None
    given = {"batch_size": BATCH, "part_rows": BLOCK, "part_seconds": 0.03, **options}
    scores = fastfi.score(
        Slow(seconds).eval(),
        make_data(kind, folder),
        out=folder / out,
        transform=transform,
        **given,
    )
    assert scores.complete
    return rows(scores)


def found(folder: Path) -> Any:
    """The rows of a directory whose run was killed; None where nothing has been written yet."""
    try:
        scores = fastfi.open_scores(folder)
    except fastfi.DataError:
        assert not list(folder.glob("*.parquet")), "unreadable"
        return None
    return rows(scores) if scores.columns else None


class Child:
    """A forked process that computes something."""

    def __init__(self, work: Callable[[], Any], log: Path) -> None:
        self._log = log
        CALLS.value = 0
        self.pid = forked(lambda: torch.save(work(), log))

    def ended(self) -> bool:
        """Whether it has come to an end by itself."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def result(self) -> Any:
        """What it computed; None if it was killed."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            return None
        assert code == 0, f"the child ended with {code}"
        return torch.load(self._log)


def same(a: dict[str, list[Any]], b: dict[str, list[Any]]) -> bool:
    """Bit for bit, and in the same order."""
    return repr(a) == repr(b)


def part_of_it(some: Any, whole: dict[str, list[Any]]) -> int:
    """The number of rows, each of which is one of the whole's, in its order, none twice."""
    if some is None:
        return 0
    places = {name: i for i, name in enumerate(whole["id"])}
    at = [places[name] for name in some["id"]]
    assert at == sorted(set(at)), "doubled or mixed up"
    assert same(some, {c: [v[i] for i in at] for c, v in whole.items()}), "other values"
    return len(at)


def at_random(folder: Path, kinds: list[str], kills: int, seed: int) -> Any:
    """Each kind is killed so often, after a random number of forward passes, and then continued to
    its end. Returns rows after each kill, and what is left at the end."""
    chance, log = random.Random(seed), folder / "log"
    report = {}
    for kind in kinds:
        whole = Child(lambda kind=kind: scored(kind, folder, f"{kind}-whole"), log).result()
        out, counts = folder / kind, []
        while len(counts) < kills:
            child = Child(lambda kind=kind: scored(kind, folder, kind, 0.004), log)
            wanted = chance.randint(0, 9)
            while CALLS.value < wanted and not child.ended():
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.01))
            os.kill(child.pid, signal.SIGKILL)
            assert child.result() is None
            counts.append(part_of_it(Child(partial(found, out), log).result(), whole))
        end = Child(lambda kind=kind: scored(kind, folder, kind), log).result()
        assert same(end, whole), f"{kind}: other rows than without kills"
        report[kind] = {
            "counts": counts,
            "unfinished": [name for name in files(out) if name.endswith(".tmp")],
        }
    return report


def die_at(number: int, names: list[tuple[Any, str]], after: bool) -> None:
    """The process kills itself at (before or after) the n-th call of any of these functions."""
    calls = iter(range(1, 10_000))

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            mine = next(calls) == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name in names:
        setattr(owner, name, dying(getattr(owner, name)))


def at_every_call(folder: Path, overwrite: bool) -> Any:
    """Killed at every call by which something gets onto the disk: between a part's content and its
    name, between parts and the manifest. Returns the number of kills and rows after each."""
    log, names = folder / "log", [(os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")]
    options: Any = {"batch_size": 100, "part_rows": 200, "part_seconds": 60}
    whole = Child(lambda: scored("tensors", folder, "whole", **options), log).result()
    if overwrite:
        old = Child(
            lambda: scored("tensors", folder, "old", y="predicted", **options), log
        ).result()
    counts = []
    for after in (False, True):
        for number in range(1, 100):
            out = folder / "out"
            if overwrite:
                shutil.copytree(folder / "old", out)

            def killed(number: int = number, after: bool = after) -> Any:
                die_at(number, names, after)
                return scored("tensors", folder, "out", overwrite=overwrite, **options)

            end = Child(killed, log).result()
            if end is None:
                some = Child(partial(found, out), log).result() if out.exists() else None
                of_old = overwrite and some is not None and not same(some, some | {
                    "fi": [whole["fi"][i] for i in some["id"]]})  # fmt: skip
                counts.append(part_of_it(some, old if of_old else whole))
                end = Child(
                    lambda: scored("tensors", folder, "out", overwrite=overwrite, **options), log
                ).result()
                assert same(end, whole)
                assert not [n for n in files(out) if n.endswith(".tmp")]
                shutil.rmtree(out)
                continue
            assert same(end, whole)
            shutil.rmtree(out)
            break
    return counts


def main() -> Iterator[Any]:
    before_forks()
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    if scenario == "random":
        yield at_random(folder, ["tensors", "samples", "batches", "npz", "workers"], 4, seed=0)
    else:
        yield at_every_call(folder, overwrite=scenario == "overwrite")


if __name__ == "__main__":
    for result in main():
        print(json.dumps(result))
