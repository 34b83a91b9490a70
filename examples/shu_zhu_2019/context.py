"""What the parts of the experiment share: the images, the trained networks, the stored scores.
Each is made once in a run and kept in the output folder for the next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fastfi
from examples.shu_zhu_2019.config import Config
from examples.shu_zhu_2019.data import Data, Images, load
from examples.shu_zhu_2019.networks import build
from examples.shu_zhu_2019.training import Plan, prepared, train

__all__ = ["TITLES", "Context"]

TITLES = {
    (True, "ResNet"): "ResNet-50",
    (True, "DenseNet"): "DenseNet-121",
    (False, "ResNet"): "SmallResNet",
    (False, "DenseNet"): "SmallDenseNet",
}


class Context:
    """One run's settings, and what its parts have in common.

    Attributes:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._data: dict[str, Data] = {}
        self._models: dict[tuple[str, str], tuple[nn.Module, dict[str, Any]]] = {}

    def data(self, dataset: str) -> Data:
        """The images of "mnist" or "cifar10"."""
        if dataset not in self._data:
            c = self.config
            self._data[dataset] = load(c.data, dataset, c.train_images, c.test_images, c.seed)
        return self._data[dataset]

    def title(self, network: str) -> str:
        """What "ResNet" or "DenseNet" is in this run."""
        return TITLES[self.config.large, network]

    def new_model(self, dataset: str, network: str, seed: int | None = None) -> nn.Module:
        """Untrained, on the device."""
        c = self.config
        channels = self.data(dataset).train.x.shape[1]
        seed = c.seed if seed is None else seed
        model = build(network, channels, c.large, c.stem_stride, seed, c.sum_dropout)
        return prepared(model, c.device)

    def epochs(self, dataset: str, number: int) -> int:
        """A number of passes over MNIST, or as many more as CIFAR-10 takes."""
        return number * (self.config.cifar_factor if dataset == "cifar10" else 1)

    def plan(self, dataset: str) -> Plan:
        """How the networks of a data set are trained."""
        c = self.config
        epochs = self.epochs(dataset, c.epochs)
        return Plan(epochs, c.batch, c.rate, seed=c.seed, checkpoint_seconds=c.checkpoint_seconds)

    def label(self, dataset: str, network: str) -> str:
        """A training's name; networks that differ in what weights do not show have others."""
        c = self.config
        stride = f", stem stride {c.stem_stride}" if c.large else ""
        noise = ", dropout of sums" if c.sum_dropout and network == "ResNet" else ""
        return f"{dataset} {self.title(network)}{stride}{noise}"

    def weights(self, name: str) -> Path:
        """Where the weights of a training lie."""
        return self.config.out / "networks" / f"{name}.safetensors"

    def trained(self, dataset: str, network: str) -> tuple[nn.Module, dict[str, Any]]:
        """The network in eval mode on the device, and what was noted of its training."""
        key = dataset, network
        if key not in self._models:
            model, data = self.new_model(dataset, network), self.data(dataset)
            notes = train(
                model,
                data.train,
                data.valid,
                self.plan(dataset),
                self.weights(f"{dataset}-{network}"),
                device=self.config.device,
                label=self.label(dataset, network),
            )
            self._models[key] = model, notes
        return self._models[key]

    def model(self, dataset: str, network: str) -> nn.Module:
        """The trained network in eval mode on the device; pixels 0..255 to logits."""
        return self.trained(dataset, network)[0]

    def images(self, dataset: str, split: str) -> Images:
        """The images of "train" (without the validation set), "valid" or "test"."""
        images: Images = getattr(self.data(dataset), split)
        return images

    def scores(self, dataset: str, network: str, split: str) -> fastfi.Scores:
        """Exact FI of the input of every image by the closed form at full rank, for the label
        (columns ``log_prob``, ``fi``) and the predicted class (``predicted_log_prob``,
        ``predicted_fi``), from one forward pass; ids are positions in the split. The first call's
        seconds are in :meth:`score_seconds`."""
        out = self.config.out / "scores" / f"{dataset}-{network}-{split}"
        images, model = self.images(dataset, split), self.model(dataset, network)
        new = not out.exists()
        out.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        scores = fastfi.score(
            model,
            (images.x, images.y),
            out=out,
            y="both",
            assume_full_rank=True,
            batch_size=500,
            device=self.config.device,
            transform=Tensor.float,
        )
        if new:
            (out / "_seconds.txt").write_text(f"{time.perf_counter() - start:.3f}\n")
        return scores

    def score_seconds(self, dataset: str, network: str, split: str) -> float | None:
        """How long :meth:`scores` took, reading and writing among it; None where it went on from
        an interrupted run."""
        path = self.config.out / "scores" / f"{dataset}-{network}-{split}" / "_seconds.txt"
        return float(path.read_text()) if path.exists() else None
