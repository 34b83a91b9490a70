"""``fastfi summary``, and how tables and JSON are printed."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_files import manifest, score_table, write_folder, write_part
from typer.testing import CliRunner, Result

from fastfi.cli._app import app
from fastfi.cli._show import Cell, one_line, show_table
from fastfi.scoring.result import open_scores


def summary(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["summary", *map(str, arguments)])


def said(*arguments: object) -> dict:
    result = summary(*arguments, "--json")
    assert result.exit_code == 0, result.stderr

    def constant(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return json.loads(result.stdout, parse_constant=constant)


def table(text: str, first: str) -> list[list[str]]:
    """The table whose first line begins with ``first``, as cells."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    stop = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start:stop]]


def test_percentiles_and_counts(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 30, 50], errors=[1, 2, 3, 44])
    result = summary(folder)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    accuracy = open_scores(folder).summary().accuracy
    assert lines[0] == f"{folder}: 50 samples, 4 errors, accuracy {accuracy:.2%}"
    assert lines[1:5] == [
        *(f"error of {i}: row {i}: no image" for i in (1, 2, 3)),
        "and 1 more errors",
    ]
    head, row = table(result.stdout, "   ")
    assert head == ["1 %", "5 %", "25 %", "50 %", "75 %", "90 %", "95 %", "99 %", "max"]
    values = open_scores(folder).percentiles().values()
    assert row == ["fi", *(f"{v:.4g}" for v in values)]


def test_json(tmp_path):
    folder = tmp_path / "s"
    write_part(folder, 0, 6, fi=[math.inf, 1, 2, 3, 4, 5], errors=[1])
    manifest(folder, 9, complete=False)
    found = said(folder, "--top", 2, "--by", "label")
    scores = open_scores(folder)
    assert found["path"] == str(folder)
    assert (found["rows"], found["scored"], found["errors"]) == (6, 5, 1)
    assert found["complete"] is False and found["missing"] == [[6, 9]]
    assert found["config"] == scores.config
    assert found["percentiles"]["fi"]["100"] == "inf"
    assert float(found["percentiles"]["fi"]["50"]) == scores.percentiles([50])[50]
    assert [row["id"] for row in found["top"]] == [0, 5]
    assert set(found["top"][0]) == {"id", "label", "predicted", "log_prob", "fi"}
    assert found["top"][0]["fi"] == "inf"
    assert found["first_errors"] == [{"id": 1, "error": "row 1: no image"}]
    by = {row["class"]: row for row in found["by"]}
    assert {k: (row["name"], row["rows"], row["scored"]) for k, row in by.items()} == {
        0: ("zero", 2, 2),
        1: ("one", 2, 1),
        2: ("two", 2, 2),
    }
    assert by[2]["percentiles"]["50"] == 3.5


@pytest.mark.parametrize("by", ["label", "predicted"])
def test_by_class(tmp_path, by):
    folder = write_folder(tmp_path / "s", [0, 60], errors=[5])
    result = summary(folder, "--by", by)
    assert f"fi by {by}" in result.stdout
    head, *rows = table(result.stdout, by)
    assert head[:3] == [by, "samples", "scored"]
    whole = open_scores(folder).to_table().to_pydict()
    for k, row in enumerate(rows[:3]):
        of = [f for f, c in zip(whole["fi"], whole[by], strict=True) if c == k and f is not None]
        assert row[0] == ["zero", "one", "two"][k]
        assert row[2] == str(len(of))
        assert row[6] == f"{np.percentile(of, 50):.4g}"
    # a sample that has an error has a label, but no prediction
    assert [row[:3] for row in rows[3:]] == ([["none", "1", "0"]] if by == "predicted" else [])


def test_the_largest(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 40], ids="str")
    result = summary(folder, "--top", 3)
    assert "largest fi" in result.stdout
    head, *rows = table(result.stdout, "id ")
    assert head == ["id", "label", "predicted", "P", "fi"]
    top = open_scores(folder).top(3).to_pylist()
    names = ["zero", "one", "two"]
    assert rows == [
        [
            row["id"],
            names[row["label"]],
            names[row["predicted"]],
            f"{math.exp(row['log_prob']):.4g}",
            f"{row['fi']:.4g}",
        ]
        for row in top
    ]
    assert not any(character in result.stdout for character in "│┃━\x1b")


def test_columns(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 40], ends=[":a", ":b"], both=True)
    rows = table(summary(folder).stdout, "   ")[1:]
    assert [row[0] for row in rows] == ["fi:a", "fi:b"]
    found = said(folder, "--column", "predicted_fi:b", "--top", 2, "--by", "predicted")
    scores = open_scores(folder)
    assert list(found["percentiles"]) == ["predicted_fi:b"]
    assert (
        found["percentiles"]["predicted_fi:b"]["50"]
        == scores.percentiles([50], "predicted_fi:b")[50]
    )
    assert [row["id"] for row in found["top"]] == scores.top(2, "predicted_fi:b")["id"].to_pylist()
    assert list(found["top"][0]) == [
        *("id", "label", "predicted", "predicted_log_prob", "predicted_fi:b")
    ]
    result = summary(folder, "--column", "predicted_fi:b", "--top", 2)
    assert table(result.stdout, "id ")[0][-2:] == ["P", "predicted_fi:b"]
    for column, message in (("fi", "no column 'fi' in"), ("error", "'error' holds no scores")):
        result = summary(folder, "--column", column)
        assert result.exit_code == 2 and f"fastfi: error: {message}" in result.stderr.replace(
            "column 'error'", "'error'"
        )


