"""fastfi.attack.one_pixel: against brute force, and what it promises about its search."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

import fastfi
from fastfi.attack import one_pixel

pytestmark = pytest.mark.usefixtures("one_thread")


def conv_net(channels: int, size: int, classes: int, seed: int) -> nn.Module:
    """A float64 network whose predictions single pixels can change."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(8 * size * size, classes),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(4)
        net[3].weight.mul_(3)
        net[3].bias -= net(images(64, channels, size)).mean(0)  # every class is predicted
    return net


def images(batch: int, channels: int, size: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, size, size, generator=generator, dtype=torch.float64)


def margin(model: nn.Module, x: Tensor, label: int) -> Tensor:
    """max_{k != y} z_k - z_y of a batch whose class is the same for all, one class at a time."""
    with torch.no_grad():
        z = model(x)
    return torch.stack([z[:, k] for k in range(z.shape[1]) if k != label]).amax(0) - z[:, label]


def best_of(
    model: nn.Module, x: Tensor, where: list[int], grids: Tensor, label: int
) -> tuple[Tensor, float]:
    """The best values of the pixels ``where`` of one image x [C, H, W], by trying all of them.

    Args:
        where: positions in the flattened spatial dimensions.
        grids: [C, M], the values to try for each channel.

    Returns:
        The values [n, C] and their margin.
    """
    channels = len(x)
    every = list(itertools.product(*[grids[c].tolist() for _ in where for c in range(channels)]))
    values = torch.tensor(every, dtype=x.dtype).reshape(len(every), len(where), channels)
    tried = x.flatten(1).repeat(len(every), 1, 1)
    for j, place in enumerate(where):
        tried[:, :, place] = values[:, j]
    margins = margin(model, tried.reshape(-1, *x.shape), label)
    return values[margins.argmax()], float(margins.max())


