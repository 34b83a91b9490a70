"""fastfi.scoring.comparison.compare."""

from __future__ import annotations

import json
import math
import sys
from itertools import permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv
from score_files import manifest, score_table, write_folder, write_part

from fastfi._extras import MissingExtraError
from fastfi.errors import DataError, OptionError
from fastfi.scoring.comparison import compare
from fastfi.scoring.percentiles import PERCENTILES
from fastfi.scoring.result import open_scores


def ks(a, b) -> float:
    """The definition, over every value."""
    at = np.concatenate([a, b])
    return max(abs(np.mean(a <= x) - np.mean(b <= x)) for x in at)


def write(path, table: pa.Table):
    pq.write_table(table, path)
    return path


def test_the_same_samples(tmp_path):
    a = write_folder(tmp_path / "a", [0, 30, 50], errors=[7])
    b = write_folder(tmp_path / "b", [0, 20, 50], errors=[40], seed=1)
    result = compare(a, open_scores(b))
    x, y = open_scores(a).values(), open_scores(b).values()
    both = ~(np.isnan(x) | np.isnan(y))
    assert result.columns == ("fi", "fi") and result.rows == (50, 50)
    assert result.ks == pytest.approx(ks(x[~np.isnan(x)], y[~np.isnan(y)]), abs=1e-15)
    assert 0 < result.p_value <= 1
    assert result.percentiles == (open_scores(a).percentiles(), open_scores(b).percentiles())
    assert tuple(result.percentiles[0]) == PERCENTILES
    assert (result.matched, result.only, result.unpaired) == (50, (0, 0), None)
    assert result.pairs.ids.tolist() == [i for i in range(50) if i not in (7, 40)]
    np.testing.assert_array_equal(result.pairs.a, x[both])
    np.testing.assert_array_equal(result.pairs.b, y[both])
    order = [np.argsort(np.argsort(v)) for v in (x[both], y[both])]
    assert result.pairs.spearman == pytest.approx(np.corrcoef(*order)[0, 1])
    assert result.pairs.same_label.all() and result.pairs.same_prediction.all()
    assert result.same_data is True


@pytest.mark.parametrize("ids", ["int", "str"])
def test_samples_in_another_order(tmp_path, ids):
    whole = score_table(0, 40, ids=ids)
    order = np.random.default_rng(0).permutation(40)[:30]
    a, b = write(tmp_path / "a.parquet", whole), write(tmp_path / "b.parquet", whole.take(order))
    for result in (compare(a, b), compare(b, a)):
        np.testing.assert_array_equal(result.pairs.a, result.pairs.b)
        assert result.pairs.spearman == pytest.approx(1)
        assert result.matched == 30 and sorted(result.only) == [0, 10]
        assert result.same_data is None
    assert result.pairs.ids.tolist() == whole["id"].take(order).to_pylist()


def test_labels_and_predictions_that_differ(tmp_path):
    whole = score_table(0, 6)
    a = whole.set_column(1, "label", pa.array([0, 1, 2, None, 0, None]))
    b = whole.set_column(1, "label", pa.array([0, 2, 2, 1, None, None]))
    b = b.set_column(2, "predicted", pa.array([9, *whole["predicted"].to_pylist()[1:]]))
    result = compare(write(tmp_path / "a.parquet", a), write(tmp_path / "b.parquet", b))
    assert result.pairs.same_label.tolist() == [True, False, True, False, False, False]
    assert result.pairs.same_prediction.tolist() == [False] + [True] * 5
    unlabelled = whole.set_column(1, "label", pa.nulls(6, pa.int64()))
    result = compare(write(tmp_path / "b.parquet", unlabelled), tmp_path / "a.parquet")
    assert result.pairs.same_label is None


def test_infinite_values(tmp_path):
    write_part(tmp_path / "a", 0, 5, fi=[1.0, math.inf, math.inf, 0.0, 2.0])
    write_part(tmp_path / "b", 0, 5, fi=[1.0, math.inf, 3.0, 0.0, 2.0])
    result = compare(tmp_path / "a", tmp_path / "b")
    assert result.ks == pytest.approx(0.2)
    assert result.percentiles[0][100] == result.percentiles[1][100] == math.inf
    assert result.pairs.spearman == pytest.approx(
        np.corrcoef([1, 3.5, 3.5, 0, 2], [1, 4, 3, 0, 2])[0, 1]
    )


def test_the_distance_of_equal_and_of_disjoint_distributions(tmp_path):
    a = write_folder(tmp_path / "a", [0, 100])
    assert compare(a, a)[4:6] == (0, 1)
    write_part(tmp_path / "b", 0, 100, fi=[math.inf] * 100)
    far = compare(a, tmp_path / "b")
    assert far.ks == 1 and far.p_value < 1e-50
    assert far.pairs.spearman is None  # of a constant
    one = [write_folder(tmp_path / f"one{i}", [0, 1], seed=i) for i in range(2)]
    assert compare(*one).pairs.spearman is None


