"""Operator schemas, their argument checks and their fake kernels. No kernel lives here.

All operators work on one convention. A sample has ``K`` classes, ordered so that class 0 is
the reference ``t`` (the most probable one); row ``r`` of a Gram matrix belongs to class ``r + 1``
and holds the contrast ``D_r = d(z_{r+1} - z_0) / d omega``. A solve takes the objective in one of
three forms:

* ``label`` (int64, a position in that order), ``grad=None``: cross-entropy, ``f = -log P_label``;
* ``grad = df/dz`` [B, K] with zero sum, ``label=None``: ``h = sum_k grad_k dl_k``;
* neither, and ``gram`` with one row more than contrasts (n = K): the last row is ``h`` itself.

``window_influence`` takes the rows themselves, [B, n, C, *spatial], and solves one problem for each
window of pixels. The windows of a scale k are the k x k squares (intervals, cubes) around each
pixel, clipped at the border, of each colour channel (``"separate"``), or of all channels together
(``"joint"``); ``"mean"`` averages the separate FI over the channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfi.convolution import Geometry

__all__ = [
    "CHANNELS",
    "INVERSES",
    "OP_NAMES",
    "check_channel_sums",
    "check_conv_gram",
    "check_gram",
]
__all__ += ["check_linear_gram", "check_scales", "check_segments", "check_solve", "check_windows"]

OP_NAMES = (
    "gram",
    "segment_gram",
    "solve_exact",
    "solve_truncated",
    "solve_damped",
    "window_influence",
    "linear_gram",
    "conv_gram",
    "channel_sums",
)
CHANNELS = ("separate", "joint", "mean")
INVERSES = ("exact", "truncated", "damped")

_SOLVE = "Tensor gram, Tensor log_prob, Tensor? label, Tensor? grad"

torch.library.define("fastfi::gram", "(Tensor rows) -> Tensor")
torch.library.define("fastfi::segment_gram", "(Tensor rows, Tensor offsets) -> Tensor")
torch.library.define("fastfi::solve_exact", f"({_SOLVE}, float rtol) -> (Tensor, Tensor)")
torch.library.define("fastfi::solve_truncated", f"({_SOLVE}, float eps) -> (Tensor, Tensor)")
torch.library.define("fastfi::solve_damped", f"({_SOLVE}, Tensor tau) -> Tensor")

torch.library.define(
    "fastfi::window_influence",
    "(Tensor rows, Tensor log_prob, Tensor? label, Tensor? grad, int[] scales, str channels, "
    "str inverse, float parameter, Tensor? tau, bool with_rank) -> (Tensor, Tensor)",
)
torch.library.define("fastfi::linear_gram", "(Tensor a, Tensor[] d, bool ghost) -> Tensor")
torch.library.define(
    "fastfi::conv_gram",
    "(Tensor x, Tensor[] d, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool ghost) -> Tensor",
)
torch.library.define("fastfi::channel_sums", "(Tensor[] d, Tensor[] factor) -> Tensor")

_ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_gram(rows: Tensor) -> None:
    """Raises ValueError unless ``rows`` is a floating-point tensor [B, R, p]."""
    if rows.dim() != 3:
        raise ValueError(f"gram: expected rows [B, R, p], got shape {list(rows.shape)}")
    if rows.dtype not in _ROW_DTYPES:
        raise ValueError(f"gram: expected float16, bfloat16, float32 or float64, got {rows.dtype}")


def check_segments(rows: Tensor, offsets: Tensor) -> None:
    """Raises ValueError unless ``rows`` is [B, R, p] and ``offsets`` int64 [B or 1, G + 1]. (Their
    values, from 0 to p and not decreasing, are the caller's business.)"""
    check_gram(rows)
    ok = offsets.dim() == 2 and offsets.dtype == torch.int64 and offsets.shape[1] >= 1
    ok = ok and offsets.shape[0] in (1, rows.shape[0]) and offsets.device == rows.device
    expected = f"int64 [{rows.shape[0]} or 1, G + 1] on {rows.device}"
    _check(ok, "segment_gram", expected, "offsets", offsets)


def check_scales(scales: Sequence[int]) -> None:
    """Raises ValueError unless ``scales`` are distinct odd numbers of pixels."""
    odd = all(s >= 1 and s % 2 == 1 for s in scales)
    if not odd or len(scales) == 0 or len(set(scales)) < len(scales):
        raise ValueError(f"scales: expected distinct odd numbers of pixels, got {list(scales)}")


def _check(condition: bool, op: str, expected: str, name: str, t: Tensor | None) -> None:
    if not condition:
        came = "None" if t is None else f"{t.dtype} {list(t.shape)} on {t.device}"
        raise ValueError(f"{op}: expected {name} {expected}, got {came}")


def check_solve(
    op: str,
    gram: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    tau: Tensor | None = None,
) -> None:
    """Raises ValueError, naming the argument, unless the arguments of a solve fit together."""
    f64 = torch.float64
    ok = log_prob.dim() == 2 and log_prob.dtype == f64 and log_prob.shape[1] >= 2
    _check(ok, op, "float64 [B, K] with K >= 2", "log_prob", log_prob)
    batch, classes = log_prob.shape
    if label is not None and grad is not None:
        raise ValueError(f"{op}: expected label or grad, got both")
    n = classes - 1 if label is not None or grad is not None else classes
    ok = gram.dim() >= 3 and gram.dtype == f64 and gram.shape[0] == batch
    ok = ok and gram.shape[-1] == n and gram.shape[-2] == n
    _check(ok, op, f"float64 [{batch}, ..., {n}, {n}]", "gram", gram)
    if label is not None:
        ok = label.dtype == torch.int64 and label.shape == (batch,)
        _check(ok, op, f"int64 [{batch}]", "label", label)
    if grad is not None:
        ok = grad.dtype == f64 and grad.shape == (batch, classes)
        _check(ok, op, f"float64 [{batch}, {classes}]", "grad", grad)
    if tau is not None:
        _check(tau.dtype == f64 and tau.shape == (batch,), op, f"float64 [{batch}]", "tau", tau)
    for name, t in (("log_prob", log_prob), ("label", label), ("grad", grad), ("tau", tau)):
        _check(t is None or t.device == gram.device, op, f"on {gram.device}", name, t)


def check_windows(
    rows: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    scales: Sequence[int],
    channels: str,
    inverse: str,
    tau: Tensor | None,
) -> None:
    """Raises ValueError, naming the argument, unless those of ``window_influence`` fit together."""
    op = "window_influence"
    if rows.dim() not in (4, 5, 6) or rows.dtype not in _ROW_DTYPES:
        raise ValueError(
            f"{op}: expected floating-point rows [B, n, C, *spatial] with 1 to 3 spatial "
            f"dimensions, got {rows.dtype} {list(rows.shape)}"
        )
    check_scales(scales)
    for name, value, known in (("channels", channels, CHANNELS), ("inverse", inverse, INVERSES)):
        if value not in known:
            raise ValueError(f"{op}: expected {name} to be one of {known}, got {value!r}")
    if (tau is None) == (inverse == "damped"):
        raise ValueError(f"{op}: expected tau with 'damped' alone, got {inverse!r} and {tau}")
    batch, n = rows.shape[:2]
    # The solves' own checks, on a Gram matrix that takes no memory.
    gram = rows.new_empty((), dtype=torch.float64).expand(batch, n, n)
    check_solve(op, gram, log_prob, label, grad, tau)


def _check_rows(op: str, expected: str, d: Sequence[Tensor], shape: Sequence[int | None]) -> None:
    """Raises ValueError unless all of ``d`` are alike and of that shape (None: any size)."""
    if len(d) == 0:
        raise ValueError(f"{op}: expected d of at least one row, got none")
    for t in d:
        ok = t.dim() == len(shape) and t.dtype in _ROW_DTYPES
        ok = ok and all(want in (None, size) for want, size in zip(shape, t.shape, strict=True))
        ok = ok and t.shape == d[0].shape and t.dtype == d[0].dtype and t.device == d[0].device
        _check(ok, op, expected, "each of d", t)


def check_linear_gram(a: Tensor, d: Sequence[Tensor]) -> None:
    """Raises ValueError unless inputs ``a`` are [B, T, D] and the rows' cotangents [B, T, O]."""
    ok = a.dim() == 3 and a.dtype in _ROW_DTYPES
    _check(ok, "linear_gram", "floating-point [B, T, D]", "a", a)
    expected = f"floating-point [{a.shape[0]}, {a.shape[1]}, O] on {a.device}"
    _check_rows("linear_gram", expected, d, (a.shape[0], a.shape[1], None))
    _check(d[0].device == a.device, "linear_gram", expected, "each of d", d[0])


def check_conv_gram(
    x: Tensor,
    d: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raises ValueError unless x [B, C, *spatial] and each of d [B, O, *positions] are input and
    output of a convolution of that geometry."""
    op, dims = "conv_gram", len(kernel)
    ok = dims in (1, 2, 3) and x.dim() == dims + 2 and x.dtype in _ROW_DTYPES
    _check(ok, op, "floating-point [B, C, *spatial], one dimension for each of kernel", "x", x)
    numbers = (*kernel, *stride, *dilation, groups)
    sizes = {len(stride), len(padding), len(dilation)}
    if sizes != {dims} or min(numbers) < 1 or min(padding) < 0 or x.shape[1] % groups:
        raise ValueError(
            f"{op}: expected {dims} positive numbers each and groups that divide {x.shape[1]} "
            f"channels, got kernel {list(kernel)}, stride {list(stride)}, padding {list(padding)}, "
            f"dilation {list(dilation)}, groups {groups}"
        )
    g = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    positions = g.positions(x.shape[2:])
    expected = f"floating-point [{x.shape[0]}, O, {str(positions)[1:-1]}] on {x.device}"
    _check_rows(op, expected, d, (x.shape[0], None, *positions))
    ok = d[0].device == x.device and d[0].shape[1] % groups == 0
    _check(ok, op, f"{expected}, O divided by {groups} groups", "each of d", d[0])


def check_channel_sums(d: Sequence[Tensor], factor: Sequence[Tensor]) -> None:
    """Raises ValueError unless both are as many tensors [B, C, T], of one dtype, pair by pair of
    one shape."""
    if len(d) == 0 or len(d) != len(factor):
        raise ValueError(
            f"channel_sums: expected as many of d as factors, and one at least, got {len(d)} and "
            f"{len(factor)}"
        )
    first = d[0]
    ok = first.dim() == 3 and first.dtype in (torch.float32, torch.float64)
    _check(ok, "channel_sums", "float32 or float64 [B, C, T]", "d", first)
    for t, f in zip(d, factor, strict=True):
        ok = t.dim() == 3 and len(t) == len(first)
        ok = ok and t.dtype == first.dtype and t.device == first.device
        expected = f"{first.dtype} [{len(first)}, C, T] on {first.device}"
        _check(ok, "channel_sums", expected, "each of d", t)
        ok = f.shape == t.shape and f.dtype == t.dtype and f.device == t.device
        expected = f"{t.dtype} {list(t.shape)} on {t.device}"
        _check(ok, "channel_sums", expected, "its factor", f)


@torch.library.register_fake("fastfi::gram")
def _(rows: Tensor) -> Tensor:
    check_gram(rows)
    return rows.new_empty((rows.shape[0], rows.shape[1], rows.shape[1]), dtype=torch.float64)


@torch.library.register_fake("fastfi::segment_gram")
def _(rows: Tensor, offsets: Tensor) -> Tensor:
    check_segments(rows, offsets)
    batch, n, _ = rows.shape
    return rows.new_empty((batch, offsets.shape[1] - 1, n, n), dtype=torch.float64)


def _fake_pair(gram: Tensor) -> tuple[Tensor, Tensor]:
    shape = gram.shape[:-2]
    return gram.new_empty(shape), gram.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("fastfi::solve_exact")
def _(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, rtol: float
) -> tuple[Tensor, Tensor]:
    check_solve("solve_exact", gram, log_prob, label, grad)
    return _fake_pair(gram)


@torch.library.register_fake("fastfi::solve_truncated")
def _(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    check_solve("solve_truncated", gram, log_prob, label, grad)
    return _fake_pair(gram)


@torch.library.register_fake("fastfi::solve_damped")
def _(
    gram: Tensor, log_prob: Tensor, label: Tensor | None, grad: Tensor | None, tau: Tensor
) -> Tensor:
    check_solve("solve_damped", gram, log_prob, label, grad, tau)
    return gram.new_empty(gram.shape[:-2])


@torch.library.register_fake("fastfi::window_influence")
def _(
    rows: Tensor,
    log_prob: Tensor,
    label: Tensor | None,
    grad: Tensor | None,
    scales: Sequence[int],
    channels: str,
    inverse: str,
    parameter: float,
    tau: Tensor | None,
    with_rank: bool,
) -> tuple[Tensor, Tensor]:
    check_windows(rows, log_prob, label, grad, scales, channels, inverse, tau)
    batch, _, colours, *spatial = rows.shape
    separate = (batch, len(scales), colours, *spatial)
    merged = (batch, len(scales), *spatial)
    fi = rows.new_empty(separate if channels == "separate" else merged, dtype=torch.float64)
    if not with_rank or inverse == "damped":
        return fi, rows.new_empty(0, dtype=torch.int64)
    shape = merged if channels == "joint" else separate
    return fi, rows.new_empty(shape, dtype=torch.int64)


def _fake_layer_gram(d: Sequence[Tensor]) -> Tensor:
    return d[0].new_empty((d[0].shape[0], len(d), len(d)), dtype=torch.float64)


@torch.library.register_fake("fastfi::linear_gram")
def _(a: Tensor, d: Sequence[Tensor], ghost: bool) -> Tensor:
    check_linear_gram(a, d)
    return _fake_layer_gram(d)


@torch.library.register_fake("fastfi::conv_gram")
def _(
    x: Tensor,
    d: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    ghost: bool,
) -> Tensor:
    check_conv_gram(x, d, kernel, stride, padding, dilation, groups)
    return _fake_layer_gram(d)


@torch.library.register_fake("fastfi::channel_sums")
def _(d: Sequence[Tensor], factor: Sequence[Tensor]) -> Tensor:
    check_channel_sums(d, factor)
    return d[0].new_empty((d[0].shape[0], 2 * sum(t.shape[1] for t in d)))
