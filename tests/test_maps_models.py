"""Maps and their relatives on models that are rude to their input, and on rows of graded length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastfi

pytestmark = pytest.mark.usefixtures("one_thread")


class Shifted(nn.Module):
    """A linear classifier of 2 x - 1, computed in place on the input or beside it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(2 * 4 * 5, 6, dtype=torch.float64)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2).sub_(1) if self.in_place else x * 2 - 1
        return self.head(x.flatten(1))


REGIONS = torch.arange(20).reshape(4, 5) // 3
CHUNKED = {"memory_budget": 1}
CALLS = {
    "influence": lambda m, x: fastfi.influence(m, x, **CHUNKED),
    "influence, lumped": lambda m, x: fastfi.influence(m, x, lump=0.05, **CHUNKED),
    "influence, closed form": lambda m, x: fastfi.influence(m, x, assume_full_rank=True),
    "maps": lambda m, x: fastfi.influence_map(m, x, scales=(1, 3), **CHUNKED),
    "maps, lumped": lambda m, x: fastfi.influence_map(m, x, scales=(1,), lump=0.05, **CHUNKED),
    "regions": lambda m, x: fastfi.region_influence(m, x, None, REGIONS, **CHUNKED),
    "regions, lumped": lambda m, x: fastfi.region_influence(m, x, None, REGIONS, lump=0.05),
    "direction": lambda m, x: fastfi.direction(m, x, region=REGIONS == 2, **CHUNKED),
    "attack": lambda m, x: fastfi.attack.one_pixel(m, x, None, x[:, 0], pixels=2).x,
}


@pytest.mark.parametrize("name", CALLS)
def test_models_that_work_in_place_on_their_input(name):
    x = torch.rand(9, 2, 4, 5, dtype=torch.float64)
    before = x.clone()
    got = CALLS[name](Shifted(in_place=True), x)
    assert torch.equal(x, before)
    torch.testing.assert_close(got, CALLS[name](Shifted(in_place=False), x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dead", [False, True])
def test_exact_maps_of_graded_rows(dead):
    """Short rows keep their digits in clipped windows, and beside a pixel that does nothing."""
    classes, pixels = 17, 12
    lengths = torch.logspace(0, -4, classes - 1, dtype=torch.float64)[:, None]
    for seed in range(30, 50):
        model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(classes - 1, pixels, dtype=torch.float64, generator=generator) * lengths
        rows[:, 5] *= not dead
        with torch.no_grad():
            model[1].weight[0] = 0
            model[1].weight[1:] = rows
            bias = torch.randn(classes, dtype=torch.float64, generator=generator)
            model[1].bias.copy_(bias.sort(descending=True).values)
        x = torch.zeros(1, 1, pixels, dtype=torch.float64)
        y = torch.randint(0, classes, (1,), generator=generator)
        options = {"inverse": "exact", "full_output": True}
        maps = fastfi.influence_map(model, x, y, scales=(7,), **options)
        position = torch.arange(pixels)
        for i in range(pixels):
            window = torch.where((position - i).abs() <= 3, 0, -1)
            want = fastfi.region_influence(model, x, y, window, **options)
            assert maps.rank[0, 0, 0, i] == want.rank[0, 0]
            torch.testing.assert_close(maps.fi[0, 0, 0, i], want.fi[0, 0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [True, 2**70 + 1, 2**31 + 1])
def test_scales_that_are_no_sizes(scale):
    with pytest.raises(fastfi.OptionError, match="scales: expected distinct odd numbers"):
        fastfi.influence_map(Shifted(False), torch.rand(1, 2, 4, 5).double(), scales=(scale,))


def test_scales_as_a_tensor():
    x = torch.rand(1, 2, 4, 5, dtype=torch.float64)
    maps = fastfi.influence_map(Shifted(False), x, scales=torch.tensor([1, 3]))
    assert maps.shape == (1, 2, 2, 4, 5)


def test_regions_that_are_no_maps():
    x, model = torch.rand(2, 2, 4, 5, dtype=torch.float64), Shifted(False)
    for regions, message in [
        (None, "fourth argument"),
        (torch.full((4, 5), 10**9), "below the number of pixels, 20"),
        (REGIONS.numpy()[::-1], "negative"),
        (REGIONS.to_sparse(), "dense tensor"),
        (REGIONS.to("meta"), "on meta"),
    ]:
        with pytest.raises(fastfi.InputError, match=message):
            fastfi.region_influence(model, x, None, regions)