def test_other_data(tmp_path):
    """Positions in data sets of other sizes are equal by chance."""
    a, b = write_folder(tmp_path / "a", [0, 60]), write_folder(tmp_path / "b", [0, 10], seed=1)
    manifest(b, 10, data={"kind": "TensorDataset", "length": 10, "digest": "e" * 64})
    for result in (compare(a, b), compare(b, a)):
        assert result.pairs is None and result.matched == 10
        assert "10 ids are in both, of " in result.unpaired
        assert result.same_data is False
        assert sorted(result.only) == [0, 50]


@pytest.mark.parametrize("swap", [False, True])
def test_ids_that_are_there_twice_are_not_paired(tmp_path, swap):
    whole = score_table(0, 10, ids="str")
    a = write(tmp_path / "a.parquet", whole)
    b = write(tmp_path / "b.parquet", whole.take([0, 1, 2, 3, 3, 3, 4, 5, 6, 6]))
    result = compare(*(b, a) if swap else (a, b))
    assert result.pairs is None and result.matched == 0 and result.only == (10, 10)
    side = "first" if swap else "second"
    assert result.unpaired == f"the {side} holds the id 'ü 0/3.png' 3 times"
    assert result.ks == pytest.approx(compare(b, a).ks)


def test_ids_of_other_types_are_not_paired(tmp_path):
    a = write_folder(tmp_path / "a", [0, 10])
    b = write_folder(tmp_path / "b", [0, 10], ids="str")
    assert compare(a, b).unpaired == "ids are integers in the first, strings in the second"
    assert compare(a, b).pairs is None and compare(a, b).ks == 0


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_numbered_strings_match_integers(tmp_path, suffix):
    """The strings "0", "1", ... come back from CSV as integers."""
    table = score_table(0, 20)
    missing = [None] if suffix == "parquet" else [19]  # in CSV, it would keep the others strings
    numbers = pa.array([*range(19), *missing], pa.int64())
    a = write(tmp_path / "a.parquet", table.set_column(0, "id", numbers.cast("string")))
    b, table = tmp_path / f"b.{suffix}", table.set_column(0, "id", numbers)
    (write_csv if suffix == "csv" else pq.write_table)(table, b)
    assert (open_scores(a).id_type, open_scores(b).id_type) == ("str", "int")
    matched = 20 - numbers.null_count
    for pair, ids in (((a, b), list(map(str, range(matched)))), ((b, a), list(range(matched)))):
        result = compare(*pair)
        assert result.unpaired is None and result.pairs.ids.tolist() == ids
        np.testing.assert_array_equal(result.pairs.a, result.pairs.b)
        assert result.pairs.same_label.all() and result.only == (20 - matched,) * 2


def test_samples_without_an_id_match_nothing(tmp_path):
    whole = score_table(0, 6)
    paths = []
    for name, ids in {"a": [None, None, 2, 3, 4, 5], "b": [None, 2, 3, 4, 5, None]}.items():
        table = whole.set_column(0, "id", pa.array(ids, pa.int64()))
        paths.append(write(tmp_path / f"{name}.parquet", table))
    result = compare(*paths)
    assert result.pairs.ids.tolist() == [2, 3, 4, 5] and result.only == (2, 2)


def test_another_column(tmp_path):
    a = write_folder(tmp_path / "a", [0, 10], ends=[":x", ":y"])
    b = write_folder(tmp_path / "b", [0, 10])
    result = compare(a, a, "fi:y")
    assert result.columns == ("fi:y", "fi:y")
    np.testing.assert_array_equal(result.values[0], open_scores(a).values("fi:y"))
    assert compare(a, b).columns == ("fi:x", "fi")
    for pair in permutations((a, b)):
        with pytest.raises(OptionError, match="no column 'fi:y' in "):
            compare(*pair, "fi:y")
    with pytest.raises(OptionError, match="'id' holds no scores"):
        compare(a, b, "id")


def test_nothing_to_compare(tmp_path):
    a = write_folder(tmp_path / "a", [0, 5])
    b = write_folder(tmp_path / "b", [0, 5], errors=range(5))
    with pytest.raises(DataError, match="b: no sample has a score in fi"):
        compare(a, b)
    manifest(tmp_path / "c", None, complete=False)
    with pytest.raises(DataError, match="c: holds no scores yet"):
        compare(a, tmp_path / "c")
    with pytest.raises(DataError, match="there is no such file"):
        compare(a, tmp_path / "d")


def test_data_without_a_digest(tmp_path):
    a = write_folder(tmp_path / "a", [0, 5])
    content = json.loads((a / "_fastfi.json").read_text())
    (a / "_fastfi.json").write_text(json.dumps({**content, "data": {"digest": None}}))
    assert compare(a, a).same_data is None


def test_without_scipy(tmp_path, monkeypatch):
    a = write_folder(tmp_path / "a", [0, 5])
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtraError, match="comparing scores needs scipy"):
        compare(a, a)
