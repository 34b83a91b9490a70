"""Training and prediction for the examples: Adam, a one-cycle learning rate, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["batches", "fit", "predict"]


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive batches (x [b, ...], y [b])."""
    yield from zip(x.split(size), y.split(size), strict=True)


def fit(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, batch: int, rate: float) -> None:
    """Trains in place and leaves the model in eval mode.

    Args:
        model: returns logits.
        x: [N, C, H, W] float32.
        y: [N] int64.
        epochs: passes over the data, at least 1.
        batch: samples per step.
        rate: the highest learning rate of the cycle.
    """
    steps = epochs * -(-len(x) // batch)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(x)).split(batch):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        if epoch == epochs - 1 or (epoch + 1) % max(1, epochs // 5) == 0:
            print(f"  epoch {epoch + 1:2d}/{epochs}: mean loss {total / len(x):.4f}", flush=True)
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """The predicted class of every image of the batches, [N] int64."""
    return torch.cat([model(x).argmax(1) for x in images])
