"""fastfi.plot.compare: figures, checked through their artists."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from score_files import score_table, write_folder, write_part

import fastfi
from fastfi import plot
from fastfi.plot.scores import BLUE, ORANGE, STEPS
from fastfi.scoring.comparison import Comparison, compare

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: drawing must neither fail nor warn."""
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def pair(folder: Path, a: list[float], b: list[float], **changes: list[int]) -> Comparison:
    """Two scores of the same samples; ``changes``: columns of the second."""
    n = len(a)
    table = score_table(0, n, fi=b)
    for name, values in changes.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    write_part(folder / "a", 0, n, fi=a)
    write_part(folder / "b", 0, n, table=table)
    return compare(folder / "a", folder / "b")


def test_a_point_for_each_sample(tmp_path):
    write_folder(tmp_path / "a", [0, 30], errors=[4])
    write_folder(tmp_path / "b", [0, 30], seed=1)
    result = compare(tmp_path / "a", tmp_path / "b")
    figure = plot.compare(result, names=["one", "other"], title="two nets")
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (points,) = axes.collections
    np.testing.assert_allclose(points.get_offsets(), np.stack([result.pairs.a, result.pairs.b], 1))
    (diagonal,) = axes.lines
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("FI, one", "FI, other")
    assert figure.get_suptitle() == "two nets"
    assert legend(figure) == ["same label (29)"]
    assert drawn(figure).startswith(b"\x89PNG")


def test_colours_tell_labels_that_differ(tmp_path):
    result = pair(tmp_path, [1, 2, 3, 4], [1, 2, 3, 5], label=[0, 1, 1, 0], predicted=[2] * 4)
    figure = plot.compare(result)
    same, other = figure.axes[0].collections
    assert legend(figure) == ["same label (3)", "another label (1)"]
    assert to_hex(same.get_facecolor()[0]) == BLUE.lower()
    assert to_hex(other.get_facecolor()[0]) == ORANGE.lower()
    np.testing.assert_allclose(other.get_offsets(), [[3, 3]])
    drawn(figure)


def test_colours_tell_predictions_where_all_labels_are_equal(tmp_path):
    result = pair(tmp_path, [1, 2, 3, 4], [1, 2, 3, 5], predicted=[9, 1, 2, 0])
    figure = plot.compare(result)
    assert legend(figure) == ["same prediction (3)", "another prediction (1)"]
    np.testing.assert_allclose(figure.axes[0].collections[1].get_offsets(), [[1, 1]])
    drawn(figure)


EDGES = {
    "zero": [0.0] * 3,
    "infinite": [math.inf, 1.0, math.inf],
    "constant": [1.0] * 3,
    "far apart": [5e-324, 1.0, 1e308],
    "huge": [1e308] * 3,
}


@pytest.mark.parametrize(
    ("a", "b"), [*zip(EDGES, EDGES, strict=True), *pairwise(EDGES), ("infinite", "zero")]
)
def test_any_values_can_be_drawn(tmp_path, a, b):
    result = pair(tmp_path, EDGES[a], EDGES[b])
    figure = plot.compare(result)
    axes = figure.axes[0]
    offsets = axes.collections[0].get_offsets()
    limits = axes.get_xlim()
    assert limits == axes.get_ylim() and 0 < limits[0] < limits[1] < math.inf
    assert offsets.min() >= limits[0] and offsets.max() <= limits[1]
    x, y = np.array(EDGES[a]), np.array(EDGES[b])
    edge = int((~((x > 0) & np.isfinite(x) & (y > 0) & np.isfinite(y))).sum())
    text = figure.legends[0].get_title().get_text()
    assert text == (f"on the edges: {edge} with a zero or infinite value" if edge else "")
    drawn(figure)
    drawn(plot.compare(result._replace(pairs=None, unpaired="few")))


def test_distributions_of_other_samples(tmp_path):
    write_part(tmp_path / "a", 0, 4, fi=[1, 2, 3, 4])
    write_part(tmp_path / "b", 0, 10, fi=[3, 5, 5, 5, 6, 6, 6, 6, 7, math.inf])
    result = compare(tmp_path / "a", tmp_path / "b")
    assert result.pairs is None
    figure = plot.compare(result, names=("train", "test"))
    axes = figure.axes[0]
    assert legend(figure) == ["train (4)", "test (10)", "KS 0.9"]
    first, second, gap = axes.lines
    low, high = axes.get_xlim()
    assert list(first.get_xdata()) == [low, 1, 2, 3, 4, high]
    assert list(first.get_ydata()) == [0, 0.25, 0.5, 0.75, 1, 1]
    # the infinite one is on the edge, and only there the curve ends at 1
    assert list(second.get_xdata())[-2:] == [7, high] and list(second.get_ydata())[-2:] == [0.9, 1]
    assert list(gap.get_xdata()) == [4, 4]
    np.testing.assert_allclose(gap.get_ydata(), [1, 0.1])
    assert axes.get_xlabel() == "FI"
    drawn(figure)


def test_many_samples_make_few_steps(tmp_path):
    write_part(tmp_path / "a", 0, 20_000)
    write_part(tmp_path / "b", 0, 10)
    first, _, _ = plot.compare(compare(tmp_path / "a", tmp_path / "b")).axes[0].lines
    assert len(first.get_xdata()) <= STEPS + 2
    assert first.get_ydata()[-1] == 1


def test_equal_distributions_have_no_gap(tmp_path):
    a = write_folder(tmp_path / "a", [0, 10])
    result = compare(a, a)._replace(pairs=None)
    assert legend(plot.compare(result)) == ["first (10)", "second (10)"]


def test_formulas_in_names_are_text(tmp_path):
    a = write_folder(tmp_path / "a", [0, 10], ends=[":$x_{", ":b"])
    figure = plot.compare(compare(a, a), names=["$\\frac{", "b$"], title="$")
    assert figure.axes[0].get_ylabel() == "fi:\\$x_{, b\\$"
    drawn(figure)


def test_wrong_arguments(tmp_path):
    a = write_folder(tmp_path / "a", [0, 10])
    with pytest.raises(fastfi.InputError, match="result: expected a Comparison, got str"):
        plot.compare("a")
    for names in ("ab", ["a"], ["a", "b", "c"]):
        with pytest.raises(fastfi.OptionError, match="names: expected two names, got "):
            plot.compare(compare(a, a), names=names)
