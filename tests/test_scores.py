"""fastfi.scoring.result: score directories, folders of Parquet and files, written by hand."""

from __future__ import annotations

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
