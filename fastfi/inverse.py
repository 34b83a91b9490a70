"""The three inverses of the metric tensor: Exact, Truncated, Damped."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfi.errors import OptionError

__all__ = [
    "Damped",
    "Exact",
    "Inverse",
    "Truncated",
    "as_inverse",
    "damping",
    "default_rtol",
    "metric_trace",
    "solve",
]


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def default_rtol(eps: float, classes: int) -> float:
    """The default of :class:`Exact` for rows of this machine epsilon."""
    return min(max(classes, 32) * eps, math.sqrt(eps))


def _positive(name: str, value: float) -> None:
    if not (_is_real(value) and math.isfinite(value) and value > 0):
        raise OptionError(f"{name}: expected a finite number above 0, got {value!r}")


@dataclass(frozen=True)
class Exact:
    """The definition, ``FI = h^T G^+ h`` (Shu and Zhu 2019, equation 6).

    Args:
        rtol: relative length under which a contrast row counts as dependent on the others, below
            1; ``None`` means max(K, 32) times the machine epsilon of the precision in which the
            rows were computed, and at most that epsilon's square root. (Rows of deep networks err
            by 2 to 20 epsilons, measured to 30 layers, whatever K is.)
            The Gram matrix is held in float64, so values below ``sqrt(8 K eps64)``, 1.3e-7 for ten
            classes, act as that.

    Raises:
        OptionError: ``rtol`` is negative or not finite.
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not (_is_real(self.rtol) and 0 <= self.rtol < 1):
            raise OptionError(f"Exact: expected 0 <= rtol < 1 or None, got {self.rtol!r}")


@dataclass(frozen=True)
class Truncated:
    """The rule of Shu and Zhu's published scripts, with which their tables and figures were made.

    ``L0_k = dP_k / (sqrt(P_k) + eps)``, ``h = -dP_y / (P_y + eps)``, and singular values of L0 up
    to ``eps`` are dropped. The cut is absolute: it depends on the pixels' scale (theirs: 0..255).

    Args:
        eps: above 0.

    Raises:
        OptionError: ``eps`` is not a finite number above 0.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _positive("Truncated eps", self.eps)


@dataclass(frozen=True)
class Damped:
    """``FI_tau = h^T (G + tau I)^-1 h`` with ``tau = alpha * trace(G_ref)``.

    G_ref is the metric of the whole input for the input, its windows and its regions; of all
    trainable parameters for them and for layers or other blocks of them; of both for ``wrt="all"``.
    So rescaling all of it changes nothing, and a sample's windows, or its layers, have one tau.

    Args:
        alpha: above 0. The relative rounding error grows as 1e-16 / alpha.

    Raises:
        OptionError: ``alpha`` is not a finite number above 0.
    """

    alpha: float = 1e-2

    def __post_init__(self) -> None:
        _positive("Damped alpha", self.alpha)


Inverse = Exact | Truncated | Damped

_NAMES: dict[str, type[Exact] | type[Truncated] | type[Damped]] = {
    "exact": Exact,
    "truncated": Truncated,
    "damped": Damped,
}


def as_inverse(inverse: Inverse | str) -> Inverse:
    """The inverse of that name, or the one given; OptionError for anything else."""
    if isinstance(inverse, (Exact, Truncated, Damped)):
        return inverse
    if isinstance(inverse, str) and inverse in _NAMES:
        return _NAMES[inverse]()
    raise OptionError(
        "inverse: expected 'exact', 'truncated', 'damped' or an instance of fastfi.Exact, "
        f"fastfi.Truncated, fastfi.Damped, got {inverse!r}"
    )


def metric_trace(gram: Tensor, log_prob: Tensor) -> Tensor:
    """trace G = E |D|^2 - |E D|^2 over the classes, with D_t = 0: [B].

    The difference loses at most a factor K, because t is the most probable class.

    Args:
        gram: N [B, R, R] float64 of the contrasts alone.
        log_prob: [B, K] float64, K = R + 1.
    """
    p = log_prob[:, 1:].exp()  # [B, R]
    mean = (gram @ p[:, :, None]).squeeze(2)  # [B, R]
    spread = gram.diagonal(dim1=1, dim2=2) - mean
    return (p * spread).sum(1).clamp(min=0.0)


def damping(inverse: Damped, gram: Tensor, log_prob: Tensor) -> Tensor:
    """tau [B], relative to the metric whose Gram matrix [B, n, n] (contrasts first) is given."""
    r = log_prob.shape[1] - 1
    return inverse.alpha * metric_trace(gram[:, :r, :r], log_prob)


def solve(
    inverse: Inverse,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    rtol: float,
    tau: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs the operator of one inverse: FI [B, *blocks], and rank [B, *blocks] or None.

    Args:
        gram: [B, *blocks, n, n].
        rtol: the default of :class:`Exact`, used where it names none.
        tau: [B], the damping of :class:`Damped`; None takes each sample's from its only block.
        others: as the operators of :mod:`fastfi._ops`.
    """
    if isinstance(inverse, Exact):
        rtol = rtol if inverse.rtol is None else inverse.rtol
        fi, rank = torch.ops.fastfi.solve_exact(gram, log_prob, label, grad, rtol)
        return fi, rank
    if isinstance(inverse, Truncated):
        fi, rank = torch.ops.fastfi.solve_truncated(gram, log_prob, label, grad, inverse.eps)
        return fi, rank
    if tau is None:
        tau = damping(inverse, gram, log_prob)
    fi = torch.ops.fastfi.solve_damped(gram, log_prob, label, grad, tau)
    if label is not None:
        # Beside a gradient, tau vanishes only where every other class's P underflows, and 1 / P_y
        # with it.
        own = (label - 1).clamp(min=0).view(-1, *[1] * (gram.dim() - 2))
        length = gram.diagonal(dim1=-2, dim2=-1).gather(-1, own.expand(*gram.shape[:-2], 1))[..., 0]
        unbounded = ((tau == 0) & (label > 0)).view(-1, *[1] * (gram.dim() - 3)) & (length > 0)
        fi = torch.where(unbounded, torch.inf, fi)
    return fi, None
