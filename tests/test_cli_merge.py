"""``fastfi merge``: parts of one run, in a folder or a file."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from score_files import CONFIG, manifest, score_table, write_folder, write_part
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner, Result

import fastfi
from fastfi.cli._app import app
from fastfi.scoring.comparison import compare
from fastfi.scoring.result import open_scores

MODEL = {"class": "nets.Net", "digest": "a" * 64}
DATA = {"kind": "TensorDataset", "length": 30, "digest": "d" * 64}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["merge", *arguments])


def machine(name: str, *ranges: tuple[int, int], **changes) -> Path:
    """What a machine leaves that has scored some ranges of 30 rows."""
    table = changes.pop("table", {})
    for start, stop in ranges:
        write_part(Path(name), start, stop, **table)
    manifest(Path(name), 30, **{"complete": False, **changes})
    return Path(name)


def two(**changes) -> None:
    machine("a", (0, 8), (16, 24), **changes)
    machine("b", (8, 16), (24, 30), **changes)


def names() -> list[str]:
    return sorted(os.listdir())


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert names() == ["a", "b"]  # nothing is left


def test_a_folder():
    two(table={"errors": [9]})
    result = merge("a", "b", "--out", "c")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout == "30 rows of 2 folders in c\n"
    scores = open_scores("c")
    assert scores.complete and len(scores) == 30 and scores.errors == 1
    assert scores.to_table().equals(score_table(0, 30, errors=[9]))
    assert names() == ["a", "b", "c"]
    assert sorted(os.listdir("c")) == [
        "_fastfi.json",
        "part-000000000000-000000000008.parquet",
        "part-000000000008-000000000016.parquet",
        "part-000000000016-000000000024.parquet",
        "part-000000000024-000000000030.parquet",
    ]
    before, after = (json.loads(Path(f, "_fastfi.json").read_text()) for f in "ac")
    assert after["complete"] is True and after["rows"] == 30
    same = set(before) - {"complete", "rows", "created"}
    assert {k: before[k] for k in same} == {k: after[k] for k in same}
    for part in Path("a").glob("*.parquet"):
        assert part.read_bytes() == Path("c", part.name).read_bytes()
    # what was made is again something to merge
    assert merge("c", "--out", "d").exit_code == 0


@pytest.mark.parametrize("out", ["c.parquet", "c.CSV"])
def test_a_file(out):
    two(table={"errors": [9], "ids": "str"}, id_type="str")
    result = merge("b", "a", "--out", out)
    assert result.exit_code == 0, result.stderr
    scores = open_scores(out)
    expected = score_table(0, 30, errors=[9], ids="str")
    assert scores.to_table().equals(expected)
    if out.endswith("CSV"):
        with open(out, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
        assert lines[0] == expected.column_names and len(lines) == 31
        assert lines[10] == ["ü 0/9.png", "0", "", "", "", "", "row 9: no image"]
    else:
        assert scores.config == CONFIG and scores.model == MODEL and scores.data == DATA
        assert pq.read_schema(out).metadata[b"fastfi.version"] == b"0.1.0"
    assert names() == sorted(["a", "b", out])


@pytest.mark.parametrize("out", ["c", "c.parquet"])
def test_rows_that_are_missing(out):
    machine("a", (0, 8), (10, 20))
    machine("b", (21, 24))
    result = merge("a", "b", "--out", out)
    assert result.exit_code == 0
    assert f"{out}: unfinished; missing: rows 8..9, row 20, rows 24..29" in result.stderr
    assert len(open_scores(out)) == 21
    if out == "c":
        said = json.loads(Path("c/_fastfi.json").read_text())
        assert said["complete"] is False and said["rows"] is None


DIFFERENT = {
    "config": (
        {"config": {**CONFIG, "wrt": "params"}},
        "configuration, wrt: 'input' in a, 'params",
    ),
    "model": ({"model": {**MODEL, "digest": "b" * 64}}, "model, other parameters, digest: 'aaaa"),
    "class": ({"model": {**MODEL, "class": "x.Y"}}, "model: 'nets.Net' in a, 'x.Y' in b"),
    "no model": ({"model": None}, "model: 'nets.Net' in a, None in b"),
    "data": ({"data": {**DATA, "digest": "e" * 64}}, "data: "),
    "a list": ({"data": [1]}, "data, samples: 30 in a, None in b"),
    "length": ({"data": {**DATA, "length": 31}}, "data, samples: 30 in a, 31 in b"),
    "no data": ({"data": None}, "data, samples: 30 in a, None in b"),
    "version": ({"fastfi": "0.2.0"}, "fastfi, version: '0.1.0' in a, '0.2.0' in b"),
    "ids": ({"id_type": "str"}, "id_type: 'int' in a, 'str' in b"),
    "blocks": ({"blocks": ["conv1"]}, "blocks: ['input'] in a, ['conv1'] in b"),
    "columns": ({"table": {"ends": [":x"]}}, "columns: id, label, predicted, log_prob, fi, rank"),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("out", ["c", "c.csv"])
def test_another_run(name, out):
    changes, message = DIFFERENT[name]
    machine("a", (0, 8))
    machine("b", (8, 30), **changes)
    result = merge("a", "b", "--out", out)
    refused(result, "b: expected scores of the same run as a")
    refused(result, f"\n  {message}")


def test_rows_that_are_there_twice():
    machine("a", (0, 8), (16, 24))
    machine("b", (8, 17))
    result = merge("a", "b", "--out", "c")
    refused(result, "both hold row 16")
    for path in ("a/part-000000000016-000000000024.parquet", "b/part-0000"):
        assert path in result.stderr


def test_a_folder_that_is_given_twice():
    two()
    refused(merge("a", "b", "a/../a", "--out", "c"), "a/../a: was given more than once")


def test_rows_past_the_data():
    machine("a", (0, 30))
    machine("b", (30, 31))
    refused(merge("a", "b", "--out", "c"), "expected rows below 30, the length of the data")


def test_no_score_directory():
    two()
    Path("b/_fastfi.json").unlink()
    refused(merge("a", "b", "--out", "c"), "b: expected a score directory, got one without _fast")
    refused(merge("a", "x", "--out", "c"), "x: there is no such file or folder")
    part = next(Path("a").glob("*.parquet"))
    refused(merge(str(part), "--out", "c"), f"{part}: expected a score directory, got a file")
    shutil.rmtree("b")
    shutil.copy(part, "b")
    refused(merge("a", "b", "--out", "c"), "b: expected a folder of scores, or a file ending in")


@pytest.mark.parametrize("out", ["b", "a", ".", "x/c", "x/c.csv"])
def test_a_place_that_cannot_be(out):
    two()
    message = "there is no folder x" if out.startswith("x") else "exists already; expected a new fo"
    refused(merge("a", "b", "--out", out), f"--out {out}: {message}")


@pytest.mark.parametrize("out", ["a/c", "b/../b/c.csv"])
def test_a_place_inside_of_what_is_merged(out):
    two()
    refused(merge("a", "b", "--out", out), "expected a place outside of the folders to be merged")


def test_an_older_file_stays_or_is_replaced():
    two()
    Path("c.csv").write_text("old")
    result = merge("a", "b", "--out", "c.csv")
    assert result.exit_code == 2 and "exists already; --overwrite replaces it" in result.stderr
    assert Path("c.csv").read_text() == "old"
    assert merge("a", "b", "--out", "c.csv", "--overwrite").exit_code == 0
    assert len(open_scores("c.csv")) == 30
    Path("c").mkdir()
    result = merge("a", "b", "--out", "c", "--overwrite")
    assert result.exit_code == 2 and "--out c: exists already" in result.stderr
    assert os.listdir("c") == []


@pytest.mark.parametrize("out", ["c", "c.parquet", "c.csv"])
def test_a_part_that_is_damaged(out):
    two()
    path = Path("b/part-000000000024-000000000030.parquet")
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    refused(merge("a", "b", "--out", out), f"{path}: cannot be read as Parquet")


@pytest.mark.parametrize("out", ["c.parquet", "c.csv"])
def test_damaged_pages_leave_nothing(out):
    machine("a", (0, 8))
    path = write_part(Path("b"), 8, 4000)
    for folder in "ab":
        manifest(Path(folder), 4000, complete=False)
    data = bytearray(path.read_bytes())
    data[10 : len(data) // 2] = b"\xff" * (len(data) // 2 - 10)
    path.write_bytes(data)
    refused(merge("a", "b", "--out", out), f"{path}: cannot be read")


def test_a_full_disk_leaves_nothing(monkeypatch):
    two()
    copied, real = [], shutil.copyfile

    def full(source, target):
        copied.append(source)
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    refused(merge("a", "b", "--out", "c"), "cannot write c: No space left on device")


def test_a_copy_that_is_cut_leaves_nothing(monkeypatch):
    two()
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: b.write_bytes(a.read_bytes()[:-9]))
    refused(merge("a", "b", "--out", "c"), "cannot be read as Parquet")


def test_ctrl_c_leaves_nothing(monkeypatch):
    two()

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    result = merge("a", "b", "--out", "c")
    assert result.exit_code == 130 and "interrupted, no scores were written" in result.stderr
    assert names() == ["a", "b"]


def test_a_result_that_appears_meanwhile_is_not_replaced(monkeypatch):
    two()
    real = shutil.copyfile

    def copy(source, target):
        Path("c").mkdir(exist_ok=True)
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    result = merge("a", "b", "--out", "c")
    assert result.exit_code == 2 and "--out c: exists already" in result.stderr
    assert names() == ["a", "b", "c"] and os.listdir("c") == []


@pytest.mark.parametrize("complete", [False, True])
def test_a_stream_whose_length_one_machine_knows(complete):
    unknown = {**DATA, "length": None}
    machine("a", (0, 8), data=unknown)
    ended = {"complete": True, "rows": 12} if complete else {}
    machine("b", (8, 12), data=unknown, **ended)
    result = merge("a", "b", "--out", "c")
    assert result.exit_code == 0, result.stderr
    assert open_scores("c").complete == complete
    assert ("fastfi: c: unfinished" in result.stderr) != complete


def test_machines_that_have_not_scored_anything():
    machine("a")
    machine("b", (0, 4))
    assert merge("a", "b", "--out", "c").exit_code == 0
    assert open_scores("c").missing == ((4, 30),)
    assert merge("a", "b", "--out", "c.parquet").exit_code == 0
    assert len(open_scores("c.parquet")) == 4
    shutil.rmtree("c")
    os.unlink("c.parquet")
    shutil.rmtree("b")
    machine("b")
    refused(merge("a", "b", "--out", "c.csv"), "a: holds no scores yet")
    assert merge("a", "b", "--out", "c").exit_code == 0
    assert len(open_scores("c")) == 0


def test_an_unfinished_result_can_be_continued():
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, data = nn.Linear(6, 3).eval(), TensorDataset(x, torch.arange(40) % 3)

    def score(out: str) -> fastfi.Scores:
        return fastfi.score(model, data, out=out, part_rows=8, batch_size=8)

    whole = score("whole").to_table()
    said = json.loads(Path("whole/_fastfi.json").read_text())
    for i, folder in enumerate("ab"):
        Path(folder).mkdir()
        text = json.dumps({**said, "complete": False, "rows": None})
        Path(folder, "_fastfi.json").write_text(text)
        for part in sorted(Path("whole").glob("*.parquet"))[i:4:2]:  # the fifth is nobody's
            shutil.copy(part, folder)
    result = merge("a", "b", "--out", "c")
    assert "unfinished; missing: rows 32..39" in result.stderr
    assert not open_scores("c").complete
    assert score("c").to_table().equals(whole)
    assert open_scores("c").complete


def test_data_without_rows():
    write_folder(Path("a"), [0, 0])
    assert merge("a", "--out", "b").exit_code == 0
    assert open_scores("b").complete and len(open_scores("b")) == 0
    assert merge("b", "--out", "c.csv").exit_code == 0
    header = ["id,label,predicted,log_prob,fi,rank,error"]
    assert Path("c.csv").read_text().splitlines() == header
    manifest(Path("d"), 0)  # a run on data without samples writes no part
    assert merge("d", "--out", "e.csv").exit_code == 0
    assert Path("e.csv").read_text().splitlines() == header


def test_a_csv_file_of_numbered_strings_is_paired_with_its_source():
    ids = pa.array([str(i) for i in range(8)], pa.string())
    for name, (start, stop) in {"a": (0, 5), "b": (5, 8)}.items():
        table = score_table(start, stop).set_column(0, "id", ids[start:stop])
        machine(name, (start, stop), table={"table": table}, id_type="str")
    for out in ("c.csv", "d.parquet"):
        assert merge("a", "b", "--out", out).exit_code == 0
    assert compare("c.csv", "d.parquet").pairs.ids.tolist() == list(range(8))
    assert compare("d.parquet", "c.csv").pairs.ids.tolist() == ids.to_pylist()
