"""Runs of ``fastfi.score`` that were stopped go on: killed at any moment, interrupted, mended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from score_runs import (
    Stream,
    check_values,
    contents,
    data,
    files,
    network,
    rewrite_manifest,
    rows,
    stored,
)  # fmt: skip
from torch import Tensor, nn

import fastfi
from fastfi.scoring import parts as parts_module
from fastfi.scoring.fingerprint import StreamDigest

pytestmark = pytest.mark.usefixtures("one_thread")

N = 60
X, Y = data(N)


def kills(scenario: str, folder: Path) -> Any:
    """What tests/score_kills.py tells; workers that outlive their parent may hold its output, so it
    goes to a file."""
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    with (folder / "output").open("w+") as output:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(here / "score_kills.py"), scenario, str(folder)],
            stdout=output, stderr=subprocess.STDOUT, check=False, timeout=240, env=env,
        )  # fmt: skip
        output.seek(0)
        text = output.read()
    assert done.returncode == 0, text
    return json.loads([line for line in text.splitlines() if line[:1] in "[{"][-1])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Twenty kills over five kinds of data: every row there is is right, none is lost later or
    doubled, and the end is bit for bit that of a run without kills."""
    report = kills("random", tmp_path)
    assert sum(len(one["counts"]) for one in report.values()) == 20
    for kind, one in report.items():
        assert one["counts"] == sorted(one["counts"]), kind
        assert one["unfinished"] == [], kind
    assert sum(one["counts"][-1] > 0 for one in report.values()) >= 4


@pytest.mark.parametrize("scenario", ["calls", "overwrite"])
def test_killed_between_content_and_name(scenario: str, tmp_path: Path) -> None:
    """At every call that puts something onto the disk: before and after each."""
    counts = kills(scenario, tmp_path)
    assert len(counts) >= 2 * 4 * 3  # the manifest twice and two parts: file, name, folder
    assert {0, 200, 400} == set(counts)


