"""``one_pixel``: change the few pixels that a map marks, and see whether the prediction follows.

Shu and Zhu (AAAI 2019, Figure 7) read their influence maps this way: where a pixel's FI is large,
changing that one pixel should be able to change the prediction. Any scores can stand in for the
map, so the claim can be tested against random pixels and against gradients.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfi._checks import check_label_range
from fastfi.errors import InputError, NonFiniteError, OptionError, SampleError
from fastfi.memory import ChunkPlan, chunks
from fastfi.model import forward
from fastfi.sweep import Request

__all__ = ["OnePixel", "one_pixel"]

CORNERS = 256  # all corners are tried while there are no more than this: 8 coordinates
SLACK = 1e-3  # by which x may leave the bounds, as a share of their width: rounding


class OnePixel(NamedTuple):
    """What :func:`one_pixel` returns: n pixels of each of B samples with C channels.

    Attributes:
        x: the changed samples, like x.
        success: [B] bool; the prediction was ``label`` before and is another class after.
        label: [B] int64, the class that was attacked: y, or the predicted class.
        label_before, label_after: [B] int64, the predicted class of x and of the changed sample.
        log_prob_before, log_prob_after: [B] float64, log P of ``label``.
        positions: [B, n, 1 to 3] int64, the changed pixels' indices into the spatial dimensions,
            by descending score.
        values: [B, n, C], the pixels' new values; the old ones where no change was better.
        evaluations: [B] int64, how often the model saw a version of the sample.
    """

    x: Tensor
    success: Tensor
    label: Tensor
    label_before: Tensor
    label_after: Tensor
    log_prob_before: Tensor
    log_prob_after: Tensor
    positions: Tensor
    values: Tensor
    evaluations: Tensor


def _check_integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    """value as an int from least to most."""
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name}: expected a whole number {limit}, got {value!r}")
    return int(value)


def _check_bounds(bounds: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """low and high, [C] in x's dtype, finite, low < high, with x between them."""
    expected = (
        "bounds: expected a pair (low, high) of finite numbers, or of tensors with one number for "
        f"each of the {x.shape[1]} channels, low below high"
    )
    pair = []
    try:
        low, high = bounds
        for bound in (low, high):
            # float64 first: integers and lists of floats are fine
            value = torch.as_tensor(bound, dtype=torch.float64, device=x.device)
            pair.append(value.expand(x.shape[1]).to(x.dtype))
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{expected}, got {bounds!r}") from error
    low, high = pair
    if not bool((low.isfinite() & high.isfinite() & (low < high)).all()):
        raise OptionError(f"{expected}, got {bounds!r}")
    slack = SLACK * (high - low)
    lowest, highest = x.detach().transpose(0, 1).flatten(1).aminmax(dim=1)  # [C]
    if bool(((lowest < low - slack) | (highest > high + slack)).any()):
        raise InputError(
            f"x: expected values within bounds, {low.tolist()} to {high.tolist()} by channel, got "
            f"{lowest.tolist()} to {highest.tolist()}; bounds are in the model's own units, after "
            "any normalisation"
        )
    return low, high


