"""``bench.gpu`` without a GPU: a rehearsal of every section, and what must keep figures back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, gpu_checks, gpu_small, gpu_tools
from bench.gpu_report import Report, Row, short_table
from bench.gpu_rows import WAYS
from fastfi._ops import OP_NAMES

pytestmark = pytest.mark.usefixtures("one_thread")

SECTIONS = [name for name in gpu.SECTIONS if name not in ("tests", "sanitize")]
SOLVES = ("solve_exact", "solve_truncated", "solve_damped")


def files(folder: Path) -> tuple[dict[str, Any], str]:
    """The JSON and the Markdown that a rehearsal wrote; they are all it wrote."""
    (data,), (text,) = folder.glob("rehearsal-*.json"), folder.glob("rehearsal-*.md")
    assert len(list(folder.iterdir())) == 2
    return json.loads(data.read_text()), text.read_text()


def rehearse(folder: Path, *options: str) -> int:
    arguments = ["--rehearse", "--quick", "--one-process", "--seed", "11", "--out", str(folder)]
    return gpu.main([*arguments, *options])


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exit status and files of a run of all sections, in this process."""
    folder = tmp_path_factory.mktemp("rehearsal")
    status = rehearse(folder, "--only", ",".join(SECTIONS))
    data, text = files(folder)
    return SimpleNamespace(status=status, data=data, text=text)


def rows_of(data: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in data["rows"][section]}


def test_every_section_ran(rehearsal: Any) -> None:
    assert rehearsal.data["failures"] == []
    assert rehearsal.status == 0
    assert list(rehearsal.data["rows"]) == list(rehearsal.data["seconds"]) == SECTIONS
    checks = rows_of(rehearsal.data, "check")
    assert set(checks) == {f"check {op}" for op in OP_NAMES}
    assert all(row["met"] is True and 0 <= row["value"] <= row["yardstick"] for row in
               checks.values())  # fmt: skip
    assert rehearsal.data["facts"]["checks"] == dict.fromkeys(OP_NAMES, True)
    times = rows_of(rehearsal.data, "times")
    for op in ("gram [", "segment_gram", *SOLVES, "windows", "channel_sums"):
        named = [row for name, row in times.items() if name.startswith(op)]
        assert named and all(row["value"] > 0 and row["yardstick"] > 0 for row in named), op
    ways = rows_of(rehearsal.data, "rows")
    for way in WAYS:
        row = ways[f"rows of SmallCNN, B = 2, {way.name}"]
        assert (row["value"] is None) == (way.graph or way.tf32 or way.benchmark)
        assert row["note"] == "not on a CPU" if row["value"] is None else row["value"] > 0


def test_a_rehearsal_is_never_taken_for_a_gpu(rehearsal: Any) -> None:
    """Neither by its names, nor by its words, nor by a target that it meets."""
    assert rehearsal.data["rehearsal"] is True
    assert rehearsal.text.startswith("# Rehearsal on a CPU: no figure here is a GPU's")
    assert "gpu" not in rehearsal.data["facts"]["environment"]
    for section in ("environment", "ceilings", "times", "layers", "rows"):
        assert {row["met"] for row in rehearsal.data["rows"][section]} == {None}
    aims = [row for row in rehearsal.data["rows"]["network"] if " x" in row["target"]]
    assert any(row["met"] is None for row in aims)
    assert all(row["met"] is None or row["against"] == "allowed" for row in aims)


def test_the_table_has_every_main_row(rehearsal: Any) -> None:
    rows = [row for rows in rehearsal.data["rows"].values() for row in rows]
    lines = short_table([Row(**row) for row in rows]).splitlines()
    main = [row["name"] for row in rows if row["main"]]
    assert 20 < len(main) < len(rows)
    assert all(line.startswith(name) for line, name in zip(lines[1:], main, strict=True))
    assert len("\n".join(lines)) < 10_000  # what a terminal, or a log's end, shows
    assert all(f"| {name} |" in rehearsal.text for name in main)


def off_by_little(right: Any) -> Callable[..., Tensor]:
    return lambda *args: right(*args) * (1 + 1e-6)


def one_wrong(right: Any) -> Callable[..., Tensor]:
    def wrong(*args: Any) -> Tensor:
        out = right(*args)
        out.view(-1)[-1] *= 2
        return out

    return wrong


