"""fastfi.plot: figures, checked through their artists."""

from __future__ import annotations

import builtins
import io
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastfi
from fastfi import plot
from fastfi._extras import MissingExtraError
from fastfi.attack import OnePixel, one_pixel
from fastfi.plot.maps import OPACITY

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: drawing must neither fail nor warn."""
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def shown(figure: Figure, panel: int, layer: int = 0) -> np.ndarray:
    """The values of an image of one panel; panels count row by row."""
    return np.asarray(figure.axes[panel].images[layer].get_array())


SHAPES = [
    ((6, 7), (3, 6, 7), 1),
    ((1, 6, 7), (3, 6, 7), 1),
    ((3, 6, 7), (3, 3, 6, 7), 1),
    ((6, 7), (3, 1, 6, 7), 1),
    ((2, 3, 6, 7), (2, 3, 6, 7), 2),
    ((2, 3, 6, 7), (2, 3, 3, 6, 7), 2),
    ((2, 5, 6, 7), (2, 3, 5, 6, 7), 2),
]


@pytest.mark.parametrize(("x", "maps", "rows"), SHAPES)
def test_a_row_for_each_sample_and_a_panel_for_each_scale(x, maps, rows):
    pixels, fi = some(*x), some(*maps, seed=1)
    figure = plot.influence_map(pixels, fi, scales=(1, 3, 5))
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 5 * rows
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["image", "1 x 1", "3 x 3", "5 x 5", "5 x 5 on image"] + [""] * 5 * (rows - 1)
    by_row = fi.reshape(rows, 3, -1, 6, 7).mean(2).double().numpy()
    images = pixels.reshape(rows, -1, 6, 7)
    for b in range(rows):
        expected = images[b].permute(1, 2, 0) if images.shape[1] == 3 else images[b].mean(0)
        np.testing.assert_allclose(shown(figure, 5 * b), expected, rtol=1e-6)
        for s in range(3):
            np.testing.assert_allclose(shown(figure, 5 * b + 1 + s), by_row[b, s], rtol=1e-6)
        np.testing.assert_allclose(shown(figure, 5 * b + 4), images[b].mean(0), rtol=1e-6)
        np.testing.assert_allclose(shown(figure, 5 * b + 4, layer=1), by_row[b, 2], rtol=1e-6)
    assert drawn(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("shared", ["sample", "all"])
def test_the_colour_scale_is_shared(shared):
    fi = some(2, 3, 4, 4) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    figure = plot.influence_map(some(2, 1, 4, 4), fi, shared=shared)
    largest = fi.double().amax((1, 2, 3)).tolist() if shared == "sample" else [float(fi.max())] * 2
    for b in range(2):
        maps = [figure.axes[5 * b + s].images[-1] for s in (1, 2, 3, 4)]
        assert [image.get_clim() for image in maps] == [(0.0, largest[b])] * 4
    # "all" has a colour bar beside the grid; "sample" one inside each row's last panel
    assert len(figure.axes) == 10 + (shared == "all")
    bars = [len(figure.axes[panel].child_axes) for panel in (4, 9)]
    assert bars == ([1, 1] if shared == "sample" else [0, 0])
    drawn(figure)


def test_the_overlay_is_opaque_where_the_map_is_large():
    fi = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]])
    figure = plot.influence_map(some(2, 2), fi, overlay=0)
    alpha = figure.axes[-1].images[1].get_alpha()
    np.testing.assert_allclose(alpha, OPACITY * np.array([[0.0, 0.25], [0.5, 1.0]]))
    assert figure.axes[-1].get_title() == "map 0 on image"
    without = plot.influence_map(some(2, 2), fi, overlay=None)
    assert [len(axes.images) for axes in without.axes] == [1, 1, 1]
    drawn(without)


def test_channels_of_maps():
    fi = torch.zeros(1, 2, 2, 2)
    fi[0, 0], fi[0, 1] = 1.0, 3.0
    x = some(2, 2, 2)
    assert (shown(plot.influence_map(x, fi), 1) == 2.0).all()
    assert (shown(plot.influence_map(x, fi, channels="max"), 1) == 3.0).all()


def test_an_influence_map_knows_its_scales():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    x = some(2, 3, 4, 4)
    maps = fastfi.influence_map(model, x, scales=(1, 3), full_output=True)
    figure = plot.influence_map(x, maps, titles=["first", "second\nline"], title="maps")
    assert [axes.get_title() for axes in figure.axes[1:3]] == ["1 x 1", "3 x 3"]
    assert [figure.axes[panel].get_xlabel() for panel in (0, 4)] == ["first", "second\nline"]
    assert figure.get_suptitle() == "maps"
    np.testing.assert_allclose(shown(figure, 6), maps.fi[1, 1].mean(0), rtol=1e-6)
    drawn(figure)


def test_images_outside_of_0_to_1_are_rescaled_and_say_so():
    grey, colour = 4 * some(1, 4, 4) - 2, 4 * some(3, 4, 4) - 2
    fi = some(1, 4, 4)
    for x in (grey, colour):
        assert plot.influence_map(x.clamp(0, 1), fi).axes[0].get_xlabel() == ""
        figure = plot.influence_map(x, fi, titles=["a"])
        assert figure.axes[0].get_xlabel() == "a\nrescaled"
        drawn(figure)
    assert plot.influence_map(grey, fi).axes[0].images[0].get_clim() == (
        float(grey.min()),
        float(grey.max()),
    )
    pixels = shown(plot.influence_map(colour, fi), 0)
    assert pixels.min() == 0.0 and pixels.max() == 1.0
    drawn(plot.influence_map(torch.full((3, 4, 4), 7.0), fi))


def test_logarithmic_colours():
    fi = torch.tensor([[[0.0, 1e-9], [1e-2, 10.0]]])
    figure = plot.influence_map(some(2, 2), fi, log=True)
    image = figure.axes[1].images[0]
    assert isinstance(image.norm, LogNorm)
    # four decades; what lies below takes the lowest colour
    np.testing.assert_allclose(image.get_clim(), (1e-3, 10.0), rtol=1e-12)
    np.testing.assert_allclose(image.get_array(), [[1e-3, 1e-3], [1e-2, 10.0]], rtol=1e-7)
    close = plot.influence_map(some(2, 2), torch.tensor([[[0.5, 1.0], [2.0, 100.0]]]), log=True)
    np.testing.assert_allclose(close.axes[1].images[0].get_clim(), (0.5, 100.0), rtol=1e-12)
    drawn(figure)


EDGES = {
    "zero": (torch.zeros(1, 4, 4), (0.0, 1.0)),
    "constant": (torch.full((1, 4, 4), 3.0), (0.0, 3.0)),
    "infinite": (torch.full((1, 4, 4), torch.inf), (0.0, 1.0)),
    "some infinite": (torch.tensor([0.0, torch.inf, 2.0, 1.0]).repeat(4).view(1, 4, 4), (0.0, 2.0)),
    "some NaN": (torch.tensor([0.0, torch.nan, 2.0, 1.0]).repeat(4).view(1, 4, 4), (0.0, 2.0)),
    "tiny": (torch.full((1, 4, 4), 1e-300, dtype=torch.float64), (0.0, 1.0)),
    "small": (torch.full((1, 4, 4), 1e-270, dtype=torch.float64), (0.0, 1e-270)),
    "huge": (torch.full((1, 4, 4), 1e300, dtype=torch.float64), (0.0, 1e300)),
    "negative": (torch.tensor([-1.0, 2.0]).repeat(8).view(1, 4, 4), (-1.0, 2.0)),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("log", [False, True])
def test_maps_of_any_values_can_be_drawn(name, log):
    maps, limits = EDGES[name]
    figure = plot.influence_map(some(4, 4), maps, log=log)
    image = figure.axes[1].images[0]
    assert np.isfinite(image.get_clim()).all()
    if not log:
        assert image.get_clim() == limits
    if name == "some infinite":
        assert np.asarray(image.get_array())[0, 1] == 2.0
    drawn(figure)


def test_matplotlib_is_imported_when_needed_and_pyplot_never():
    code = """
