"""Small convolutional networks for the examples.

Each class is also a factory for ``fastfi score --model examples.models:SmallCNN``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

__all__ = ["DigitsNet", "SmallCNN", "SmallDenseNet", "SmallResNet"]


class DigitsNet(nn.Module):
    """For 8 x 8 digits: [B, 1, 8, 8] in 0..1 to logits [B, K]; 22 thousand parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class SmallCNN(nn.Module):
    """For MNIST: [B, 1, 28, 28] in 0..1 to logits [B, K]; 106 thousand parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, since a norm layer follows or went before."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class _BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            named = [("conv", _conv(inputs, outputs, 1, stride)), ("norm", nn.BatchNorm2d(outputs))]
            self.shortcut = nn.Sequential(OrderedDict(named))

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """For MNIST: [B, 1, 28, 28] in 0..1 to logits [B, K]; 175 thousand parameters in 31 layers.

    A ResNet of three stages with two basic blocks each, 16, 32 and 64 channels. Other images than
    grey ones have other ``channels``.
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        named = [("conv", _conv(channels, 16, 3, stride=2)), ("norm", nn.BatchNorm2d(16))]
        self.stem = nn.Sequential(OrderedDict([*named, ("relu", nn.ReLU())]))
        self.stage1 = nn.Sequential(_BasicBlock(16, 16, 1), _BasicBlock(16, 16, 1))
        self.stage2 = nn.Sequential(_BasicBlock(16, 32, 2), _BasicBlock(32, 32, 1))
        self.stage3 = nn.Sequential(_BasicBlock(32, 64, 2), _BasicBlock(64, 64, 1))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(features.mean((2, 3)))


class _DenseLayer(nn.Module):
    """A bottleneck of 4 x growth channels, then ``growth`` new channels, appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(relu(self.norm2(self.conv1(relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


class _Transition(nn.Module):
    """Half the channels, half the height and width."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = _conv(inputs, inputs // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.conv(relu(self.norm(x))), 2)


class SmallDenseNet(nn.Module):
    """For MNIST: [B, 1, 28, 28] in 0..1 to logits [B, K]; 102 thousand parameters in 55 layers.

    A DenseNet-BC of three dense blocks with four layers each and a growth of 12. Other images than
    grey ones have other ``channels``.
    """

    def __init__(
        self, classes: int = 10, growth: int = 12, depth: int = 4, channels: int = 1
    ) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = _conv(channels, width, 3, stride=2)
        for block in (1, 2, 3):
            layers = [_DenseLayer(width + i * growth, growth) for i in range(depth)]
            setattr(self, f"dense{block}", nn.Sequential(*layers))
            width += depth * growth
            if block < 3:
                setattr(self, f"transition{block}", _Transition(width))
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.dense1(self.stem(x)))
        x = self.dense3(self.transition2(self.dense2(x)))
        return self.head(relu(self.norm(x)).mean((2, 3)))
