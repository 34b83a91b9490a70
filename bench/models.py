"""Compact ResNets for 32 x 32 inputs, so that the benchmarks need no torchvision.

The blocks are those of He et al. 2016 (basic and bottleneck), written as users write them:
BatchNorm, in-place ReLU, residual sums. Two stems: the original one for large images (7 x 7, stride
2, and pooling, so that 32 x 32 inputs reach the first block as 8 x 8), and the usual one for small
images (3 x 3, stride 1, no pooling: 16 times the arithmetic in every block).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Basic", "Bottleneck", "ResNet", "resnet18", "resnet18_small"]
__all__ += ["resnet50", "resnet50_small"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions and a shortcut (ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Four stages of widths 64, 128, 256, 512. Input [B, channels, H, W], output logits [B, K]."""

    def __init__(
        self,
        block: type[Basic | Bottleneck],
        depths: tuple[int, int, int, int],
        classes: int = 10,
        channels: int = 3,
        small: bool = False,
    ) -> None:
        super().__init__()
        first = _conv(channels, 64, 3) if small else _conv(channels, 64, 7, 2)
        pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(inplace=True), pool)
        width, inputs = 64, 64
        for stage, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inputs, width, stride))
                inputs = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            width *= 2
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.stem(x)
        for stage in range(4):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        return self.fc(torch.flatten(self.pool(out), 1))  # [B, K]


def resnet18(classes: int = 10, channels: int = 3) -> ResNet:
    """ResNet-18, 11.2 million parameters."""
    return ResNet(Basic, (2, 2, 2, 2), classes, channels)


def resnet50(classes: int = 10, channels: int = 3) -> ResNet:
    """ResNet-50, 23.5 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, channels)


def resnet18_small(classes: int = 10, channels: int = 3) -> ResNet:
    """ResNet-18 with the stem for small images."""
    return ResNet(Basic, (2, 2, 2, 2), classes, channels, small=True)


def resnet50_small(classes: int = 10, channels: int = 3) -> ResNet:
    """ResNet-50 with the stem for small images."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, channels, small=True)
