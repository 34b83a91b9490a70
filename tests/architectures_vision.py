"""Convolutional networks of a few thousand parameters: see ``architectures``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BUILDERS", "Flow", "head"]


def head(inputs: int, classes: int, bias: bool = True) -> nn.Linear:
    """A last layer whose logits have a standard deviation of one to three."""
    layer = nn.Linear(inputs, classes, bias=bias)
    nn.init.normal_(layer.weight, 0.0, 2.0 / inputs**0.5)
    return layer


class Flow(nn.Sequential):
    """Layers, then the mean over positions, then a head."""

    def __init__(self, *layers: nn.Module, width: int, classes: int) -> None:
        super().__init__(*layers)
        self.head = head(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            x = layer(x)
        return self.head(3.0 * x.flatten(2).mean(2) if x.dim() > 2 else x)


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), head(8, 5))
    return net, torch.randn(4, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    return ResidualNet(), torch.randn(3, 2, 8, 8)


class ResidualNet(nn.Module):
    """BatchNorm, in-place ReLU, an in-place sum, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(5)
        self.head = head(5 * 16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(x))
        out += x
        return self.head(F.max_pool2d(self.relu(out), 2).flatten(1))


class Basic(nn.Module):
    """ResNet-18's block, as torchvision writes it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or inputs != width:
            shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 at a sixteenth of its width, with either stem."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3 if small else 7, 1 if small else 2, 1 if small else 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        inputs = 4
        for stage, width in enumerate((4, 8, 16, 32)):
            first = Basic(inputs, width, 1 if stage == 0 else 2)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, Basic(width, width, 1)))
            inputs = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = head(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18() -> tuple[nn.Module, Tensor]:
    return ResNet18(small=False), torch.randn(3, 3, 16, 16)


def resnet18_small() -> tuple[nn.Module, Tensor]:
    return ResNet18(small=True), torch.randn(3, 3, 8, 8)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseNet121(nn.Module):
    """DenseNet-121's four blocks and three transitions, with a growth rate of 3."""

    def __init__(self, growth: int = 3) -> None:
        super().__init__()
        width = 2 * growth
        self.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for depth in (6, 12, 24, 16):
            layers = [DenseLayer(width + i * growth, growth) for i in range(depth)]
            self.blocks.append(nn.ModuleList(layers))
            width += depth * growth
            if depth != 16:
                norm, relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
                conv = nn.Conv2d(width, width // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(norm, relu, conv, nn.AvgPool2d(2)))
                width //= 2
        self.norm5 = nn.BatchNorm2d(width)
        self.classifier = head(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        for i, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if i < 3:
                x = self.transitions[i](x)
        return self.classifier(F.relu(self.norm5(x), inplace=True).mean((2, 3)))


def densenet121() -> tuple[nn.Module, Tensor]:
    return DenseNet121(), torch.randn(3, 3, 8, 8)


def depthwise() -> tuple[nn.Module, Tensor]:
    """Depthwise-separable and grouped convolutions."""
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 1),
        nn.Hardswish(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.SiLU(inplace=True),
        nn.Conv2d(12, 24, 3, padding=1, groups=12),  # a depth multiplier of 2
    ]
    return Flow(*layers, width=24, classes=5), torch.randn(3, 3, 8, 8)


def conv1d() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv1d(2, 6, 5, stride=2, padding=3),
        nn.Tanh(),
        nn.Conv1d(6, 6, 3, dilation=2, groups=2, bias=False),
        nn.Tanh(),
        nn.Conv1d(6, 8, 4, padding="same", padding_mode="circular"),
    ]
    return Flow(*layers, width=8, classes=4), torch.randn(4, 2, 25)


def conv3d() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv3d(2, 4, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Conv3d(4, 6, 2, dilation=(1, 1, 2), groups=2),
    ]
    return Flow(*layers, width=6, classes=4), torch.randn(3, 2, 3, 6, 5)


def paddings() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2), padding_mode="reflect", bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3, padding=2, dilation=2, padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(5, 6, (3, 2), padding="same", dilation=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding="valid", stride=(2, 1), groups=3),
    ]
    return Flow(*layers, width=6, classes=4), torch.randn(3, 2, 7, 6)


def transposed1d() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.ConvTranspose1d(3, 6, 4, stride=3, padding=1, output_padding=2),
        nn.Tanh(),
        nn.ConvTranspose1d(6, 4, 3, dilation=2, groups=2, bias=False),
    ]
    return Flow(*layers, width=4, classes=4), torch.randn(3, 3, 5)


def transposed2d() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=(1, 0), groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 5, (2, 3), dilation=(1, 2)),
    ]
    return Flow(*layers, width=5, classes=4), torch.randn(3, 3, 7, 7)


class TwoResolutions(nn.Module):
    """One convolution at two resolutions, as the heads of detectors are used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.head = head(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.norm(self.conv(x)).relu_().mean((2, 3))
        coarse = self.norm(self.conv(F.avg_pool2d(x, 2))).relu_().mean((2, 3))
        return self.head(3.0 * fine * coarse)


def two_resolutions() -> tuple[nn.Module, Tensor]:
    return TwoResolutions(), torch.randn(3, 3, 6, 6)


class Frames(nn.Module):
    """A time-distributed CNN: the frames of [B, F, C, H, W] fold into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 6)
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x.flatten(0, 1))  # [B F, 6, H, W]
        frames = F.relu(self.norm(frames), inplace=True).mean((2, 3))
        return self.head(torch.tanh(self.mix(frames)).view(*x.shape[:2], -1).sum(1))


def frames() -> tuple[nn.Module, Tensor]:
    return Frames(), torch.randn(3, 3, 2, 6, 6)  # as many frames as samples


BUILDERS = {
    f.__name__: f
    for f in (mlp, cnn, resnet18, resnet18_small, densenet121, depthwise, conv1d, conv3d, paddings)
} | {f.__name__: f for f in (transposed1d, transposed2d, two_resolutions, frames)}