def _check_map(map: Any, x: Tensor) -> Tensor:
    """The scores of the pixels, [B, P], summed over channels."""
    batch, channels, spatial = x.shape[0], x.shape[1], list(x.shape[2:])
    expected = (
        f"map: expected one score for each pixel, shape {[batch, *spatial]}, or "
        f"{[batch, channels, *spatial]}"
    )
    if not isinstance(map, Tensor):
        hint = "; pick one scale: maps.fi[:, s]" if hasattr(map, "fi") else ""
        raise InputError(f"{expected}, got {type(map).__name__}{hint}")
    shape = list(map.shape)
    if shape not in ([batch, *spatial], [batch, channels, *spatial]):
        scaled = len(shape) > 2 and shape[0] == batch and shape[-len(spatial) :] == spatial
        hint = "; pick one scale of an influence map: maps[:, s]" if scaled else ""
        raise InputError(f"{expected}, got shape {shape}{hint}")
    if map.is_complex():
        raise InputError(f"map: expected real scores, got {map.dtype}")
    scores = map.detach().to(x.device, torch.float64)
    scores = scores.reshape(batch, -1, x.shape[2:].numel()).sum(1)  # [B, P]
    bad = scores.isnan().any(1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError("map: expected scores, got NaN in samples {samples}", bad)
    return scores


def _margin(z: Tensor, label: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, [B] float64; positive where y is not predicted."""
    z = z.double()
    own = z.gather(1, label[:, None])  # [B, 1]
    rest = z.scatter(1, label[:, None], -torch.inf)
    return rest.amax(1) - own.squeeze(1)


def _joined(
    total: int,
    plan: ChunkPlan,
    run: Callable[[slice], Tensor],
    samples: Tensor | None = None,
) -> Tensor:
    """run(slice) over 0..total, joined; errors name each of the caller's samples once."""
    try:
        return torch.cat(list(chunks(total, plan, run, samples)))
    except SampleError as error:
        error.indices = tuple(sorted(set(error.indices)))
        raise


class _Search:
    """The best values found so far, for the chosen pixels of every sample.

    Args:
        q: the arguments.
        pixels: [B, n] int64, positions in the flattened spatial dimensions.
        label: [B] the class attacked.
        margin: [B] of the unchanged samples.
        plan: how many versions of samples go through the model at once.

    Attributes:
        values: [B, C, n], of the pixels.
        margin: [B] float64, that the values attain.
        evaluations: [B] int64.
    """

    def __init__(
        self, q: Request, pixels: Tensor, label: Tensor, margin: Tensor, plan: ChunkPlan
    ) -> None:
        self._q, self._label, self._plan = q, label, plan
        self._x = q.x.detach().flatten(2)  # [B, C, P]
        self._at = pixels[:, None].expand(-1, self._x.shape[1], -1)  # [B, C, n]
        self.values = self._x.gather(2, self._at)
        self.margin = margin
        self.evaluations = torch.ones_like(label)

    def changed(self, samples: Tensor, values: Tensor) -> Tensor:
        """x of ``samples`` [m] with the pixels' values [m, C, n] written in: [m, C, *spatial]."""
        x = self._x[samples].scatter(2, self._at[samples], values)
        return x.reshape(-1, *self._q.x.shape[1:])

    def evaluate(self, samples: Tensor, values: Tensor) -> Tensor:
        """Logits [m, K] of changed samples, counted."""

        def run(part: slice) -> Tensor:
            x = self.changed(samples[part], values[part])
            return forward(self._q.model, x, self._q.outputs)

        self.evaluations += samples.bincount(minlength=len(self._x))
        return _joined(len(samples), self._plan, run, samples)

    def offer(self, samples: Tensor, candidates: Tensor) -> Tensor:
        """Takes the best of each sample's candidates, the first of equals, where it is better than
        what the sample has.

        Args:
            samples: [m] distinct.
            candidates: [m, M, C, n].

        Returns:
            [m] bool, whether the sample improved.
        """
        count = candidates.shape[1]
        each = samples.repeat_interleave(count)
        z = self.evaluate(each, candidates.flatten(0, 1))
        margins = _margin(z, self._label[each]).unflatten(0, (-1, count))  # [m, M]
        best = margins.argmax(1)
        margin = margins.gather(1, best[:, None]).squeeze(1)
        better = margin > self.margin[samples]
        where = samples[better]
        self.margin[where] = margin[better]
        self.values[where] = candidates[better, best[better]]
        return better


def _corners(low: Tensor, high: Tensor, count: int) -> Tensor:
    """The corners of the box of ``count`` pixels, [M, C, n]; beyond CORNERS only all low and all
    high."""
    channels = len(low)
    size = channels * count
    if 2**size > CORNERS:
        return torch.stack([low, high])[:, :, None].expand(2, channels, count)
    choice = torch.tensor(list(itertools.product([False, True], repeat=size)), device=low.device)
    choice = choice.reshape(-1, count, channels).transpose(1, 2)
    return torch.where(choice, high[:, None], low[:, None])


def _climb(search: _Search, low: Tensor, high: Tensor, steps: int, sweeps: int) -> None:
    """The search that :func:`one_pixel` describes."""
    batch, channels, count = search.values.shape
    active = torch.arange(batch, device=low.device)
    if channels * count > 1:
        corners = _corners(low, high, count)
        search.offer(active, corners.expand(batch, *corners.shape))
    else:
        sweeps = min(sweeps, 1)  # the second would try the same values
    share = torch.linspace(0, 1, steps, dtype=low.dtype, device=low.device)[:, None]
    grid = torch.lerp(low, high, share)  # [steps, C]
    for _ in range(sweeps):
        improved = torch.zeros(batch, dtype=torch.bool, device=low.device)
        for pixel, channel in itertools.product(range(count), range(channels)):
            candidates = search.values[active][:, None].repeat(1, steps, 1, 1)
            candidates[:, :, channel, pixel] = grid[:, channel]
            improved[active] |= search.offer(active, candidates)
        active = improved.nonzero().flatten()
        if len(active) == 0:
            return


@torch.no_grad()
def one_pixel(
    model: Any,
    x: Tensor,
    y: Tensor | None,
    map: Tensor,
    *,
    pixels: int = 1,
    bounds: tuple[Any, Any] = (0.0, 1.0),
    steps: int = 17,
    sweeps: int = 2,
    outputs: str = "logits",
    batch_size: int = 256,
) -> OnePixel:
    """Changes the ``pixels`` pixels with the largest scores in ``map`` so that class y loses most:
    the attack of Shu and Zhu, "Sensitivity Analysis of Deep Neural Networks", AAAI 2019
    (arXiv 1901.07152), Figure 7.

    The scores may be anything: one scale of :func:`influence_map`, ``torch.rand(B, H, W)`` for
    random pixels, the gradient's magnitude for the pixels with the largest gradient. Only their
    order matters; equal scores are taken in row-major order. The attack itself needs no gradients.

    It maximises the margin ``max_{k != y} z_k - z_y`` over the pixels' values, C for each pixel:

    1. One pixel with one channel: every one of ``steps`` values on an even grid from low to high,
       both included.
    2. Otherwise all corners of the box (each value low or high) while there are no more than 256 of
       them, that is up to 8 values; beyond that the two corners where all are low and all high.
       Then ``sweeps`` rounds of coordinate ascent from the best so far: each value in turn, pixel
       by pixel in the order of their scores and channel by channel, tries the whole grid. A sample
       that a round does not improve is left out of the next.

    The unchanged sample is the first candidate and only a larger margin replaces one, so a sample
    never gets worse for the attacker. Nothing is drawn at random. Step 1 finds the best value on
    the grid; step 2 finds values that no single change on the grid improves, if the rounds suffice,
    which need not be the best ones.

    Args:
        model: as in :func:`influence`; it need not be differentiable.
        x: floating-point signals [B, C, T], images [B, C, H, W] or volumes [B, C, D, H, W], within
            ``bounds``.
        y: integer labels [B], or None for the predicted class.
        map: scores [B, *spatial], or [B, C, *spatial], which are summed over the channels; larger
            is changed first; inf is allowed. With more than one scale, pick one: ``maps[:, s]``.
            [B, S, H, W] with S = C cannot be told from [B, C, H, W].
        pixels: how many pixels to change, at least 1. All channels of a pixel are changed.
        bounds: the least and the largest value, numbers or tensors [C], in the units of x: for
            normalised inputs ``((0 - mean) / std, (1 - mean) / std)``.
        steps: values on the grid, at least 2.
        sweeps: rounds of coordinate ascent, at least 0, which leaves the corners alone. One pixel
            with one channel takes one at most.
        outputs: as in :func:`influence`.
        batch_size: the most samples in one forward pass, at least 1; halved when memory runs out.
            Results depend on it only through the model's own rounding.

    Returns:
        :class:`OnePixel`, on x's device.

    Raises:
        InputError: x lies outside of ``bounds`` by more than a thousandth of their width, or has no
            spatial dimensions; map has another shape. OptionError: pixels, bounds, steps, sweeps,
            batch_size. NonFiniteError: also for NaN in map. And the other exceptions of
            :func:`influence` that do not concern gradients.

    Example:
        >>> maps = fastfi.influence_map(model, x, scales=(1,))[:, 0]  # x [B, C, H, W]
        >>> fastfi.attack.one_pixel(model, x, None, maps).success.double().mean()
    """
    q = Request.checked(model, x, y, outputs=outputs)
    if x.dim() not in (3, 4, 5):
        raise InputError(
            "x: expected signals [B, C, T], images [B, C, H, W] or volumes [B, C, D, H, W], got "
            f"shape {list(x.shape)}"
        )
    spatial = x.shape[2:]
    pixels = _check_integer(pixels, "pixels", 1, spatial.numel())
    steps = _check_integer(steps, "steps", 2)
    sweeps = _check_integer(sweeps, "sweeps", 0)
    batch_size = _check_integer(batch_size, "batch_size", 1)
    low, high = _check_bounds(bounds, q.x)
    scores = _check_map(map, q.x)

    plan = ChunkPlan(None, x, batch_size)
    z = _joined(len(x), plan, lambda part: forward(model, x[part], outputs))
    check_label_range(q.y, z.shape[1])
    before = z.argmax(1)
    label = before if q.y is None else q.y
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :pixels]

    search = _Search(q, chosen, label, _margin(z, label), plan)
    _climb(search, low, high, steps, sweeps)
    everyone = torch.arange(len(x), device=x.device)
    last = search.evaluate(everyone, search.values)
    after = last.argmax(1)

    def log_prob(logits: Tensor) -> Tensor:
        return logits.double().log_softmax(1).gather(1, label[:, None]).squeeze(1)

    return OnePixel(
        x=search.changed(everyone, search.values),
        success=(before == label) & (after != label),
        label=label.clone(),
        label_before=before,
        label_after=after,
        log_prob_before=log_prob(z),
        log_prob_after=log_prob(last),
        positions=torch.stack(torch.unravel_index(chosen, spatial), 2),
        values=search.values.transpose(1, 2).contiguous(),
        evaluations=search.evaluations,
    )