import sys, torch, fastfi
from fastfi import plot
assert plot is fastfi.plot and callable(fastfi.attack.one_pixel)
assert "matplotlib" not in sys.modules
plot.influence_map(torch.rand(4, 4), torch.rand(2, 4, 4)).savefig(sys.argv[1])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, f"{folder}/maps.png"], check=True)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    class Refuse:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}")
            return None

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(sys, "meta_path", [Refuse, *sys.meta_path])
    pattern = re.escape("needs matplotlib") + ".*" + re.escape('pip install "fastfi[plot]"')
    with pytest.raises(MissingExtraError, match=pattern):
        plot.influence_map(some(4, 4), some(2, 4, 4))


@pytest.fixture(scope="module")
def attacked() -> tuple[Tensor, Tensor, OnePixel]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 3)).eval()
    with torch.no_grad():
        model[1].weight.mul_(6)
    x, scores = some(3, 1, 5, 6), some(3, 5, 6, seed=2)
    return x, scores, one_pixel(model, x, None, map=scores, pixels=2)


def test_attack_shows_both_images_and_marks_the_pixels(attacked):
    x, _, result = attacked
    figure = plot.attack(x, result, titles=["a", "b", "c"], title="attack")
    above, below = figure.axes[:3], figure.axes[3:]
    assert len(below) == 3
    for b in range(3):
        np.testing.assert_allclose(shown(figure, b), x[b, 0], rtol=1e-6)
        np.testing.assert_allclose(shown(figure, 3 + b), result.x[b, 0], rtol=1e-6)
        assert len(above[b].patches) == 0
        centres = [
            [int(p.get_y() + p.get_height() / 2), int(p.get_x() + p.get_width() / 2)]
            for p in below[b].patches
        ]
        assert centres == result.positions[b].tolist()
        label, p = int(result.label[b]), float(result.log_prob_before[b].exp())
        assert above[b].get_title() == f"{'abc'[b]}\npredicted {label}\nP({label}) = {p:.2g}"
        after, p = int(result.label_after[b]), float(result.log_prob_after[b].exp())
        assert below[b].get_title() == f"predicted {after}\nP({label}) = {p:.2g}"
    drawn(figure)


