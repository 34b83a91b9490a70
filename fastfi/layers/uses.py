"""What one operation does with a parameter, and how the parameter's gradient follows from the
cotangent of the operation's output.

A gradient is linear in the cotangent. Four forms cover the layers of torch.nn:

* :class:`Outer` (linear maps): ``W_ij = sum_t d_ti a_tj``;
* :class:`Convolution`: the same with ``a`` unfolded into patches;
* :class:`Scaled` (biases, norms, PReLU, anything broadcast): ``w_i = sum_t d_ti f_ti``;
* :class:`Lookup` (embeddings): ``W_v = sum_{t: index_t = v} d_t``.

Shapes below: B samples, T positions, n rows (cotangents), O outputs, D inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastfi.convolution import Geometry, unfold
from fastfi.layers.batching import Batching
from fastfi.layers.source import Source

__all__ = ["Convolution", "Kept", "Lookup", "Outer", "Pulled", "Scaled", "Tapped", "Use"]


class Kept:
    """An activation, as it was when the operation read it.

    Args:
        t: the activation.
        copy: hold a copy, because the model overwrites it later.
    """

    def __init__(self, t: Tensor, copy: bool) -> None:
        self.tensor = t.detach().clone() if copy else t.detach()  # shares t's version counter
        self._version = self.tensor._version

    @property
    def overwritten(self) -> bool:
        """Whether the model has changed it since."""
        return self.tensor._version != self._version


class Tapped(ABC):
    """Something on the tape that parameters' gradients follow from.

    Attributes:
        what: its name.
    """

    what: str

    @property
    @abstractmethod
    def roots(self) -> tuple[int, ...]:
        """The parameters whose gradients it adds to."""

    @property
    @abstractmethod
    def edges(self) -> list[int]:
        """The edges whose cotangents it needs."""

    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Of every tensor whose batching it needs: the edges' first, in their order."""

    @abstractmethod
    def assign(self, batchings: Sequence[Batching | None]) -> None:
        """Takes the batchings of those tensors."""

    @abstractmethod
    def places(self) -> Sequence[Batching | None]:
        """The batchings of the edges, in their order."""

    def kept(self) -> list[Kept]:
        """The activations that must not have been overwritten."""
        return []


@dataclass
class Use(Tapped):
    """One operation that reads (a view of) one parameter.

    Attributes:
        what: the operation's name.
        source: the view.
        edge: the number of the tape's edge whose cotangent is needed.
        out: shape of the operation's output.
        batching: of that output; set when the model's plan is known.
    """

    what: str
    source: Source
    edge: int
    out: tuple[int, ...]
    batching: Batching = field(default=Batching(0), init=False)

    @property
    def roots(self) -> tuple[int, ...]:
        return (self.source.root,)

    @property
    def edges(self) -> list[int]:
        return [self.edge]

    def shapes(self) -> list[tuple[int, ...]]:
        return [self.out]

    def places(self) -> Sequence[Batching | None]:
        return [self.batching]

    def assign(self, batchings: Sequence[Batching | None]) -> None:
        if batchings[0] is not None:  # None where no cotangent comes
            self.batching = batchings[0]


@dataclass
class Outer(Use):
    """``y = a W^T`` at every position, W [O, D] (the source's shape).

    Attributes:
        activation: a [..., D].
    """

    activation: Kept

    def kept(self) -> list[Kept]:
        return [self.activation]

    def inputs(self, batch: int) -> Tensor:
        """a as [B, T, D]."""
        a = self.activation.tensor
        return self.batching.split(a, batch).flatten(1, -2)

    def cotangent(self, d: Tensor, batch: int) -> Tensor:
        """d [..., O] as [B, T, O]."""
        return self.batching.split(d, batch).flatten(1, -2)