@pytest.mark.parametrize("labels", ["predicted", "given"])
def test_one_grey_pixel_is_searched_exhaustively(labels: str) -> None:
    model = conv_net(1, 5, 4, seed=1)
    x = images(40, 1, 5)
    z = model(x).detach()
    y = torch.arange(40) % 4
    scores = torch.rand(40, 5, 5, generator=torch.Generator().manual_seed(2))
    result = one_pixel(model, x, None if labels == "predicted" else y, map=scores, steps=6)
    target = z.argmax(1) if labels == "predicted" else y
    assert torch.equal(result.label, target)
    assert torch.equal(result.label_before, z.argmax(1))
    assert result.success.dtype == torch.bool
    grid = torch.linspace(0, 1, 6, dtype=torch.float64)[None]
    for b in range(40):
        place = int(scores[b].argmax())
        assert result.positions[b].tolist() == [list(divmod(place, 5))]
        best, height = best_of(model, x[b], [place], grid, int(target[b]))
        before = float(margin(model, x[b : b + 1], int(target[b])))
        expected = best if height > before else x[b, :, place // 5, place % 5][None]
        assert torch.equal(result.values[b], expected)
        changed = x[b].clone()
        changed[:, place // 5, place % 5] = expected[0]
        assert torch.equal(result.x[b], changed)
    with torch.no_grad():
        after = model(result.x)
    assert torch.equal(result.label_after, after.argmax(1))
    assert torch.equal(result.success, (z.argmax(1) == target) & (after.argmax(1) != target))
    assert result.success.any() and not result.success.all()
    each = torch.arange(40)
    # log-softmax in float64: a few roundings
    torch.testing.assert_close(
        result.log_prob_before, z.log_softmax(1)[each, target], rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        result.log_prob_after, after.log_softmax(1)[each, target], rtol=1e-12, atol=1e-14
    )
    # before, the grid, after
    assert result.evaluations.tolist() == [1 + 6 + 1] * 40


def test_samples_that_were_misclassified_count_as_no_success() -> None:
    model = conv_net(1, 5, 4, seed=1)
    x = images(12, 1, 5)
    wrong = (model(x).argmax(1) + 1) % 4
    result = one_pixel(model, x, wrong, map=torch.ones(12, 5, 5))
    assert not result.success.any()
    assert (result.label_before != result.label).all()
    assert (result.log_prob_after <= result.log_prob_before).any()


@pytest.mark.parametrize(("channels", "pixels"), [(3, 1), (1, 2), (2, 2), (1, 7)])
def test_corners_are_exhausted_while_they_are_few(channels: int, pixels: int) -> None:
    """Without sweeps, the best of 2^(pixels channels) corners; RGB and several pixels."""
    model = conv_net(channels, 4, 5, seed=3)
    x = images(10, channels, 4)
    scores = torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(4))
    result = one_pixel(model, x, None, map=scores, pixels=pixels, sweeps=0)
    corners = torch.tensor([[0.0, 1.0]]).double().expand(channels, 2)
    improved = 0
    for b in range(10):
        where = scores[b].flatten().argsort(descending=True)[:pixels].tolist()
        assert result.positions[b].tolist() == [list(divmod(place, 4)) for place in where]
        label = int(result.label[b])
        best, height = best_of(model, x[b], where, corners, label)
        if height > float(margin(model, x[b : b + 1], label)):
            improved += 1
            assert torch.equal(result.values[b], best)
        else:
            assert torch.equal(result.x[b], x[b])
    assert improved >= 5
    assert result.evaluations.tolist() == [2 + 2 ** (channels * pixels)] * 10


def bowl(peak: Tensor) -> nn.Module:
    """Two classes, z_1 - z_0 = -|x - peak|^2: the best values lie inside, and each coordinate's
    best does not depend on the others."""

    class Bowl(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            down = -((x - peak) ** 2).flatten(1).sum(1)
            return torch.stack([torch.full_like(down, -1.0), down], 1)

    return Bowl()


@pytest.mark.parametrize(("channels", "pixels"), [(3, 1), (1, 3), (3, 3)])
def test_coordinate_ascent_finds_the_grid_optimum_of_a_separable_model(
    channels: int, pixels: int
) -> None:
    """9 values exceed the corners' limit: two corners only."""
    peak = 0.25 * torch.randint(1, 4, (1, channels, 4, 4), dtype=torch.float64)
    x = torch.ones(6, channels, 4, 4, dtype=torch.float64)
    label = torch.zeros(6, dtype=torch.int64)
    scores = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(6))
    result = one_pixel(bowl(peak), x, label, map=scores, pixels=pixels, steps=5)
    rows, columns = result.positions.unbind(2)
    expected = peak[0][:, rows, columns].permute(1, 2, 0)
    torch.testing.assert_close(result.values, expected, rtol=0.0, atol=1e-15)
    size = channels * pixels
    corners = 2**size if size <= 8 else 2
    assert set(result.evaluations.tolist()) <= {2 + corners + 5 * size * s for s in (1, 2)}
    half_way = one_pixel(bowl(peak), x, label, map=scores, pixels=pixels, steps=5, sweeps=0)
    assert not torch.equal(half_way.values, result.values)


def test_the_end_is_a_maximum_of_every_single_value() -> None:
    """RGB, three pixels: no value on the grid improves the margin further, once rounds suffice."""
    model = conv_net(3, 4, 5, seed=7)
    x = images(6, 3, 4)
    scores = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(8))
    result = one_pixel(model, x, None, map=scores, pixels=3, steps=5, sweeps=20)
    for b in range(6):
        label = int(result.label[b])
        reached = float(margin(model, result.x[b : b + 1], label))
        assert reached >= float(margin(model, x[b : b + 1], label))
        for (row, column), c, value in itertools.product(
            result.positions[b].tolist(), range(3), torch.linspace(0, 1, 5).tolist()
        ):
            other = result.x[b : b + 1].clone()
            other[0, c, row, column] = value
            # rounding of logits of size 10
            assert float(margin(model, other, label)) <= reached + 1e-13
    one_round = one_pixel(model, x, None, map=scores, pixels=3, steps=5, sweeps=1)
    assert (one_round.evaluations <= result.evaluations).all()
    assert (one_round.evaluations < result.evaluations).any()


