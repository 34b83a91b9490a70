"""What the blocks of the documentation find: a few names, and a folder like a user's project.

A page asks for names in a comment, ``<!-- names: model x y -->``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from data_files import pixels, write_idx
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

__all__ = ["NAMES", "make_project", "names_for"]

CLASSES = 10
COUNT = 40  # images

_MODELS = '''
import torch
from torch import nn


class Net(nn.Module):
    """[B, 1, 8, 8] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.layer4 = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = self.layer4(self.conv1(x).relu()).relu()
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


def resnet():
    return Net()
'''


def make_project(folder: Path) -> None:
    """my_package/models.py, weights.safetensors and a data set like MNIST, of 8 x 8 images."""
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text(_MODELS)
    save_file(_model(folder).state_dict(), folder / "weights.safetensors")
    labels = pixels(COUNT, seed=2) % CLASSES
    (folder / "data" / "mnist").mkdir(parents=True)
    for split in ("train", "test"):
        images = pixels(COUNT, 8, 8, seed=len(split))
        write_idx(folder / "data" / "mnist", images, labels, split)


def _model(folder: Path) -> Any:
    path = folder / "my_package" / "models.py"
    spec = importlib.util.spec_from_file_location("documented_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.resnet().eval()


def _samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(COUNT, 1, 8, 8, generator=generator)
    return x, torch.randint(CLASSES, (COUNT,), generator=generator)


NAMES = {
    "model": _model,
    "x": lambda folder: _samples()[0],
    "y": lambda folder: _samples()[1],
    "data": lambda folder: TensorDataset(*_samples()),
    # The 2 x 2 patches of an image, and its upper half.
    "patches": lambda folder: torch.arange(16).reshape(4, 4).repeat_interleave(2, 0)
    .repeat_interleave(2, 1),
    "mask": lambda folder: torch.arange(64).reshape(8, 8) < 32,
}  # fmt: skip


def names_for(wanted: list[str], folder: Path) -> dict[str, Any]:
    """The names that a page asks for, made anew."""
    return {name: NAMES[name](folder) for name in wanted}
