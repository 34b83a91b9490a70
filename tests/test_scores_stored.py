"""Stored scores as others leave them: files of other programs, CSV, damaged and changing ones."""

from __future__ import annotations

import csv
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_files import CONFIG, manifest, score_table, write_folder, write_part

from fastfi.errors import DataError, OptionError
from fastfi.scoring.result import PERCENTILES, open_scores


def whole(*bounds: int, **how) -> pa.Table:
    return score_table(bounds[0], bounds[-1], **how)


def test_a_folder_of_another_programs_parquet_files(tmp_path):
    """Ray: no manifest, no metadata, names in order, columns without values of the null type."""
    tables = [whole(0, 6).drop_columns(["error", "rank"]), whole(6, 9).drop_columns(["error"])]
    tables[0] = tables[0].set_column(1, "label", pa.nulls(6))
    tables[1] = tables[1].append_column("note", pa.array(["x"] * 3))
    for i, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"0a1b_{i:06}.parquet")
    (tmp_path / "_SUCCESS").touch()
    scores = open_scores(tmp_path)
    assert scores.config is None and scores.class_names is None and scores.complete
    assert scores.errors == 0 and scores.missing == ()
    table = scores.to_table()
    assert table["id"].to_pylist() == list(range(9))
    assert table["label"].to_pylist() == [None] * 6 + [0, 1, 2]
    assert table["label"].type == table["rank"].type == pa.int64()
    assert table["rank"].to_pylist() == [None] * 6 + [2] * 3
    assert table["note"].to_pylist() == [None] * 6 + ["x"] * 3


def test_numbers_of_other_types(tmp_path):
    """pandas' way of integers with gaps, and narrower types."""
    table = whole(0, 4)
    odd = pa.table(
        {
            "id": table["id"].cast(pa.int32()),
            "label": pa.array([0.0, np.nan, 2.0, None]),
            "predicted": table["predicted"].cast(pa.int8()),
            "log_prob": table["log_prob"],
            "fi": pa.array([1.5, np.nan, np.inf, None], pa.float32()),
            "error": pa.array(["", None, "no image", None]).dictionary_encode(),
        }
    )
    pq.write_table(odd, tmp_path / "odd.parquet")
    scores = open_scores(tmp_path / "odd.parquet")
    read = scores.to_table()
    assert read["label"].to_pylist() == [0, None, 2, None]
    assert read["id"].type == read["predicted"].type == pa.int64()
    assert read["fi"].type == pa.float64() and read["error"].type == pa.string()
    assert scores.errors == 1
    np.testing.assert_array_equal(scores.values(), [1.5, np.nan, np.nan, np.nan])
    assert scores.summary()[:3] == (4, 1, 1)


def test_values_that_do_not_fit(tmp_path):
    pq.write_table(whole(0, 4), tmp_path / "a.parquet")
    half = whole(4, 6).set_column(1, "label", pa.array([0.5, 1.0]))
    pq.write_table(half, tmp_path / "b.parquet")
    scores = open_scores(tmp_path)
    assert scores.percentiles([50])  # another column
    with pytest.raises(DataError, match=r"b.parquet: column label: expected int64, got double"):
        scores.to_table()


def test_a_single_file_with_metadata(tmp_path):
    path = write_part(tmp_path, 0, 5)
    path = path.rename(tmp_path / "scores.parquet")
    scores = open_scores(path)
    assert scores.config == CONFIG and scores.model is None and scores.complete
    assert scores.to_table().equals(whole(0, 5))


def test_metadata_that_is_no_json(tmp_path):
    table = whole(0, 2).replace_schema_metadata({"fastfi.config": "{", b"fastfi.\xff": b"\xff"})
    pq.write_table(table, tmp_path / "s.parquet")
    assert open_scores(tmp_path / "s.parquet").config is None