def test_attack_with_maps_and_names(attacked):
    x, scores, result = attacked
    names = ["ant", "bee", "cat"]
    figure = plot.attack(x, result, maps=scores, classes=names)
    assert len(figure.axes) == 9
    np.testing.assert_allclose(shown(figure, 4), scores[1], rtol=1e-6)
    assert figure.axes[0].get_title().startswith(f"predicted {names[result.label_before[0]]}\nP(")
    by_channel = plot.attack(x, result, maps=scores[:, None])
    np.testing.assert_allclose(shown(by_channel, 4), scores[1], rtol=1e-6)
    drawn(figure)


def test_attack_draws_both_images_on_one_grey_scale(attacked):
    x, _, result = attacked
    wide = result._replace(x=result.x * 3)
    figure = plot.attack(x, wide)
    for b in range(3):
        low, high = min(x[b].min(), wide.x[b].min()), max(x[b].max(), wide.x[b].max())
        expected = (0.0, 1.0) if high <= 1 else (float(low), float(high))
        assert figure.axes[b].images[0].get_clim() == expected
        assert figure.axes[3 + b].images[0].get_clim() == expected
    assert float(wide.x.max()) > 1


WRONG = [
    ((5,), (2, 5), {}, fastfi.InputError, "x: expected an image [H, W]", "got shape [5]"),
    ((4, 4), (4, 4), {}, fastfi.InputError, "expected shape [S, 4, 4] or [S, C, 4, 4]", "[4, 4]"),
    ((4, 4), (2, 4, 5), {}, fastfi.InputError, "expected shape [S, 4, 4]", "got [2, 4, 5]"),
    ((2, 1, 4, 4), (3, 2, 4, 4), {}, fastfi.InputError, "[2, S, 4, 4]", "got [3, 2, 4, 4]"),
    ((4, 4), (0, 4, 4), {}, fastfi.InputError, "at least one scale", "[0, 4, 4]"),
    ((4, 4), (2, 4, 4), {"scales": (1,)}, fastfi.OptionError, "each of 2 scales", "got (1,)"),
    ((4, 4), (2, 4, 4), {"titles": "a"}, fastfi.OptionError, "each of 1 samples", "got 'a'"),
    ((4, 4), (2, 4, 4), {"overlay": 2}, fastfi.OptionError, "index into 2 maps", "got 2"),
    ((4, 4), (2, 4, 4), {"shared": "row"}, fastfi.OptionError, "'sample' or 'all'", "'row'"),
    ((4, 4), (2, 4, 4), {"channels": "sum"}, fastfi.OptionError, "'mean' or 'max'", "'sum'"),
]


@pytest.mark.parametrize(("x", "maps", "options", "kind", "expected", "came"), WRONG)
def test_errors(x, maps, options, kind, expected, came):
    with pytest.raises(kind, match=".*".join(map(re.escape, (expected, came)))):
        plot.influence_map(some(*x), some(*maps), **options)


def test_errors_of_types_and_of_attack(attacked):
    x, scores, result = attacked
    with pytest.raises(fastfi.InputError, match="maps: expected a tensor or an array, got list"):
        plot.influence_map(x, [1.0])
    with pytest.raises(fastfi.InputError, match="x: expected finite pixels"):
        plot.influence_map(torch.full((4, 4), torch.nan), some(2, 4, 4))
    with pytest.raises(fastfi.InputError, match="result: expected a OnePixel, got Tensor"):
        plot.attack(x, scores)
    with pytest.raises(fastfi.InputError, match=re.escape("[3, 1, 5, 6], got [2, 1, 5, 6]")):
        plot.attack(x[:2], result)
    with pytest.raises(fastfi.InputError, match=re.escape("a batch [B, C, H, W], got shape [1, 5")):
        plot.attack(x[0], result)
    with pytest.raises(fastfi.OptionError, match="classes: expected at least 3 names, got"):
        plot.attack(x, result._replace(label=torch.tensor([2, 0, 0])), classes=["a", "b"])
    with pytest.raises(fastfi.OptionError, match="titles: expected one for each of 3 samples"):
        plot.attack(x, result, titles=["a"])
    assert isinstance(plot.attack(x.numpy(), result), Figure)