def not_written(right: Any) -> Callable[..., Tensor]:
    """All but the last: what torch.empty returned is poisoned there."""

    def wrong(*args: Any) -> Tensor:
        full = right(*args)
        out = torch.empty_like(full)
        out.view(-1)[:-1] = full.view(-1)[:-1]
        return out

    return wrong


def raising(right: Any) -> Callable[..., Tensor]:
    def wrong(*args: Any) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    return wrong


@pytest.mark.parametrize("wrong", [off_by_little, one_wrong, not_written, raising])
def test_no_speed_for_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: Any
) -> None:
    """A kernel whose check fails, or that was not checked, is not timed; others are, and the run
    ends with status 1."""
    checked = {op: gpu_checks.CHECKS[op] for op in ("gram", "solve_damped", "channel_sums")}
    monkeypatch.setattr(gpu_checks, "CHECKS", checked)
    broken = wrong(torch.ops.fastfi.solve_damped)
    monkeypatch.setattr(torch.ops.fastfi, "solve_damped", broken)
    assert rehearse(tmp_path, "--only", "times") == 1
    data, text = files(tmp_path)
    times = rows_of(data, "times")
    assert times["solve_damped"]["note"] == "not timed: its check failed"
    assert times["solve_exact"]["note"] == "not timed: it was not checked"
    timed = [name for name, row in times.items() if row["value"] is not None]
    assert not [name for name in timed if "solve" in name or "windows" in name]
    assert {name.split()[0].strip(",") for name in timed} == {"gram", "channel_sums"}
    (failure,) = data["failures"]
    assert (failure["section"], failure["item"]) == ("check", "solve_damped")
    assert "Traceback" in failure["text"]
    assert "FAILED  check, solve_damped" in capsys.readouterr().out
    assert "## Failed" in text


def checked(op: str, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> bool:
    """Whether the check of an operator passes with another kernel."""
    monkeypatch.setattr(gpu_checks, "CHECKS", {op: gpu_checks.CHECKS[op]})
    monkeypatch.setattr(torch.ops.fastfi, op, wrong)
    report = Report()
    options = {"device": "cpu", "rehearse": True, "quick": True, "seed": 5}
    gpu.run_section("check", report, options, 60.0)
    assert len(report.failures) == (not report.facts["checks"][op])
    return report.facts["checks"][op]


def test_reduced_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 keeps 10 of 23 bits of a factor: too little a difference for the norm of a large Gram
    matrix, and enough for rows that are nearly equal."""
    right = torch.ops.fastfi.conv_gram

    def tf32(t: Tensor) -> Tensor:
        if t.dtype != torch.float32:
            return t
        return (t.contiguous().view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)

    def wrong(x: Tensor, d: list[Tensor], *rest: Any) -> Tensor:
        return right(tf32(x), [tf32(t) for t in d], *rest)

    assert not checked("conv_gram", monkeypatch, wrong)


def test_sums_in_float32_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: Tensor) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return (wide @ wide.mT).double()

    assert not checked("gram", monkeypatch, wrong)


def test_a_wrong_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.ops.fastfi.solve_exact

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        fi, rank = right(*args)
        rank.view(-1)[0] += 1
        return fi, rank

    assert not checked("solve_exact", monkeypatch, wrong)


def test_sections_in_processes_of_their_own() -> None:
    """Rows and facts come back; a section without time left records that, and what it has."""
    options = {"device": "cpu", "rehearse": True, "quick": True, "seed": 5, "commit": "none"}
    report = Report()
    gpu._apart("environment", report, options, 30.0)
    assert report.failures == []
    assert report.facts["environment"]["torch"] == torch.__version__
    assert len(report.rows["environment"]) == len(OP_NAMES)
    gpu._apart("ceilings", report, options, 0.0)
    (failure,) = report.failures
    assert failure["section"] == "ceilings" and "OutOfTime" in failure["text"]


def test_a_process_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=-11))
    report = Report()
    gpu._apart("rows", report, {}, 1.0)
    assert [f["text"] for f in report.failures] == ["the section's process ended with status -11"]
    gpu._apart("check", report, {}, 1.0)
    items = [f["item"] for f in report.failures[1:]]
    assert items == [", ".join(share) for share in gpu.SHARES]


def test_shares_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes side by side check every operator once."""
    assert sorted(op for share in gpu.SHARES for op in share) == sorted(gpu_checks.CHECKS)
    monkeypatch.setitem(
        gpu.SECTIONS, "check", gpu.SECTIONS["check"]._replace(shares=(("gram",), ("segment_gram",)))
    )
    options = {"device": "cpu", "rehearse": True, "quick": True, "seed": 5, "commit": "none"}
    report = Report()
    gpu._apart("check", report, options, 60.0)
    assert report.failures == []
    assert report.facts["checks"] == {"gram": True, "segment_gram": True}
    assert [row.name for row in report.rows["check"]] == ["check gram", "check segment_gram"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    stream = tmp_path / "found.jsonl"
    Report(stream=stream).note("a", 1)
    stream.write_text(stream.read_text() + '{"fact": "b", "val')
    report = Report()
    report.read(stream)
    assert report.facts == {"a": 1}


@pytest.mark.parametrize(("tool", "met"), [("exit 0", True), ("exit 9", False)])
def test_the_checkers_status_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, met: bool
) -> None:
    """A stand-in for compute-sanitizer that notes how it was called."""
    checker, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    checker.write_text(f'#!/bin/sh\necho "$@" >> {log}\necho all operators right\n{tool}\n')
    checker.chmod(0o755)
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: str(checker))
    report = Report()
    options = {"device": "cuda", "rehearse": False, "quick": True, "seed": 5}
    gpu.run_section("sanitize", report, options, 30.0)
    assert [row.met for row in report.all_rows()] == [met, met]
    assert len(report.failures) == (0 if met else 2)
    memory, races = sorted(log.read_text().splitlines())  # they run side by side
    assert "--tool memcheck --error-exitcode 9" in memory and "--tool racecheck" in races
    assert memory.endswith("-m bench.gpu_small --device cuda --seed 5")


