"""Which objectives and labels share a sweep: all whose rows are the contrasts alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastfi.objectives import Objective
from fastfi.rows import BALANCED
from fastfi.sweep import Request

__all__ = ["Target", "request_for", "run_shared", "sweep_key"]

T = TypeVar("T")


class Target(NamedTuple):
    """What FI measures the influence on.

    Attributes:
        objective: as in :func:`fastfi.influence`.
        y: [B] integer labels, or None for the predicted class.
    """

    objective: str | Objective
    y: Tensor | None


def request_for(q: Request, targets: Sequence[Target]) -> Request:
    """The request whose rows serve the targets; one with labels, which are checked first."""
    target = next((t for t in targets if t.y is not None), targets[0])
    return q._replace(objective=target.objective, y=target.y)


def sweep_key(target: Target, lump: float | None, *more: Hashable) -> Hashable:
    """Equal for targets that one sweep serves; None for one that needs its own.

    Args:
        lump: the classes that it keeps depend on the label.
        more: whatever else must be equal.
    """
    if target.objective not in BALANCED:
        return None
    return ("shared", lump is not None and id(target.y), *more)


def run_shared(
    targets: Sequence[Target],
    key: Callable[[Target], Hashable],
    run: Callable[[Sequence[Target]], list[T]],
) -> list[T]:
    """What ``run`` finds for each target, called once for all that share a key."""
    groups: dict[Hashable, list[int]] = {}
    for i, target in enumerate(targets):
        name = key(target)
        groups.setdefault(("own", i) if name is None else name, []).append(i)
    found: dict[int, T] = {}
    for members in groups.values():
        results = run([targets[i] for i in members])
        found.update(zip(members, results, strict=True))
    return [found[i] for i in range(len(targets))]