def test_data_without_samples(tmp_path):
    manifest(tmp_path / "s", 0)
    result = summary(tmp_path / "s", "--top", 3, "--by", "label", "--column", "fi")
    assert result.exit_code == 0 and ": 0 samples\n" in result.stdout
    found = said(tmp_path / "s", "--top", 3, "--by", "label")
    assert found["percentiles"] == {"fi": {}} and found["top"] == found["by"] == []


def test_a_column_that_is_in_the_table_already(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 10])
    result = summary(folder, "--column", "log_prob", "--top", 2)
    assert table(result.stdout, "id ")[0] == ["id", "label", "predicted", "log_prob"]


def test_an_unfinished_folder(tmp_path):
    for i in range(0, 70, 10):
        write_part(tmp_path, i, i + 9)
    manifest(tmp_path, 100, complete=False)
    result = summary(tmp_path)
    assert (
        "unfinished; missing: row 9, row 19, row 29, row 39, row 49 and 2 more ranges"
        in result.stdout.replace("\n", " ")
    )


def test_nothing_is_scored_yet(tmp_path):
    manifest(tmp_path, None, complete=False)
    result = summary(tmp_path, "--top", 3, "--by", "label")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path}: 0 samples\nunfinished\n"
    found = said(tmp_path, "--top", 3, "--by", "label")
    assert found["percentiles"] == {} and found["top"] == [] and found["by"] == []


def test_errors_only(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 2], errors=[0, 1])
    result = summary(folder, "--top", 3, "--by", "label")
    assert result.exit_code == 0, result.stderr
    assert "no sample has a score" in result.stdout
    assert said(folder)["percentiles"] == {"fi": {}}
    assert said(folder)["accuracy"] is None


@pytest.mark.parametrize("make", ["nothing", "text", "broken"])
def test_what_is_no_scores(tmp_path, make):
    path = tmp_path / "s.csv"
    if make != "nothing":
        path.write_text("hello" if make == "text" else "id,fi\n1,x\n")
    result = summary(path)
    assert result.exit_code == 2
    assert f"fastfi: error: {path}: " in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert "Traceback" in summary(path, "--traceback").stderr


def test_ids_that_would_break_lines(tmp_path):
    whole = score_table(0, 3)
    ids = ["a\nb\x1b[31m", "[bold]x[/]", "日本語"]
    pq.write_table(whole.set_column(0, "id", pa.array(ids)), tmp_path / "s.parquet")
    result = summary(tmp_path / "s.parquet", "--top", 3)
    assert "a\\nb\\x1b[31m" in result.stdout and "[bold]x[/]" in result.stdout
    assert "\x1b" not in result.stdout
    assert {row["id"] for row in said(tmp_path / "s.parquet", "--top", 3)["top"]} == set(ids)
    assert one_line("a\ud800\u2028") == "a\\ud800\\u2028"


def test_what_a_terminal_of_another_encoding_shows(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 3], ids="str", errors=[2])
    runner = CliRunner(charset="ascii")
    result = runner.invoke(app, ["summary", str(folder), "--top", "1"])
    assert result.exit_code == 0, result.stderr
    assert "error of \\xfc 2/2.png: row 2: no image" in result.stdout
    assert runner.invoke(app, ["summary", str(folder), "--top", "1", "--json"]).exit_code == 0


def test_long_errors_are_cut(tmp_path):
    table = score_table(0, 1, errors=[0]).set_column(6, "error", pa.array(["e" * 5000]))
    pq.write_table(table, tmp_path / "s.parquet")
    assert f"error of 0: {'e' * 288}...\n" in summary(tmp_path / "s.parquet").stdout


def test_columns_are_aligned(capsys):
    show_table([Cell("id", right=False), Cell("fi")], [["日本", "1"], ["abc", "22.5"]], "largest")
    assert capsys.readouterr().out == "largest\nid      fi\n日本     1\nabc   22.5\n"


@pytest.mark.parametrize(("columns", "dropped"), [(120, ""), (30, "x"), (24, "xy"), (5, "xy")])
def test_a_terminal(capsys, monkeypatch, columns, dropped):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    head = [Cell("name", right=False), *map(Cell, "wxyz")]
    row = ["[b]ä[/b]", *["1.234e-05"] * 4]
    if columns == 30:
        head, row = head[:4], ["n", "1.23456", "1.23456", "1.23456"]
    if columns == 24:
        head, row = head[:4], ["[b]ä[/b]", "1.23456", "1.23456", "1.23456"]
    show_table(head, [row], "title", spare=["x", "y"])
    title, first, rule, second = (
        re.sub("\x1b[^m]*m", "", line) for line in capsys.readouterr().out.splitlines()
    )
    assert title == "title" and set(rule) == {"─"}
    kept = [i for i, cell in enumerate(head) if cell.text not in dropped]
    assert first.split() == [head[i].text for i in kept]
    assert second.split() == [row[i] for i in kept]  # nothing is cut, however narrow


def test_class_names_that_are_not_there(tmp_path):
    write_part(tmp_path, 0, 6)
    manifest(tmp_path, 6, class_names=["only one"])
    rows = table(summary(tmp_path, "--by", "label").stdout, "label")[1:]
    assert [row[0] for row in rows] == ["only one", "1", "2"]
    Path(tmp_path / "_fastfi.json").unlink()
    rows = table(summary(tmp_path, "--by", "label").stdout, "label")[1:]
    assert [row[0] for row in rows] == ["0", "1", "2"]


def test_no_labels(tmp_path):
    unlabelled = score_table(0, 5).drop_columns(["label"])
    pq.write_table(unlabelled, tmp_path / "s.parquet")
    result = summary(tmp_path / "s.parquet")
    assert result.exit_code == 0 and "accuracy" not in result.stdout
    result = summary(tmp_path / "s.parquet", "--by", "label")
    assert result.exit_code == 2 and "no column 'label'" in result.stderr