def test_every_process_of_the_tests_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python: one file's tests fail, the others pass."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(
        f'#!/bin/sh\necho "$OMP_NUM_THREADS $@" >> {log}\n'
        'case "$*" in *test_ops*) echo 1 failed; exit 1;; esac\necho 9 passed\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(gpu_tools.sys, "executable", str(python))
    report = Report()
    options = {"device": "cuda", "rehearse": False, "quick": True, "seed": 5}
    gpu.run_section("tests", report, options, 30.0)
    passed = ["test_ops.py" not in group for group in gpu_tools.CHOSEN]
    assert passed.count(False) == 1
    assert [row.met for row in report.all_rows()] == passed
    notes = ["9 passed" if good else "1 failed" for good in passed]
    assert [row.note for row in report.all_rows()] == notes
    (failure,) = report.failures
    assert "tests/test_ops.py" in failure["item"] and "status 1" in failure["text"]
    calls = log.read_text().splitlines()
    assert len(calls) == len(gpu_tools.CHOSEN)
    assert all("-m pytest -q --maxfail=5" in c for c in calls)
    assert all("--device cuda tests/" in c and int(c.split()[0]) >= 1 for c in calls)
    for name in [name for group in gpu_tools.CHOSEN for name in group if name.endswith(".py")]:
        assert (gpu.ROOT / "tests" / name).is_file()


def test_a_build_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(returncode=1, stdout="error: expected ';'")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: done)
    report = Report()
    gpu.build(report, "cpu", force=False)
    assert report.all_rows() == []  # nothing is missing
    gpu.build(report, "cpu", force=True)
    assert [row.met for row in report.all_rows()] == [False]
    assert "expected ';'" in report.failures[0]["text"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sections_bring_what_they_need() -> None:
    assert gpu._wanted("times", False) == ["environment", "ceilings", "check", "times"]
    assert gpu._wanted("rows", True) == ["environment", "rows", "sanitize"]
    assert "sanitize" not in gpu._wanted("", False)
    with pytest.raises(SystemExit, match=r"expected some of environment.*got tiems"):
        gpu._wanted("tiems", False)


def test_small_shapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_small.main(["--device", "cpu"]) == 0
    assert "all operators right" in capsys.readouterr().out
    broken = one_wrong(torch.ops.fastfi.channel_sums)
    monkeypatch.setattr(torch.ops.fastfi, "channel_sums", broken)
    assert gpu_small.main(["--device", "cpu"]) == 1
    assert "WRONG  channel_sums" in capsys.readouterr().out
