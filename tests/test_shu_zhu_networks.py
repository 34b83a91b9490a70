"""ResNet-50 and DenseNet-121 of the reproduction against torchvision's published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastfi
from examples.shu_zhu_2019.networks import DenseNet121, Dropout, ResNet50, build

# torchvision's documentation: parameters of resnet50 and densenet121, 3 channels, 1,000 classes.
PUBLISHED = {ResNet50: 25_557_032, DenseNet121: 7_978_856}
STEM = 64 * 3 * (7 * 7 - 3 * 3)  # what a 7 x 7 stem has more than a 3 x 3 one


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("network", [ResNet50, DenseNet121])
def test_parameters_are_torchvisions_but_for_the_stem(network: type[nn.Module]) -> None:
    assert _parameters(network(3, classes=1_000)) == PUBLISHED[network] - STEM


def test_resnet_layer_by_layer() -> None:
    model = ResNet50(3)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 53
    assert all(conv.bias is None for conv in convs)
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        inputs = 64 if stage == 1 else 2 * width
        blocks = list(getattr(model, f"stage{stage}"))
        assert len(blocks) == depth
        # 1 x 1, 3 x 3, 1 x 1, a pair of numbers for each channel of the three norms.
        inner = width * width * 9 + width * 4 * width + 2 * (width + width + 4 * width)
        first = inputs * width + inner + inputs * 4 * width + 2 * 4 * width
        assert _parameters(blocks[0]) == first
        assert all(_parameters(block) == 4 * width * width + inner for block in blocks[1:])
    assert _parameters(model.head) == 2048 * 10 + 10


def test_densenet_layer_by_layer() -> None:
    model = DenseNet121(3)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 120
    width = 64
    for block in (1, 2, 3, 4):
        for layer in getattr(model, f"dense{block}"):
            assert _parameters(layer) == 2 * width + 128 * width + 2 * 128 + 32 * 128 * 9
            width += 32
        if block < 4:
            transition = getattr(model, f"transition{block}")
            assert _parameters(transition) == 2 * width + width * width // 2
            width //= 2
    assert width == 1024
    assert _parameters(model.head) == 1024 * 10 + 10


@pytest.mark.parametrize("name", ["ResNet", "DenseNet"])
@pytest.mark.parametrize(("channels", "size", "stride"), [(1, 28, 2), (3, 32, 1)])
def test_logits_and_dropout(name: str, channels: int, size: int, stride: int) -> None:
    model = build(name, channels, True, stride, seed=0)
    x = torch.randint(0, 256, (2, channels, size, size)).float()
    with torch.no_grad():
        z = model.eval()(x)
        assert z.shape == (2, 10) and torch.equal(z, model(x))
        assert torch.allclose(z, model.network(x / 255))
    again = build(name, channels, True, stride, seed=0).eval()
    with torch.no_grad():
        assert torch.equal(z, again(x))
        for module in model.modules():  # a residual block begins as its shortcut alone
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
        model.train()
        assert not torch.equal(model(x), model(x))


def test_small_networks_have_layers_that_fastfi_knows() -> None:
    for name, layers in (("ResNet", 31), ("DenseNet", 55)):
        model = build(name, 3, False, 2, seed=0).eval()
        x = torch.randint(0, 256, (2, 3, 32, 32)).float()
        r = fastfi.influence(model, x, wrt="layers", inverse="damped", full_output=True)
        assert r.fi.shape == (2, layers) and bool((r.fi > 0).all())


@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_drops_a_fifth_and_keeps_the_mean(channels_last: bool) -> None:
    torch.manual_seed(1)
    layer, x = Dropout().train(), torch.rand(16, 32, 31, 7) + 0.5
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = layer(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    kept = slope != 0
    assert torch.equal(y[kept], (x * slope)[kept]) and not y[~kept].any()
    assert slope[kept].unique().tolist() == [pytest.approx(256 / 205)]
    n = x.numel()
    share = float((~kept).double().mean())
    assert abs(share - 51 / 256) < 5 * (0.2 * 0.8 / n) ** 0.5
    # No pattern from the eight elements that share a draw: neighbours are dropped independently.
    flat = (~kept).permute(0, 2, 3, 1).flatten() if channels_last else (~kept).flatten()
    both = float((flat[1:] & flat[:-1]).double().mean())
    assert abs(both - (51 / 256) ** 2) < 5 * (0.04 / n) ** 0.5
    assert layer.eval()(x) is x


def test_dropout_leaves_views_with_gaps_alone() -> None:
    x = torch.ones(8, 10, 6)[:, ::2]  # not dense in memory
    y = Dropout().train()(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 256 / 205]))
