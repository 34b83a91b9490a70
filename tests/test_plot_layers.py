"""fastfi.plot.layer_profile: figures, checked through their artists."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import fastfi
from fastfi import plot
from fastfi.plot.layers import COLOURS, kind_styles

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["stem.conv", "stem.norm", "stage1.0.conv", "stage1.0.norm", "stage1.1.conv", "head"]
KINDS = ["conv", "norm", "conv", "norm", "conv", "linear"]


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: drawing must neither fail nor warn."""
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


def some(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.1


def lines(figure: Figure) -> list[tuple[str, list[float], list[float]]]:
    """Colour, positions and values of every line."""
    return [
        (line.get_color(), list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[0].lines
    ]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


@pytest.mark.parametrize("as_given", [torch.Tensor.numpy, torch.Tensor.double])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (9, 6)])
def test_a_line_for_each_sample(shape, as_given):
    fi = some(*shape)
    figure = plot.layer_profile(NAMES, as_given(fi))
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_yscale() == "log"
    every = lines(figure)
    assert len(every) == (1 if len(shape) == 1 else shape[0])
    for b, (colour, x, y) in enumerate(every):
        assert colour == COLOURS[b % 7]
        assert x == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(y, fi.reshape(-1, 6)[b], rtol=1e-6)
    assert legend(figure) == []
    assert drawn(figure).startswith(b"\x89PNG")


def test_layers_of_one_type_are_joined():
    fi = some(2, 6).double()
    figure = plot.layer_profile(NAMES, fi, kinds=KINDS, labels=["a", "b"], title="profiles")
    for b in range(2):
        for i, at in enumerate(([0, 2, 4], [1, 3], [5])):
            colour, x, y = lines(figure)[3 * b + i]
            assert colour == COLOURS[b]
            assert x == [n + 1 for n in at]
            np.testing.assert_array_equal(y, fi[b, at])
    assert legend(figure) == ["a", "b", "conv", "norm", "linear"]
    assert figure.get_suptitle() == "profiles"
    drawn(figure)


def test_types_look_different():
    kinds = ["embedding", "conv", "attention", "conv", "norm", "linear", "embedding", "mixer"]
    styles = kind_styles(kinds)
    assert list(styles) == ["embedding", "conv", "attention", "norm", "linear", "mixer"]
    assert len({str(style) for style in styles.values()}) == 6
    drawn(plot.layer_profile([f"layer{i}" for i in range(8)], some(8), kinds=kinds))


def test_others_are_a_median_and_a_band():
    others = some(200, 6).double()
    figure = plot.layer_profile(NAMES, some(6), others=others)
    low, middle, high = np.quantile(others.numpy(), (0.05, 0.5, 0.95), axis=0)
    colour, x, y = lines(figure)[0]
    assert (colour, x) == ("0.25", [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(y, middle, rtol=1e-12)
    (band,) = figure.axes[0].collections
    extent = band.get_paths()[0].get_extents()
    np.testing.assert_allclose([extent.y0, extent.y1], [low.min(), high.max()], rtol=1e-12)
    assert legend(figure) == ["others: median, 5-95 %"]
    drawn(figure)


def test_the_axis_names_few_layers_and_numbers_many():
    def ticks(names: Sequence[str]) -> list[str]:
        figure = plot.layer_profile(names, some(len(names)))
        drawn(figure)
        return [label.get_text() for label in figure.axes[0].get_xticklabels()]

    assert ticks(NAMES) == NAMES
    for names in ([f"layer{i}" for i in range(90)], ["a" * 60, "b"]):
        assert not {*ticks(names)} & {*names}


def test_stages_are_shaded_and_named():
    figure = plot.layer_profile(NAMES, some(6))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["stem", "stage1", "head"]
    (shade,) = axes.patches
    np.testing.assert_allclose([shade.get_x(), shade.get_x() + shade.get_width()], [2.5, 5.5])


EDGES = {
    "zero": [0.0] * 3,
    "NaN": [np.nan] * 3,
    "infinite": [np.inf, 1.0, np.inf],
    "constant": [1.0] * 3,
    "far apart": [5e-324, 1.0, 1e308],
    "negative": [-1.0, 1.0, 2.0],
}


@pytest.mark.parametrize("name", EDGES)
def test_profiles_of_any_values_can_be_drawn(name):
    fi = np.array(EDGES[name])
    others = np.array([[np.inf, 0.0, 1.0], [1.0, np.inf, 2.0], [np.nan, np.inf, 3.0], fi])
    figure = plot.layer_profile(["a", "b", "c"], fi, others=others)
    shown = np.array(lines(figure)[1][2])
    assert np.array_equal(np.isnan(shown), ~(np.isfinite(fi) & (fi > 0)))
    drawn(figure)


def test_a_result_of_influence_can_be_drawn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    r = fastfi.influence(model, some(3, 12), wrt="layers", inverse="damped", full_output=True)
    figure = plot.layer_profile(r.names, r.fi[:1], others=r.fi, labels=["first"])
    np.testing.assert_allclose(lines(figure)[1][2], r.fi[0], rtol=1e-12)
    drawn(figure)


WRONG = [
    (["a", "b"], (3,), {}, fastfi.InputError, "fi: expected shape [2] or [B, 2] for 2", "got [3]"),
    (["a", "b"], (4, 3), {}, fastfi.InputError, "fi: expected shape [2] or [B, 2]", "got [4, 3]"),
    (["a", "b"], (0, 2), {}, fastfi.InputError, "fi: expected shape [2] or", "got [0, 2]"),
    (["a", "b"], (1, 1, 2), {}, fastfi.InputError, "fi: expected shape", "got [1, 1, 2]"),
    ("ab", (2,), {}, fastfi.OptionError, "names: expected the names of the layers", "got 'ab'"),
    ([], (0,), {}, fastfi.OptionError, "names: expected the names of the layers", "got []"),
    ([1, 2], (2,), {}, fastfi.OptionError, "names: expected the names", "got [1, 2]"),
    (["a", "b"], (2,), {"kinds": ["c"]}, fastfi.OptionError, "each of 2 layers", "got ['c']"),
    (["a", "b"], (2,), {"kinds": "cn"}, fastfi.OptionError, "kinds: expected", "got 'cn'"),
    (["a", "b"], (2,), {"labels": ["c", "d"]}, fastfi.OptionError, "each of 1 samples", "['c',"),
    (["a", "b"], (2,), {"others": some(2)}, fastfi.InputError, "shape [N, 2] for 2", "got [2]"),
    (["a", "b"], (2,), {"others": some(4, 3)}, fastfi.InputError, "others: expected", "[4, 3]"),
    (["a", "b"], (2,), {"others": some(0, 2)}, fastfi.InputError, "others: expected", "[0, 2]"),
    (["a", "b"], (2,), {"others": [1, 2]}, fastfi.InputError, "others: expected a tensor", "list"),
]


@pytest.mark.parametrize(("names", "shape", "options", "kind", "expected", "came"), WRONG)
def test_errors(names, shape, options, kind, expected, came):
    with pytest.raises(kind, match=".*".join(map(re.escape, (expected, came)))):
        plot.layer_profile(names, some(*shape), **options)
