"""ResNet-50 and DenseNet-121 for small images, with the authors' dropout, and small stand-ins.

Layer for layer they are torchvision's networks but for the first convolution, 3 x 3 instead of
7 x 7 with pooling, and the classes: 23,519,690 and 6,955,274 parameters for grey images and ten
classes. As in the authors' scripts, dropout at 0.2 follows every activation inside a residual block
and every convolution of a dense layer or transition. Theirs also follows every block's sum: sixteen
of them in a row on the shortcut path, with which the loss stayed at 2.1 over the first 143 steps of
64 MNIST images (0.35 for the DenseNet after 205). It is an option here, ``sum_dropout``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from examples.models import SmallDenseNet, SmallResNet

__all__ = ["DROPOUT", "DenseNet121", "Dropout", "ResNet50", "Scaled", "build"]

DROPOUT = 0.2
GROWTH = 32


class Dropout(nn.Module):
    """Dropout by random bytes on a CPU, where nn.Dropout's generator took a fifth of a training
    step: each 64-bit draw decides eight elements, at a rate of 51/256 = 0.1992."""

    def __init__(self, rate: float = DROPOUT) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        dropped = round(self.rate * 256)
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
        # random_() alone stops at 2^63; from and to cover all 64 bits.
        draws.random_(torch.iinfo(torch.int64).min, None)
        mask = draws.view(torch.uint8)[: x.numel()] >= dropped
        # As x lies in memory, which may be channels last.
        mask = mask.as_strided(x.shape, torch.empty_like(x, device="meta").stride())
        return (x * mask).mul_(256 / (256 - dropped))


class Scaled(nn.Module):
    """A network that takes pixels 0..255: the scale that the authors' rule was applied at."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x / 255)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 with four times the channels, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, sum_dropout: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )
        self.dropout, self.sum_dropout = Dropout(), Dropout(DROPOUT if sum_dropout else 0)
        # A block begins as its shortcut, which lets deep networks learn from the first step on.
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(relu(self.norm1(self.conv1(x))))
        inner = self.dropout(relu(self.norm2(self.conv2(inner))))
        return self.sum_dropout(relu(self.norm3(self.conv3(inner)) + self.shortcut(x)))


class ResNet50(nn.Module):
    """[B, C, H, W] to logits [B, K]; 54 layers with weights of their own but the norms."""

    def __init__(
        self, channels: int, classes: int = 10, stem_stride: int = 1, sum_dropout: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(channels, 64, 3, stem_stride), nn.BatchNorm2d(64), nn.ReLU()
        )
        inputs = 64
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_Bottleneck(inputs, width, stride, sum_dropout))
                inputs = 4 * width
            setattr(self, f"stage{stage + 1}", nn.Sequential(*blocks))
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class _DenseLayer(nn.Module):
    """A bottleneck of 4 x GROWTH channels, then GROWTH new ones, appended to the input."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, 4 * GROWTH, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * GROWTH), _conv(4 * GROWTH, GROWTH, 3)
        self.dropout = Dropout()

    def forward(self, x: Tensor) -> Tensor:
        new = self.dropout(self.conv1(relu(self.norm1(x))))
        new = self.dropout(self.conv2(relu(self.norm2(new))))
        return torch.cat([x, new], 1)


class _Transition(nn.Module):
    """Half the channels; half the height and width, rounded up so that 1 x 1 stays."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), _conv(inputs, inputs // 2, 1)
        self.dropout = Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.conv(relu(self.norm(x))))
        return nn.functional.avg_pool2d(x, 2, ceil_mode=True)


class DenseNet121(nn.Module):
    """[B, C, H, W] to logits [B, K]; dense blocks of 6, 12, 24 and 16 layers."""

    def __init__(self, channels: int, classes: int = 10, stem_stride: int = 1) -> None:
        super().__init__()
        width = 2 * GROWTH
        self.stem = nn.Sequential(
            _conv(channels, width, 3, stem_stride), nn.BatchNorm2d(width), nn.ReLU()
        )
        for block, depth in enumerate((6, 12, 24, 16), 1):
            layers = [_DenseLayer(width + i * GROWTH) for i in range(depth)]
            setattr(self, f"dense{block}", nn.Sequential(*layers))
            width += depth * GROWTH
            if block < 4:
                setattr(self, f"transition{block}", _Transition(width))
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.dense1(self.stem(x)))
        x = self.transition2(self.dense2(x))
        x = self.dense4(self.transition3(self.dense3(x)))
        return self.head(relu(self.norm(x)).mean((2, 3)))


def build(
    name: str, channels: int, large: bool, stem_stride: int, seed: int, sum_dropout: bool = False
) -> Scaled:
    """A new network for pixels 0..255.

    Args:
        name: "ResNet" or "DenseNet".
        large: ResNet-50 and DenseNet-121; otherwise SmallResNet and SmallDenseNet of
            :mod:`examples.models`, which have no dropout.
        seed: of the weights.
        sum_dropout: dropout after every residual block's sum too, ResNet-50 only.
    """
    torch.manual_seed(seed)
    if large:
        if name == "ResNet":
            return Scaled(ResNet50(channels, stem_stride=stem_stride, sum_dropout=sum_dropout))
        return Scaled(DenseNet121(channels, stem_stride=stem_stride))
    small = {"ResNet": SmallResNet, "DenseNet": SmallDenseNet}[name]
    return Scaled(small(channels=channels))