def test_a_sample_that_no_value_improves_stays_and_drops_out() -> None:
    """The first sample's margin does not depend on it; equal margins replace nothing."""
    inner = conv_net(1, 4, 3, seed=18)

    def model(x: Tensor) -> Tensor:
        z = inner(x)
        return torch.where(x[:, :1, 3, 3] == 0.5, torch.zeros_like(z), z)

    x = images(3, 1, 4)
    x[0, 0, 3, 3] = 0.5
    maps = torch.zeros(3, 4, 4)
    maps[:, 0, :2] = 1.0
    result = one_pixel(model, x, None, map=maps, pixels=2, steps=4, sweeps=30)
    assert torch.equal(result.x[0], x[0])
    assert not torch.equal(result.x[1], x[1])
    assert int(result.evaluations[0]) == 1 + 2**2 + 2 * 4 + 1
    assert int(result.evaluations.max()) > int(result.evaluations[0])


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    seen = []
    inner = conv_net(2, 4, 4, seed=9)

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return inner(x)

    x = images(9, 2, 4)
    scores = torch.rand(9, 4, 4, generator=torch.Generator().manual_seed(10))
    small = one_pixel(model, x, None, map=scores, pixels=2, steps=4, batch_size=batch_size)
    assert max(seen) <= batch_size
    if batch_size == 1000:
        assert max(seen) == 9 * 2**4  # all corners of all samples in one pass
    assert sum(seen) == int(small.evaluations.sum())
    whole = one_pixel(inner, x, None, map=scores, pixels=2, steps=4)
    for name, got, expected in zip(small._fields, small, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13, msg=name)


def test_bounds_by_channel_for_normalised_inputs() -> None:
    """The same network behind a normalisation finds the same pixels and predictions."""
    mean, deviation = (
        torch.tensor([0.4, 0.5, 0.6]).double(),
        torch.tensor([0.2, 0.25, 0.3]).double(),
    )
    model = conv_net(3, 4, 4, seed=11)
    x = images(8, 3, 4)

    def normalised(v: Tensor) -> Tensor:
        return model(v * deviation.view(3, 1, 1) + mean.view(3, 1, 1))

    def encode(v: Tensor) -> Tensor:
        return (v - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)

    scores = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(12))
    plain = one_pixel(model, x, None, map=scores)
    bounds = (-mean / deviation, (1 - mean) / deviation)
    other = one_pixel(normalised, encode(x), None, map=scores, bounds=bounds)
    torch.testing.assert_close(other.values, (plain.values - mean) / deviation)
    assert torch.equal(other.label_after, plain.label_after)
    torch.testing.assert_close(other.log_prob_after, plain.log_prob_after)


def test_maps_with_channels_are_summed_and_ties_are_taken_in_order() -> None:
    model = conv_net(2, 3, 3, seed=13)
    x = images(1, 2, 3)
    maps = torch.zeros(1, 2, 3, 3)
    maps[0, 0, 2, 1], maps[0, 0, 0, 1], maps[0, 1, 0, 1] = 3.0, 2.0, 2.0
    result = one_pixel(model, x, None, map=maps, pixels=4, sweeps=0)
    assert result.positions.tolist() == [[[0, 1], [2, 1], [0, 0], [0, 2]]]
    wide = torch.rand(1, 2, 64, 64, dtype=torch.float64)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2 * 64 * 64, 3)).double()
    result = one_pixel(linear, wide, None, map=torch.ones(1, 64, 64), pixels=40, steps=2, sweeps=0)
    assert result.positions[0].tolist() == [[0, column] for column in range(40)]
    infinite = maps.clone()
    infinite[0, 1, 2, 2] = torch.inf
    assert one_pixel(model, x, None, map=infinite).positions.tolist() == [[[2, 2]]]