def stopped(folder: Path, given: Any = None, at: int = 6, **options: Any) -> dict[str, Any]:
    """A run that Ctrl-C ends at its ``at``-th forward pass; the options to go on with."""
    net, calls = network(), []

    def stop(module: nn.Module, args: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt

    net.register_forward_pre_hook(stop)
    options = {"out": folder, "batch_size": 8, "part_rows": 16, **options}
    with pytest.raises(KeyboardInterrupt):
        fastfi.score(net, (X, Y) if given is None else given, **options)
    assert 0 < len(fastfi.open_scores(folder)) < N
    return options


def samples(x: Tensor = X, y: Tensor = Y) -> list[Any]:
    return list(zip(x, y, strict=True))


def batches(size: int, x: Tensor = X) -> list[Any]:
    return list(zip(x.split(size), Y.split(size), strict=True))


def test_what_is_there_is_not_scored_again(tmp_path: Path) -> None:
    options = stopped(tmp_path / "s")
    before, seen = contents(tmp_path / "s"), []
    net = network()
    net.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    check_values(fastfi.score(net, (X, Y), **options), network(), X, Y)
    there = sum(n for name, n in stored(tmp_path / "s") if name in before)
    assert there == 32 and sum(seen) == 1 + N - there  # one to recognise the model by
    after = contents(tmp_path / "s")
    assert {n: after[n] for n in before if n != "_fastfi.json"} == {
        n: v for n, v in before.items() if n != "_fastfi.json"
    }


def test_a_finished_run_is_opened(tmp_path: Path) -> None:
    fastfi.score(network(), (X, Y), out=tmp_path / "s")
    before, net, seen = contents(tmp_path / "s"), network(), []
    net.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    check_values(fastfi.score(net, (X, Y), out=tmp_path / "s"), network(), X, Y)
    assert seen == [1] and contents(tmp_path / "s") == before


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 7}, {"part_rows": 10, "part_seconds": 1e-6}]
)
@pytest.mark.parametrize("complete", [False, True])
def test_a_removed_part_is_scored_again(options: Any, complete: bool, tmp_path: Path) -> None:
    """With other sizes of batches and parts than before, too."""
    fastfi.score(network(), (X, Y), out=tmp_path / "s", batch_size=8, part_rows=16)
    rewrite_manifest(tmp_path / "s", complete=complete)
    for part in sorted((tmp_path / "s").glob("*.parquet"))[1:3]:
        part.unlink()
    assert not fastfi.open_scores(tmp_path / "s").complete
    check_values(fastfi.score(network(), (X, Y), out=tmp_path / "s", **options), network(), X, Y)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    options = stopped(tmp_path / "s")
    part = sorted((tmp_path / "s").glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(fastfi.DataError, match=f"{part.name}: damaged"):
        fastfi.score(network(), (X, Y), **options)
    part.unlink()
    check_values(fastfi.score(network(), (X, Y), **options), network(), X, Y)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "wrt": ({"wrt": "params"}, "configuration, wrt: 'input' there, 'params' now"),
    "inverse": ({"inverse": "damped"}, "configuration, inverse: 'Exact"),
    "rtol": ({"inverse": fastfi.Exact(1e-3)}, r"'Exact\(rtol=0.001\)' now"),
    "y": ({"y": "both"}, "configuration, y: 'label' there, 'both' now"),
    "objective": ({"objective": "margin"}, r"objective: \['cross_entropy'\] there, \['margin'\]"),
    "outputs": ({"outputs": "log_probs"}, "configuration, outputs: 'logits' there"),
    "lump": ({"lump": 1e-3}, "configuration, lump: None there, 0.001 now"),
    "full": ({"assume_full_rank": True}, "assume_full_rank: False there, True now"),
    "limit": ({"limit": 50}, "data, samples: 60 there, 50 now"),
    "data_id": ({"data_id": "mine"}, "data: None there, 'mine' now"),
    "transform": ({"transform": lambda x: x * 0.9}, "16 of 16 samples looked at differ"),
    "length": ({"data": (X[:40], Y[:40])}, "data, samples: 60 there, 40 now"),
    "first": ({"data": (X.index_fill(0, torch.tensor(0), 0.5), Y)}, "1 of 16 samples looked at"),
    "middle": ({"data": (X.index_fill(0, torch.tensor(31), 0.5), Y)}, "1 of 16 samples looked at"),
    "label": ({"data": (X, Y.index_fill(0, torch.tensor(59), 3 - Y[59]))}, "1 of 16 samples"),
    "parameters": ({"model": network(1)}, "model, other parameters"),
    "code": (
        {"model": network().append(nn.Softplus())},
        "the same parameters, but other log-probabilities for sample 0",
    ),
    "class": ({"model": network().forward}, "model: .*Sequential.forward' now"),
    "version": ({"version": "0.0.1"}, "fastfi, version: '0.0.1' there"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_run_is_refused(what: str, tmp_path: Path) -> None:
    """The message says what differs, and nothing in the directory changes."""
    changes, text = CHANGED[what]
    options = stopped(tmp_path / "s")
    if "version" in changes:
        rewrite_manifest(tmp_path / "s", fastfi=changes["version"])
    before = contents(tmp_path / "s")
    new = {k: v for k, v in changes.items() if k not in ("model", "data", "version")}
    with pytest.raises(fastfi.ResumeError, match=text) as caught:
        fastfi.score(
            changes.get("model", network()), changes.get("data", (X, Y)), **{**options, **new}
        )
    assert str(caught.value).count("\n") == 2, caught.value  # nothing else differs
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (lambda: iter(samples(X.index_fill(0, torch.tensor(13), 0.5))), "samples 0 to 15 differ"),
        (lambda: iter(samples(y=Y.index_fill(0, torch.tensor(20), 3))), "samples 16 to 31 differ"),
        (lambda: iter(samples()[:1] + samples()[2:]), "samples 0 to 15 differ"),
        (lambda: iter(samples()[:25]), "32 samples are scored; got 25"),
        (lambda: iter([]), "samples looked at differ"),
        (lambda: iter([(f"n{i}", *pair) for i, pair in enumerate(samples())]), "looked at differ"),
    ],
)
def test_another_stream_is_refused(changed: Any, text: str, tmp_path: Path) -> None:
    options = stopped(tmp_path / "s", iter(samples()))
    before = contents(tmp_path / "s")
    with pytest.raises(fastfi.ResumeError, match=text):
        fastfi.score(network(), changed(), **options)
    assert contents(tmp_path / "s") == before