def test_csv(tmp_path):
    header = ["id", "label", "predicted", "log_prob", "fi", "rank", "error"]
    rows = [
        ["7", "1", "1", "-800.5", "inf", "1", ""],
        ["9", "", "0", "-1e-300", "5e-324", "", ""],
        ["1", "2", "", "", "", "", 'no "image",\nreally'],
    ]
    path = tmp_path / "s.csv"

    def write(rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return open_scores(path)

    scores = write(rows)
    assert len(scores) == 3 and scores.id_type == "int" and scores.errors == 1
    assert scores.to_table().to_pydict() == {
        "id": [7, 9, 1],
        "label": [1, None, 2],
        "predicted": [1, 0, None],
        "log_prob": [-800.5, -1e-300, None],
        "fi": [math.inf, 5e-324, None],
        "rank": [1, None, None],
        "error": [None, None, 'no "image",\nreally'],
    }
    assert scores.top(5)["id"].to_pylist() == [7, 9]
    for ids in (["007", "1", "2"], ["a,b", "ü\n", '"'], ["9" * 19, "1", "2"], ["", "NA", "1"]):
        scores = write([[i, *row[1:]] for i, row in zip(ids, rows, strict=True)])
        assert scores.id_type == "str"
        assert scores.to_table(["id", "rank"])["id"].to_pylist() == ids
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # Excel's mark
    assert open_scores(path).to_table(["rank", "id"])["id"].to_pylist() == ids
    scores = write([])
    assert scores.summary() == (0, 0, 0, None, {}, True)
    assert scores.to_table().num_rows == 0


def test_csv_with_columns_of_text(tmp_path):
    (tmp_path / "s.csv").write_text("id,fi,note\n1,2,x\n3,4,\n")
    scores = open_scores(tmp_path / "s.csv")
    assert scores.to_table().to_pydict() == {"id": [1, 3], "fi": [2.0, 4.0], "note": ["x", ""]}
    with pytest.raises(OptionError, match="'note' holds no scores"):
        scores.values("note")


def test_a_file_of_the_score_command(tmp_path):
    from fastfi.cli._output import ScoreFile, Scores

    rows = Scores(
        ["a", "b"], None, np.array([1, 0]), np.array([-1.0, -2.0]), np.array([3.0, np.inf]), None
    )
    for name in ("s.csv", "s.parquet"):
        with ScoreFile(tmp_path / name, "str", {"fastfi.config": {"wrt": "input"}}) as file:
            file.write(rows)
        scores = open_scores(tmp_path / name)
        assert scores.to_table().to_pydict() == {
            "id": ["a", "b"],
            "label": [None, None],
            "predicted": [1, 0],
            "log_prob": [-1.0, -2.0],
            "fi": [3.0, np.inf],
            "rank": [None, None],
        }
        assert scores.summary().accuracy is None
    assert scores.config == {"wrt": "input"}


@pytest.mark.parametrize("bounds", [[(0, 8), (4, 12)], [(0, 100), (3, 5)], [(0, 8), (0, 9)]])
def test_rows_that_are_there_twice(tmp_path, bounds):
    for start, stop in bounds:
        write_part(tmp_path, start, stop)
    low, high = max(b[0] for b in bounds), min(b[1] for b in bounds)
    with pytest.raises(DataError, match=rf"holds rows {low}..{high - 1} twice, in part-0+-0+.*and"):
        open_scores(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 40, -1])
def test_truncated_files(tmp_path, keep):
    write_part(tmp_path, 0, 4)
    path = write_part(tmp_path, 4, 8)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{path.name}: cannot be read as Parquet: truncated"):
        open_scores(tmp_path)


