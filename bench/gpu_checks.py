"""Every operator against float64 references on fresh random inputs, its outputs poisoned first.

Solves and windows are compared problem by problem, with the contract's bound or with what the
problem can resolve: a hundred times what the reference itself moves by when its input is off by one
rounding of float64. Where that is above the bound the problem is not well posed, and most must be.
Gram matrices are compared in the Frobenius norm and entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import gpu_layer_checks
from bench.gpu_compare import EPS64, Worst, call, gram_error, relative
from bench.gpu_problems import Solve, perturbed, solve_problem, window_rows
from bench.gpu_report import Run
from fastfi.backends import reference, reference_windows

__all__ = ["CHECKS", "check"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The contract's bounds, for two results each within it (docs/accuracy.md).
BOUNDS = {"exact": 2e-10, "truncated": 2e-8, "damped": 2e-8}
WELL_POSED = 0.5  # the share below which a comparison says nothing
# Three random perturbations come within this of the worst one, but for one problem in a million.
_PERTURBATIONS, _ROUNDINGS = 3, 100.0
_UNRESOLVED = 1e-2  # a problem of which nothing is left


def _solved(
    worst: Worst,
    case: str,
    bound: float,
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    moved: Sequence[Sequence[Tensor]],
) -> None:
    """Adds the worst error of FI over what is allowed for that problem, and any rank that differs.

    Args:
        moved: the reference's results for inputs that are off by one rounding.
    """
    fi, shape = want[0], want[0].shape
    most = torch.zeros_like(fi)
    same_rank = torch.ones_like(fi, dtype=torch.bool)
    for other in moved:
        most = torch.maximum(most, relative(other[0], fi))
        for r, s in zip(other[1:], want[1:], strict=True):
            same_rank &= (r == s) if r.shape == shape else True
    allowed = (_ROUNDINGS * most).clamp(min=bound)
    worst.pose(same_rank & (allowed == bound))
    resolved = same_rank & (allowed < _UNRESOLVED)
    if bool((~got[0].isfinite() & fi.isfinite()).any()) or bool((got[0] < 0).any()):
        worst.add(f"{case}: FI that is not finite, or negative", torch.inf, bound)
    error = torch.where(resolved, relative(got[0], fi), 0.0).flatten()
    if error.numel():
        at = int((error / allowed.flatten()).argmax())
        worst.add(case, float(error[at]), float(allowed.flatten()[at]))
    for r, s in zip(got[1:], want[1:], strict=True):
        wrong = (r != s) & (resolved if r.shape == shape else True)
        if r.shape != s.shape or bool(wrong.any()):
            worst.add(f"{case}: ranks differ", torch.inf, bound)


GRAM_SHAPES = [(1, 1, 1), (3, 1, 5), (2, 2, 1), (5, 9, 17), (3, 7, 1023), (64, 9, 3072),
               (2, 16, 4099), (3, 33, 257), (2, 99, 1025), (7, 9, 0), (1, 9, 150_528)]  # fmt: skip


def _gram(run: Run, worst: Worst, g: torch.Generator) -> None:
    for shape in GRAM_SHAPES[:6] if run.small else GRAM_SHAPES:
        # A kernel is compiled for each number of rows and type: all types for nine rows.
        for dtype in DTYPES if shape[1] == 9 else DTYPES[:2]:
            run.check_time()
            rows = torch.randn(shape, generator=g).to(dtype)
            for name, view in (
                ("", rows),
                (", strided", rows.transpose(0, 1).contiguous().transpose(0, 1)),
            ):
                want = rows.double() @ rows.double().mT
                bound = 2 * (shape[2] + 4) * EPS64
                (got,) = call("gram", run.device, view)
                gram_error(worst, f"{list(shape)} {dtype}{name}", got, want, bound)


def _segment_gram(run: Run, worst: Worst, g: torch.Generator) -> None:
    for batch, n, p, groups in [(3, 9, 301, 7), (2, 1, 64, 64), (2, 20, 97, 1), (4, 9, 3072, 196)]:
        for dtype in DTYPES if n == 9 else DTYPES[:1]:
            for shared in (False, True):
                rows = torch.randn(batch, n, p, generator=g).to(dtype)
                cuts = torch.randint(p + 1, (1 if shared else batch, groups + 1), generator=g)
                offsets = cuts.sort(1).values
                want = reference_windows.segment_gram(rows, offsets)
                (got,) = call("segment_gram", run.device, rows, offsets)
                case = f"{[batch, n, p]}, {groups} segments, {dtype}"
                gram_error(worst, case, got, want, 2 * (p + 4) * EPS64)


# K, p: compiled sizes, the general path, few and many columns; 11 classes are 10 x 10 problems.
SOLVES = [(2, 1), (3, 1), (3, 5), (5, 2), (9, 4), (10, 5), (10, 13), (11, 5), (11, 14), (16, 8),
          (17, 20), (20, 10), (33, 40), (34, 12), (64, 70), (100, 40), (100, 120)]  # fmt: skip


def _solve(rule: str) -> Callable[[Run, Worst, torch.Generator], None]:
    def run_all(run: Run, worst: Worst, g: torch.Generator) -> None:
        name, bound = f"solve_{rule}", BOUNDS[rule]
        function = getattr(reference, name)

        def arguments(q: Solve) -> tuple[Any, ...]:
            last = {"exact": 1e-9, "truncated": 1e-3, "damped": q.tau}[rule]
            return q.gram, q.log_prob, q.label, q.grad, last

        def referred(q: Solve) -> tuple[Tensor, ...]:
            out = function(*arguments(q))
            return (out,) if isinstance(out, Tensor) else out

        for classes, width in SOLVES[:9] if run.small else SOLVES:
            for form in ("label", "grad", "raw"):
                batch = (37 if run.small else 1031) if classes < 20 else 19
                q = solve_problem(batch, classes, width, form, 3.0, g)
                more = (perturbed(q.gram, g, True) for _ in range(_PERTURBATIONS))
                moved = [referred(q._replace(gram=gram)) for gram in more]
                got = call(name, run.device, *arguments(q))
                case = f"K = {classes}, p = {width}, {form}, B = {batch}"
                _solved(worst, case, bound, got, referred(q), moved)
                run.check_time()
        # Blocks: [B, L, n, n], one label for all of a sample's.
        q = solve_problem(30, 10, 12, "label", 3.0, g)
        stacked = q.gram.view(5, 6, 9, 9)
        q = Solve(stacked, q.log_prob[:5], q.label[:5], None, q.tau[:5])  # type: ignore[index]
        more = (perturbed(stacked, g, True) for _ in range(_PERTURBATIONS))
        moved = [referred(q._replace(gram=gram)) for gram in more]
        got = call(name, run.device, *arguments(q))
        _solved(worst, "six blocks a sample", bound, got, referred(q), moved)

    return run_all


# [B, C, *spatial], scales.
IMAGES = [
    ((2, 3, 9, 11), (1, 3, 5, 7)),
    ((3, 1, 37), (3, 1, 9)),
    ((1, 2, 5, 4, 6), (1, 3)),
    ((2, 1, 1, 1), (1, 5)),
    ((1, 3, 32, 32), (1, 3, 5, 7)),
    ((1, 1, 70, 65), (7, 3)),
]


def _windows(run: Run, worst: Worst, g: torch.Generator) -> None:
    plans = [(0, 10, "label", torch.float32), (0, 3, "grad", torch.float64),
             (0, 11, "raw", torch.bfloat16), (1, 10, "label", torch.float32),
             (2, 5, "raw", torch.float32), (3, 4, "label", torch.float64),
             (4, 10, "label", torch.float32), (0, 20, "label", torch.float32),
             (5, 10, "grad", torch.float16)]  # fmt: skip
    for number, classes, form, dtype in plans[:4] if run.small else plans:
        shape, scales = IMAGES[number]
        for channels in ("separate", "joint", "mean") if number < 4 else ("separate",):
            for rule, parameter in (("exact", 1e-6), ("truncated", 1e-3), ("damped", 0.0)):
                rows, q = window_rows(shape, classes, form, dtype, g)
                tau = q.tau if rule == "damped" else None
                rest = (q.log_prob, q.label, q.grad, scales, channels, rule, parameter, tau, True)
                want = reference_windows.window_influence(rows, *rest)
                wide = rows.double()
                moved = [
                    reference_windows.window_influence(perturbed(wide, g, False), *rest)
                    for _ in range(_PERTURBATIONS)
                ]
                got = call("window_influence", run.device, rows, *rest)
                case = f"{list(shape)}, K = {classes}, {form}, {dtype}, {channels}, {rule}"
                _solved(worst, case, BOUNDS[rule], got, want, moved)
                run.check_time()


CHECKS: dict[str, Callable[[Run, Worst, torch.Generator], None]] = {
    "gram": _gram,
    "solve_exact": _solve("exact"),
    "solve_truncated": _solve("truncated"),
    "solve_damped": _solve("damped"),
    "window_influence": _windows,
    "channel_sums": gpu_layer_checks.channel_sums,
    "segment_gram": _segment_gram,
    "conv_gram": gpu_layer_checks.conv_gram,
    "linear_gram": gpu_layer_checks.linear_gram,
}


def check(run: Run) -> None:
    """One row for each operator (of the share that is wanted): its worst error over what was
    allowed there."""
    run.note("checks", {})
    share = run.options.get("share") or CHECKS
    for number, (op, cases) in enumerate(CHECKS.items()):
        if op not in share:
            continue
        with run.guard(op):
            run.note("checks", {op: False})  # until it has passed
            g = torch.Generator().manual_seed(run.seed + number)
            worst = Worst()
            cases(run, worst, g)
            if worst.problems and worst.posed < WELL_POSED * worst.problems:
                raise AssertionError(
                    f"{op}: expected at least {WELL_POSED:.0%} well-posed problems, got "
                    f"{worst.posed} of {worst.problems}: the check says nothing"
                )
            right = worst.share <= 1.0
            posed = f", {worst.posed} of {worst.problems} well posed" if worst.problems else ""
            note = f"{worst.cases} comparisons{posed}; worst: {worst.case}"
            run.add(f"check {op}", worst.error, yardstick=worst.bound, against="allowed",
                    fraction=worst.share, target="<= 1 x allowed", met=right, main=True,
                    note=note)  # fmt: skip
            if not right:
                raise AssertionError(
                    f"{op}: expected an error of at most {worst.bound:.1e}, got {worst.error:.1e} "
                    f"({worst.case})"
                )
            run.note("checks", {op: True})
