"""fastfi.scoring.result: score directories, folders of Parquet and files, written by hand."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from score_files import CONFIG, manifest, score_table, write_folder, write_part
from torch import nn
from torch.utils.data import TensorDataset

import fastfi
from fastfi._extras import MissingExtraError
from fastfi.errors import DataError, OptionError
from fastfi.scoring.measure import Measure, value_columns
from fastfi.scoring.result import PERCENTILES, open_scores


def whole(*bounds: int, **how) -> pa.Table:
    return score_table(bounds[0], bounds[-1], **how)


def mine(logits, labels):
    return -logits.log_softmax(1)[:, 0]


def test_a_score_directory(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 8, 20, 21], errors=[3, 20])
    scores = open_scores(str(folder))
    expected = whole(0, 21, errors=[3, 20])
    assert len(scores) == 21
    assert scores.to_table().equals(expected)
    assert scores.columns == ("id", "label", "predicted", "log_prob", "fi", "rank", "error")
    assert scores.fi_columns == ("fi",) and scores.blocks == ()
    assert scores.config == CONFIG
    assert scores.model == {"class": "nets.Net", "digest": "a" * 64}
    assert scores.data["length"] == 21
    assert scores.class_names == ("zero", "one", "two")
    assert scores.complete and scores.missing == () and scores.id_type == "int"
    assert scores.errors == 2
    fi = [v for v in expected["fi"].to_pylist() if v is not None]
    assert len(fi) == 19
    for q, value in scores.percentiles().items():
        assert value == pytest.approx(np.percentile(fi, q), rel=1e-12)
    summary = scores.summary()
    assert summary[:3] == (21, 19, 2) and summary.complete
    assert tuple(summary.percentiles) == PERCENTILES
    right = [i for i in range(21) if i % 4 and i not in (3, 20)]
    assert summary.accuracy == pytest.approx(len(right) / 19)
    assert repr(scores).splitlines()[0] == f"Scores of 21 samples in {folder}"
    assert "wrt='input', inverse='Exact(rtol=None)'" in repr(scores)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("ends", "blocks"),
    [
        (["@cross_entropy", "@margin"], ()),
        ([":a", ":a.b"], ("a", "a.b")),  # for nested columns, "fi:a" would be a prefix
        ([":conv1@margin", ":conv1@logit", ":fc@margin", ":fc@logit"], ("conv1", "fc")),
        ([":odd@name"], ("odd@name",)),
    ],
)
def test_columns_of_blocks_and_objectives(tmp_path, ends, blocks, both):
    folder = write_folder(tmp_path / "s", [0, 4, 9], ends=ends, both=both)
    scores = open_scores(folder)
    assert scores.fi_columns == tuple(f"fi{end}" for end in ends)
    assert scores.blocks == blocks
    assert (f"predicted_fi{ends[0]}" in scores.columns) == both
    expected = whole(0, 9, ends=ends, both=both)
    assert scores.to_table().equals(expected)
    for name in scores.fi_columns:
        assert scores.to_table([name]).equals(expected.select([name]))
        assert scores.percentiles([50], name)[50] == np.median(expected[name].to_pylist())
    assert scores.percentiles() == scores.percentiles(column=scores.fi_columns[0])


def test_columns_are_given_in_the_order_wanted(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 5]))
    assert scores.to_table(["rank", "id"]).column_names == ["rank", "id"]
    assert scores.to_table([]).num_columns == 0


def test_paths_as_ids(tmp_path):
    scores = open_scores(write_folder(tmp_path / "ö s", [0, 3, 5], ids="str"))
    assert scores.id_type == "str"
    assert scores.to_table(["id"])["id"].to_pylist()[4] == "ü 1/4.png"


def test_the_largest_come_first_and_ties_in_order(tmp_path):
    fi = [1.0, math.inf, 0.0, 3.0, math.inf, 3.0, 2.0, 3.0]
    for part in (slice(0, 3), slice(3, 8)):
        write_part(tmp_path, part.start, part.stop, fi=fi[part], errors=[4])
    scores = open_scores(tmp_path)
    order = [1, 3, 5, 7, 6, 0, 2]  # 4 has an error
    for n in range(9):
        top = scores.top(n)
        assert top["id"].to_pylist() == order[:n]
        assert top.column_names == list(scores.columns)
        assert top["fi"].to_pylist() == [fi[i] for i in order[:n]]
    assert scores.percentiles([0, 50, 100]) == {0: 0.0, 50: 3.0, 100: math.inf}
    for n in (-1, True, 1.5):
        with pytest.raises(OptionError, match="n: expected an integer of at least 0"):
            scores.top(n)


def test_rows_by_number(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 3, 8]))
    assert scores.take([7, 0, 3, 0])["id"].to_pylist() == [7, 0, 3, 0]
    assert len(scores.take([])) == 0
    assert scores.take(np.array([2, 1], np.uint8))["id"].to_pylist() == [2, 1]
    for row in (-1, 8, 2**63):
        with pytest.raises(OptionError, match=rf"expected rows 0..7, got {row}"):
            scores.take([row])


def test_rows_by_a_mask(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 3, 8]))
    mask = np.arange(8) % 3 == 1
    for given in (mask, mask.tolist(), pa.array(mask)):
        assert scores.take(given)["id"].to_pylist() == [1, 4, 7]
    assert len(scores.take(np.zeros(8, bool))) == 0
    for given in (mask[:7], [True], True, mask[None]):
        with pytest.raises(OptionError, match=r"rows: expected a mask of shape \[8\], got \["):
            scores.take(given)


@pytest.mark.parametrize("rows", [[0.9], [1.0], ["1"], [None], [[0, 1], [2]]])
def test_what_is_no_number_of_a_row(tmp_path, rows):
    scores = open_scores(write_folder(tmp_path / "s", [0, 5]))
    with pytest.raises(OptionError, match="rows: expected "):
        scores.take(rows)


def test_a_column_that_is_not_there(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 5], ends=[":a", ":b"]))
    there = "id, label, predicted, log_prob, fi:a, fi:b, rank:a, rank:b, error"
    for call in (lambda: scores.percentiles(column="fi"), lambda: scores.to_table(["id", "fi"])):
        with pytest.raises(OptionError, match=f"no column 'fi' in .*; there are {there}"):
            call()
    with pytest.raises(OptionError, match="'error' holds no scores; those that do are label, pre"):
        scores.top(3, "error")
    with pytest.raises(OptionError, match="expected a list of names, got 'id'"):
        scores.to_table("id")
    with pytest.raises(OptionError, match="'id' was given more than once"):
        scores.to_table(["id", "id"])


@pytest.mark.parametrize("q", [-1, 100.5, math.nan, "5", None, True])
def test_percentiles_are_from_0_to_100(tmp_path, q):
    scores = open_scores(write_folder(tmp_path / "s", [0, 5]))
    with pytest.raises(OptionError, match="q: expected numbers from 0 to 100"):
        scores.percentiles([q])


def test_an_unfinished_directory(tmp_path):
    for start, stop in ((0, 4), (8, 10)):
        write_part(tmp_path, start, stop)
    manifest(tmp_path, 20, complete=False)
    (tmp_path / ".part-000000000004-000000000008.parquet.tmp").write_bytes(b"PAR1")
    scores = open_scores(tmp_path)
    assert len(scores) == 6 and not scores.complete
    assert scores.missing == ((4, 8), (10, 20))
    assert "(unfinished; rows 4..7, 10..19 are missing)" in repr(scores)
    assert scores.to_table(["id"])["id"].to_pylist() == [0, 1, 2, 3, 8, 9]
    # what a run writes later is seen by the next one that opens
    write_part(tmp_path, 4, 8)
    assert len(scores.to_table()) == 6
    assert len(open_scores(tmp_path)) == 10


def test_a_run_that_has_just_begun(tmp_path):
    manifest(tmp_path, None, complete=False, id_type="str", data={"length": None})
    scores = open_scores(tmp_path)
    assert len(scores) == 0 and scores.columns == () and scores.id_type == "str"
    assert scores.summary() == (0, 0, 0, None, {}, False)
    assert scores.to_table().shape == (0, 0)
    assert "(unfinished)" in repr(scores)
    with pytest.raises(DataError, match="holds no scores yet"):
        scores.percentiles()


PLANS = {
    "input": ({}, ()),
    "both": ({"y": "both", "inverse": "damped"}, ()),
    "objectives": ({"wrt": "params", "objective": ("cross_entropy", "margin")}, ()),
    "layers": ({"wrt": "layers", "y": "both", "objective": ("margin", "logit")}, ("a", "b@c")),
    "names": ({"wrt": ("a", "b"), "y": "predicted"}, ("a", "b")),
    "callable": ({"wrt": ["a"], "objective": (mine, "logit")}, ("a",)),
}


@pytest.mark.parametrize("ids", ["int", "str"])
@pytest.mark.parametrize("name", PLANS)
def test_data_without_samples(tmp_path, name, ids):
    """A run on it writes no part; the manifest tells the columns that it would have written."""
    options, blocks = PLANS[name]
    measure = Measure(**options)
    config = json.loads(json.dumps(measure.config()))
    manifest(tmp_path, 0, id_type=ids, config=config, blocks=list(blocks or ["input"]))
    scores = open_scores(tmp_path)
    kinds = {"float": pa.float64(), "int": pa.int64()}
    middle = value_columns(measure, blocks)
    expected = pa.schema(
        [
            ("id", pa.int64() if ids == "int" else pa.string()),
            *((column, pa.int64()) for column in ("label", "predicted")),
            *((column, kinds[kind]) for column, kind in middle.items()),
            ("error", pa.string()),
        ]
    )
    assert scores.complete and len(scores) == 0 and scores.blocks == blocks
    assert scores.schema.equals(expected)
    for table in (scores.to_table(), scores.top(), scores.take([])):
        assert table.equals(expected.empty_table())
    assert scores.to_table(["id", "error"]).column_names == ["id", "error"]
    assert scores.fi_columns == tuple(c for c in middle if c.startswith("fi"))
    assert scores.values().shape == (0,)
    assert scores.percentiles() == {} == scores.percentiles([50], scores.fi_columns[-1])
    assert scores.summary() == (0, 0, 0, None, {}, True)
    with pytest.raises(OptionError, match="q: expected numbers from 0 to 100"):
        scores.percentiles([101])


@pytest.mark.parametrize(
    "changes",
    [{"config": None}, {"config": {"wrt": "layers", "objective": ["logit"]}, "blocks": None},
     {"config": {"wrt": "input", "objective": "logit"}}],
)  # fmt: skip
def test_data_without_samples_and_a_manifest_that_does_not_tell_columns(tmp_path, changes):
    manifest(tmp_path, 0, **changes)
    scores = open_scores(tmp_path)
    assert scores.columns == () and scores.complete
    assert scores.summary() == (0, 0, 0, None, {}, True)


def test_a_finished_run_on_no_samples(tmp_path):
    data = TensorDataset(torch.rand(0, 6), torch.zeros(0, dtype=torch.long))
    model = nn.Linear(6, 3).eval()
    scores = fastfi.score(model, data, out=tmp_path / "s", wrt="layers", progress=False)
    assert scores.complete and len(scores.top()) == 0
    one = TensorDataset(torch.rand(1, 6), torch.zeros(1, dtype=torch.long))
    other = fastfi.score(model, one, out=tmp_path / "t", wrt="layers", progress=False)
    assert scores.schema.equals(other.schema)


def test_a_part_that_is_missing_makes_it_incomplete(tmp_path):
    folder = write_folder(tmp_path / "s", [0, 4, 8, 12])
    (folder / "part-000000000004-000000000008.parquet").unlink()
    scores = open_scores(folder)
    assert not scores.complete and scores.missing == ((4, 8),)


def test_samples_without_a_score_only(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 4], errors=range(4)))
    assert scores.summary() == (4, 0, 4, None, {}, True)
    assert len(scores.top()) == 0
    with pytest.raises(DataError, match="no sample has a score in fi"):
        scores.percentiles()


def test_no_rows(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 0]))
    assert scores.columns[-1] == "error"
    assert scores.summary() == (0, 0, 0, None, {}, True)
    assert scores.to_table().equals(whole(0, 0))
    assert scores.percentiles() == {}


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


def test_pandas(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 3, 5], errors=[1]))
    pytest.importorskip("pandas")
    frame = scores.to_pandas(["id", "fi", "rank"])
    assert frame["id"].tolist() == list(range(5))
    np.testing.assert_array_equal(frame["fi"].to_numpy(), scores.values())


def test_without_pandas(tmp_path, monkeypatch):
    scores = open_scores(write_folder(tmp_path / "s", [0, 3]))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"Scores.to_pandas needs pandas.*pip install"):
        scores.to_pandas()


def test_without_pyarrow(tmp_path, monkeypatch):
    write_folder(tmp_path / "s", [0, 3])
    (tmp_path / "s.csv").write_text("id,fi\n1,2\n")
    for module in ("pyarrow", "pyarrow.parquet", "pyarrow.csv"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("s", "s.csv"):
        with pytest.raises(
            MissingExtraError, match=r"reading scores needs pyarrow.*fastfi\[score\]"
        ):
            open_scores(tmp_path / name)


def test_parts_are_streamed(tmp_path):
    scores = open_scores(write_folder(tmp_path / "s", [0, 3, 5]))
    assert [len(t) for t in scores.tables(["fi"])] == [3, 2]
    table = pa.concat_tables([whole(0, 50)] * 2000)
    pq.write_table(table, tmp_path / "large.parquet")
    lengths = [len(t) for t in open_scores(tmp_path / "large.parquet").tables(["fi"])]
    assert sum(lengths) == 100_000 and max(lengths) <= 65_536


def test_scores_open_without_the_rest(tmp_path):
    """Reading scores needs pyarrow only."""
    write_folder(tmp_path / "s", [0, 3])
    code = (
        "import sys; from fastfi.scoring.result import open_scores; "
        f"assert len(open_scores({json.dumps(str(tmp_path / 's'))}).to_table()) == 3; "
        "print({'typer', 'scipy', 'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
