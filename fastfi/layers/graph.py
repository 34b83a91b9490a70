"""Is anything left out? A walk through the autograd graph that does not depend on values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["node_of", "reached"]


def node_of(t: Any) -> Any | None:
    """The node that a tensor's gradient enters by, None for leaves."""
    return t.grad_fn if isinstance(t, Tensor) and t.requires_grad else None


def reached(
    start: Any, detours: Mapping[Any, Sequence[Any]], watched: Mapping[int, int]
) -> tuple[set[int], set[Any]]:
    """Which parameters a graph leads to.

    Args:
        start: a node.
        detours: nodes that are not entered, and where the walk goes on instead.
        watched: numbers of parameters, by id.

    Returns:
        Numbers of the watched parameters whose leaves were reached; the detours that were taken.
    """
    found: set[int] = set()
    taken: set[Any] = set()
    seen: set[Any] = set()
    stack: list[Any] = [start]

    def add(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)

    while stack:
        node = stack.pop()
        if node in detours:
            taken.add(node)
            add(detours[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in watched:
            found.add(watched[id(leaf)])
        add(n for n, _ in node.next_functions)
    return found, taken