@pytest.mark.parametrize("spatial", [(11,), (3, 4), (2, 3, 4)])
def test_signals_images_and_volumes(spatial: tuple[int, ...]) -> None:
    size = torch.Size(spatial).numel()
    torch.manual_seed(14)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * size, 3)).double()
    x = torch.rand(5, 2, *spatial, dtype=torch.float64)
    scores = torch.rand(5, *spatial)
    result = one_pixel(model, x, None, map=scores, pixels=2)
    assert result.positions.shape == (5, 2, len(spatial))
    assert result.values.shape == (5, 2, 2)
    largest = [scores[(b, *at)] for b, at in enumerate(result.positions[:, 0].tolist())]
    assert torch.equal(torch.stack(largest), scores.flatten(1).amax(1))
    # a linear model's best values are corners: by the sign of its weights
    moved = (result.x != x).flatten(2).any(1).sum(1)
    assert (moved <= 2).all() and moved.any()


def test_a_single_logit_and_probabilities() -> None:
    torch.manual_seed(15)
    layer = nn.Linear(9, 1).double()
    x = torch.rand(6, 1, 3, 3, dtype=torch.float64)
    maps = torch.rand(6, 3, 3)

    def logit(v: Tensor) -> Tensor:
        return 4 * layer(v.flatten(1))

    def probs(v: Tensor) -> Tensor:
        p = logit(v).sigmoid()
        return torch.cat([1 - p, p], 1)

    one, two = (
        one_pixel(logit, x, None, map=maps),
        one_pixel(probs, x, None, map=maps, outputs="probs"),
    )
    assert torch.equal(one.label, (logit(x) > 0).long().squeeze(1))
    assert torch.equal(one.values, two.values)
    torch.testing.assert_close(one.log_prob_after, two.log_prob_after, rtol=1e-9, atol=1e-12)


def test_arguments_are_left_alone_and_nothing_records_gradients() -> None:
    model = conv_net(1, 5, 4, seed=16)
    x = images(4, 1, 5).requires_grad_()
    before = x.detach().clone()
    result = one_pixel(model, x, None, map=torch.ones(4, 5, 5))
    assert torch.equal(x.detach(), before)
    assert not result.x.requires_grad and not result.log_prob_after.requires_grad
    with torch.inference_mode():
        again = one_pixel(model, before.clone(), None, map=torch.ones(4, 5, 5))
    assert torch.equal(again.x, result.x)