def test_a_stream_goes_on_however_it_is_cut(tmp_path: Path) -> None:
    options = {**stopped(tmp_path / "s", Stream(batches(5))), "batch_size": 3}
    check_values(fastfi.score(network(), Stream(batches(5)), **options), network(), X, Y)


def test_labels_that_are_missing_look_the_same_however_they_are_cut(tmp_path: Path) -> None:
    some = [(x, None if i < 12 else y) for i, (x, y) in enumerate(samples())]
    options = stopped(tmp_path / "s", Stream(some), batch_size=4, y="predicted", at=9)
    scores = fastfi.score(network(), Stream(some), **{**options, "batch_size": 16})
    check_values(scores, network(), X, None)
    assert rows(scores)["label"] == [None] * 12 + Y[12:].tolist()


def test_another_limit_of_a_stream_is_refused(tmp_path: Path) -> None:
    fastfi.score(network(), iter(samples()), out=tmp_path / "s", limit=20)
    with pytest.raises(fastfi.ResumeError, match="data, limit: 20 there, 30 now"):
        fastfi.score(network(), iter(samples()), out=tmp_path / "s", limit=30)


@pytest.mark.parametrize("stream", [False, True])
def test_data_of_a_name_need_not_be_the_same(stream: bool, tmp_path: Path) -> None:
    """Random transforms: neither samples nor outputs are compared, but names are."""

    def given(seed: int) -> Any:
        x, y = data(N, seed)
        return Stream(samples(x, y)) if stream else (x, y)

    options = stopped(tmp_path / "s", given(1), data_id="noisy")
    with pytest.raises(fastfi.ResumeError, match="data: 'noisy' there, 'other' now"):
        fastfi.score(network(), given(2), **{**options, "data_id": "other"})
    assert len(fastfi.score(network(), given(2), **options)) == N


def test_resume_and_overwrite(tmp_path: Path) -> None:
    options = stopped(tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(fastfi.OptionError, match="holds scores already; resume=True goes on"):
        fastfi.score(network(), (X, Y), **options, resume=False)
    assert contents(tmp_path / "s") == before
    scores = fastfi.score(network(1), (X[:20], Y[:20]), out=tmp_path / "s", overwrite=True)
    check_values(scores, network(1), X[:20], Y[:20])
    assert len(files(tmp_path / "s")) == 2
    check_values(
        fastfi.score(network(), (X, Y), out=tmp_path / "new", resume=False), network(), X, Y
    )


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    tried = []

    def given() -> Iterator[Any]:
        for i, pair in enumerate(samples()):
            if i == 30:
                with pytest.raises(fastfi.OptionError, match="another run is writing there"):
                    fastfi.score(network(), (X, Y), out=tmp_path / "s")
                tried.append(i)
            yield pair

    check_values(fastfi.score(network(), given(), out=tmp_path / "s"), network(), X, Y)
    assert tried == [30]


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_at_every_line_that_collects_rows(stream: bool, tmp_path: Path) -> None:
    """Whatever line of parts.py it comes at: a directory that is right, and goes on."""
    x, y = data(12)
    at = end = 1

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (parts_module.__file__, fingerprint_file):
            return None
        if event == "line" and frame.f_code.co_name in ("add", "flush"):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    fingerprint_file = StreamDigest.add.__code__.co_filename
    interrupted = 0
    while end:
        given = Stream(samples(x, y)) if stream else (x, y)
        options: Any = {"out": tmp_path / "s", "batch_size": 2, "part_rows": 4, "part_seconds": 60}
        left, before = at, sys.gettrace()
        sys.settrace(trace)
        try:
            fastfi.score(network(), given, **options)
            end = 0
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        check_values(fastfi.score(network(), given, **options), network(), x, y)
        shutil.rmtree(tmp_path / "s")
        at += 5
    assert interrupted > 10