def test_damaged_pages_are_an_error_when_they_are_read(tmp_path):
    path = write_part(tmp_path, 0, 4000)
    data = bytearray(path.read_bytes())
    data[10 : len(data) // 2] = b"\xff" * (len(data) // 2 - 10)
    path.write_bytes(data)
    scores = open_scores(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        scores.to_table()


def test_a_part_with_other_rows_than_its_name_says(tmp_path):
    write_part(tmp_path, 0, 5, table=whole(0, 4))
    with pytest.raises(DataError, match="expected 5 rows, as its name says, got 4"):
        open_scores(tmp_path)


def test_a_part_that_is_removed_while_it_is_read(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 4, 8])
    scores = open_scores(folder)
    path = folder / "part-000000000004-000000000008.parquet"
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: was removed while it was read"):
        scores.to_table()


@pytest.mark.parametrize("name", ["s", "s/part-000000000000-000000000004.parquet", "s.csv"])
def test_the_folder_of_the_process_changes(tmp_path, monkeypatch, name):
    folder = write_folder(tmp_path / "s", [0, 4, 8])
    (tmp_path / "s.csv").write_text("id,fi\n0,1\n1,2\n")
    expected = open_scores(tmp_path / name).to_table()
    monkeypatch.chdir(tmp_path)
    scores = open_scores(name)
    monkeypatch.chdir(folder)
    assert scores.to_table().equals(expected)
    assert len(scores.percentiles()) == len(PERCENTILES) and len(scores.top(1)) == 1
    assert all(path.is_file() for path in scores.files)
    (tmp_path / scores.files[0]).unlink()
    assert str(scores.path) == name
    with pytest.raises(DataError, match=r"^s(/part-0+-0+4.parquet|.csv): was removed while"):
        scores.to_table()


def test_columns_that_differ_between_parts(tmp_path):
    write_part(tmp_path, 0, 4)
    write_part(tmp_path, 4, 8, ends=["@margin", "@logit"])
    with pytest.raises(DataError, match=r"expected the columns of .*, but fi, fi@logit, fi@margin"):
        open_scores(tmp_path)
    write_part(tmp_path, 4, 8, ids="str")
    with pytest.raises(DataError, match=r"its ids are strings, those of .* are not"):
        open_scores(tmp_path)


NOT_SCORES = {
    "nothing": (lambda p: None, "there is no such file or folder"),
    "an empty folder": (lambda p: p.mkdir(), "holds no scores: no _fastfi.json and no .parquet"),
    "another suffix": (lambda p: p.write_text("x"), "or a file ending in .parquet or .csv"),
    "a stranger": (
        lambda p: (write_part(p, 0, 3), pq.write_table(whole(0, 1), p / "sorted.parquet")),
        "holds sorted.parquet, which is none of its parts",
    ),
    "a broken manifest": (
        lambda p: (p.mkdir(), (p / "_fastfi.json").write_text("{")),
        "_fastfi.json: cannot be read as a manifest",
    ),
    "a manifest of lists": (
        lambda p: (p.mkdir(), (p / "_fastfi.json").write_text("[]")),
        "expected a manifest of format 1, got no object",
    ),
    "a newer format": (lambda p: manifest(p, 3, format=2), "of format 1, got format 2"),
    "a wrong name": (
        lambda p: write_part(p, 0, 3).rename(p / "part-3-0.parquet"),
        "the name ends before it starts",
    ),
    "other columns": (
        lambda p: (p.mkdir(), pq.write_table(pa.table({"id": [1], "x": [2]}), p / "a.parquet")),
        "expected scores, with a column id and a column fi, .*; the columns are id, x",
    ),
    "ids of another type": (
        lambda p: (p.mkdir(), pq.write_table(pa.table({"id": [0.5], "fi": [2]}), p / "a.parquet")),
        "column id: expected integers or strings, got double",
    ),
}


@pytest.mark.parametrize("name", NOT_SCORES)
def test_what_is_no_scores(tmp_path, name):
    make, message = NOT_SCORES[name]
    make(tmp_path / "s")
    with pytest.raises(DataError, match=message) as caught:
        open_scores(tmp_path / "s")
    assert str(tmp_path / "s") in str(caught.value)


NOT_CSV = {
    "nothing": b"",
    "a word": b"id,fi\n1,x\n",
    "a short line": b"id,fi\n1\n",
    "two columns of a name": b"id,fi,fi\n1,2,3\n",
    "other columns": b"a,b\n1,2",
    "another encoding's header": b"id,fi,n\xe9\n1,2,3\n",
    "another encoding": b"id,fi\n\xe9,2\n",
    "noise": np.random.default_rng(0).bytes(300_000),
    "a long header": b"x" * 100_000 + b",y\n1,2\n",
}


@pytest.mark.parametrize("name", NOT_CSV)
def test_what_is_no_csv_of_scores(tmp_path, name):
    (tmp_path / "s.csv").write_bytes(NOT_CSV[name])
    with pytest.raises(DataError, match=r"s.csv: ") as caught:
        open_scores(tmp_path / "s.csv").to_table()
    message = str(caught.value).removeprefix(str(tmp_path))
    assert message.isprintable() and len(message) < 400