X = torch.full((4, 2, 5, 6), 0.5)
MAPS = torch.rand(4, 5, 6)
WRONG = [
    ({"map": MAPS[:3]}, fastfi.InputError, "map: expected", "got shape [3, 5, 6]"),
    ({"map": MAPS.mT}, fastfi.InputError, "[4, 5, 6], or [4, 2, 5, 6]", "got shape [4, 6, 5]"),
    ({"map": torch.rand(4, 3, 2, 5, 6)}, fastfi.InputError, "[4, 3, 2, 5, 6]", "maps[:, s]"),
    ({"map": torch.rand(4, 3, 5, 6)}, fastfi.InputError, "[4, 3, 5, 6]", "maps[:, s]"),
    ({"map": [1.0]}, fastfi.InputError, "map: expected one score for each pixel", "got list"),
    ({"map": MAPS + 0j}, fastfi.InputError, "expected real scores", "complex"),
    ({"pixels": 0}, fastfi.OptionError, "pixels: expected a whole number from 1 to 30", "got 0"),
    ({"pixels": 31}, fastfi.OptionError, "pixels: expected a whole number from 1 to 30", "got 31"),
    ({"pixels": 1.0}, fastfi.OptionError, "pixels: expected a whole number", "got 1.0"),
    ({"steps": 1}, fastfi.OptionError, "steps: expected a whole number of at least 2", "got 1"),
    ({"sweeps": -1}, fastfi.OptionError, "sweeps: expected a whole number", "got -1"),
    ({"batch_size": 0}, fastfi.OptionError, "batch_size: expected a whole number", "got 0"),
    ({"bounds": (1.0, 0.0)}, fastfi.OptionError, "bounds: expected a pair", "got (1.0, 0.0)"),
    ({"bounds": (0.0, torch.inf)}, fastfi.OptionError, "bounds: expected", "inf"),
    ({"bounds": 1.0}, fastfi.OptionError, "bounds: expected a pair", "got 1.0"),
    ({"bounds": (torch.zeros(3), 1.0)}, fastfi.OptionError, "2 channels", "tensor"),
    ({"bounds": (0.6, 1.0)}, fastfi.InputError, "x: expected values within bounds", "0.5"),
    ({"outputs": "scores"}, fastfi.OptionError, "outputs: expected one of", "'scores'"),
    ({"y": torch.zeros(3, dtype=torch.int64)}, fastfi.LabelError, "[4]", "[3]"),
    ({"y": torch.tensor([0, 1, 2, 3])}, fastfi.LabelError, "from 0 to 2", "samples 3"),
]


@pytest.mark.parametrize(("options", "kind", "expected", "came"), WRONG)
def test_errors(options, kind, expected, came):
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    pattern = ".*".join(map(re.escape, (expected, came)))
    with pytest.raises(kind, match=pattern):
        one_pixel(model, X, **{"y": None, "map": MAPS, **options})


def test_errors_of_an_influence_map_and_of_nan():
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).eval()
    maps = fastfi.influence_map(model, X, scales=(1, 3), full_output=True)
    with pytest.raises(fastfi.InputError, match=re.escape("pick one scale: maps.fi[:, s]")):
        one_pixel(model, X, None, map=maps)
    one_pixel(model, X, None, map=maps.fi[:, 1])
    scores = MAPS.clone()
    scores[2, 0, 0] = torch.nan
    with pytest.raises(fastfi.NonFiniteError, match="NaN in samples 2") as caught:
        one_pixel(model, X, None, map=scores)
    assert caught.value.indices == (2,)
    with pytest.raises(fastfi.InputError, match=re.escape("got shape [4, 60]")):
        one_pixel(model, X.flatten(1), None, map=MAPS)


def test_logits_that_are_not_finite_name_the_sample_once():
    layer = nn.Linear(4, 3)

    def model(x: Tensor) -> Tensor:
        # finite for x, not for the values that the search tries on the third sample
        bad = (x[:, 0, 0, 1] == 0.25) & (x[:, 0, 0, 0] != 0.5)
        return layer(x.flatten(1)).masked_fill(bad[:, None], torch.nan)

    x = torch.full((5, 1, 2, 2), 0.5)
    x[2:4, 0, 0, 1] = 0.25
    maps = torch.zeros(5, 2, 2)
    maps[:, 0, 0] = 1.0
    with pytest.raises(fastfi.NonFiniteError, match=r"in samples 2, 3$") as caught:
        one_pixel(model, x, None, map=maps)
    assert caught.value.indices == (2, 3)


def test_running_out_of_memory_halves_the_batches():
    inner = conv_net(1, 4, 3, seed=17)

    def model(x: Tensor) -> Tensor:
        if len(x) > 5:
            raise MemoryError
        return inner(x)

    x = images(7, 1, 4)
    result = one_pixel(model, x, None, map=torch.ones(7, 4, 4), pixels=2)
    expected = one_pixel(inner, x, None, map=torch.ones(7, 4, 4), pixels=2)
    torch.testing.assert_close(result.x, expected.x)