@dataclass
class Convolution(Use):
    """A convolution, or a transposed one, whose weight's gradient is that of the convolution
    backwards: its input and output change places.

    Attributes:
        activation: the input [B * m, C, *spatial].
        geometry: kernel, stride, padding, dilation, groups.
        transposed: whether it is a transposed convolution.
    """

    activation: Kept
    geometry: Geometry
    transposed: bool

    def kept(self) -> list[Kept]:
        return [self.activation]

    def inputs(self, batch: int) -> Tensor:
        """The input as [B, m, C, *spatial]."""
        return self.batching.split(self.activation.tensor, batch)

    def cotangent(self, d: Tensor, batch: int) -> Tensor:
        """d as [B, m, O, *spatial]."""
        return self.batching.split(d, batch)

    def by_image(self, batch: int) -> bool:
        """Whether the samples are its images, and its direction the usual one."""
        alone = self.batching == Batching(0) and self.out[0] == batch
        return alone and not self.transposed

    def factors(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution as a linear map for each group.

        Args:
            x: [b, m, C, *spatial] and d [b, n, m, O, *spatial], as above.

        Returns:
            left [b, n or 1, g, T, I] and right [b, 1 or n, g, T, J]: the weight's gradient in group
            g is ``left^T right``, [I, J] as the weight lies in memory.
        """
        g = self.geometry.groups
        patches, grid = (d, x[:, None]) if self.transposed else (x[:, None], d)
        lead = patches.shape[:3]
        columns = unfold(patches.flatten(0, 2), self.geometry)  # [b*n*m, C*k, T]
        right = columns.unflatten(0, lead).unflatten(3, (g, -1))  # [b, n, m, g, J, T]
        left = grid.flatten(4).unflatten(3, (g, -1))  # [b, n, m, g, I, T]
        return tuple(f.permute(0, 1, 3, 2, 5, 4).flatten(3, 4) for f in (left, right))


@dataclass
class Scaled(Use):
    """An entry that multiplies (or is added to) many outputs.

    Attributes:
        aligned: the view's shape as it broadcasts against the output; same number of dimensions.
        factor: what it is multiplied by, of the output's shape; None means 1.
    """

    aligned: tuple[int, ...]
    factor: Callable[[], Tensor] | None
    activation: Kept | None = None
    _factor: Tensor | None = field(default=None, init=False)

    def kept(self) -> list[Kept]:
        return [] if self.activation is None else [self.activation]

    def by_channel(self, batch: int) -> bool:
        """Whether it is one entry for each channel of images that are the samples: [B, C, ...]."""
        return (
            len(self.out) > 2
            and self.batching == Batching(0)
            and self.out[0] == batch
            and max(self.aligned[:1] + self.aligned[2:]) == 1
            and self.aligned[1] == self.out[1]
        )

    def scale(self) -> Tensor | None:
        """The factor; computed once."""
        if self._factor is None and self.factor is not None:
            self._factor = self.factor()
        return self._factor

    def gradient(self, d: Tensor, batch: int) -> Tensor:
        """The view's gradient, [B, size]."""
        factor = self.scale()
        d = d.to(torch.promote_types(d.dtype, torch.float32))
        if factor is not None:
            d = d * factor
        summed = [i + 1 for i, size in enumerate(self.aligned) if size == 1]
        d = self.batching.split(d, batch)
        return (d.sum(summed) if summed else d).reshape(batch, -1)


@dataclass
class Pulled(Scaled):
    """The same for a tensor that was computed from parameters: its gradient is pulled back to them.

    Attributes:
        derived: the tensor, with its graph.
        origins: the parameters, by number.
    """

    derived: Tensor | None = None
    origins: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def roots(self) -> tuple[int, ...]:
        return tuple(self.origins)

    def pull_back(self, rows: Tensor) -> dict[int, Tensor]:
        """Gradients [b, n, *shape] of each parameter from those of the tensor, [b, n, size]."""
        assert self.derived is not None
        d = rows.to(self.derived.dtype).reshape(-1, *self.derived.shape)
        with torch.enable_grad():
            grads = torch.autograd.grad(
                self.derived, list(self.origins.values()), d, is_grads_batched=True,
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
        return {
            root: g.unflatten(0, rows.shape[:2])
            for root, g in zip(self.origins, grads, strict=True)
            if g is not None
        }


@dataclass
class Lookup(Use):
    """Rows of a table W [V, E], one for each index; or sums of them (bags).

    Attributes:
        index: as in the operation: [...] for an embedding, [bags, L] or [N] for bags.
        weight: of each index, like it; None means 1.
        bag: the output (a position of its batched dimension) that each index belongs to, [N];
            None where each index has an output of its own.
    """

    index: Kept
    weight: Tensor | None
    bag: Tensor | None

    def kept(self) -> list[Kept]:
        return [self.index]

    def entries(self, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Indices [B, N], their outputs' numbers within the sample [B, N], and their weights;
        samples with fewer entries than others are filled with weight 0."""
        index = self.index.tensor
        if self.bag is None:
            own = self.batching.split(index, batch).flatten(1)
            place = torch.arange(own.shape[1], device=own.device).expand_as(own)
            weight = self.weight
            if weight is not None:
                weight = self.batching.split(weight, batch).flatten(1)
            return own, place, weight
        index, bag = index.flatten(), self.bag
        weight = torch.ones_like(bag, dtype=torch.float64) if self.weight is None else self.weight
        each = self.out[0] // batch
        minor = self.batching.minor
        sample, place = (bag % batch, bag // batch) if minor else (bag // each, bag % each)
        order = sample.argsort(dim=0, stable=True)
        count = sample.bincount(minlength=batch)
        first = count.cumsum(0) - count
        column = torch.arange(len(order), device=order.device) - first[sample[order]]
        at = sample[order], column
        width = max(1, int(count.max()))
        indices = index.new_zeros(batch, width)
        places, weights = bag.new_zeros(batch, width), weight.new_zeros(batch, width)
        indices[at], places[at] = index[order], place[order]
        weights[at] = weight.flatten()[order]
        return indices, places, weights

    def cotangent(self, d: Tensor, batch: int) -> Tensor:
        """d [..., E] as [B, T, E]."""
        return self.batching.split(d, batch).flatten(1, -2)
