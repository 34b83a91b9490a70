"""Every operator once on small shapes with tails, and whether the values are right.

    python -m bench.gpu_small [--device cuda] [--seed N]

Made to be run under a checker of memory accesses or races, which slows kernels down a hundredfold.
Ends with status 1 if a value is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.gpu_layer_checks import CONVOLUTIONS
from bench.gpu_problems import layer_inputs, solve_problem, window_rows
from fastfi.backends import blas, reference, reference_windows

__all__ = ["main"]

ops = torch.ops.fastfi

Result = tuple[str, Sequence[Tensor], Sequence[Tensor], float]


def _rows(device: str, g: torch.Generator) -> Iterator[Result]:
    for shape, dtype in [((3, 9, 67), torch.float32), ((2, 17, 33), torch.bfloat16),
                         ((1, 33, 130), torch.float64), ((2, 3, 2051), torch.float32),
                         ((1, 1, 1), torch.float16)]:  # fmt: skip
        rows = torch.randn(shape, generator=g).to(dtype)
        yield f"gram {shape}", [ops.gram(rows.to(device))], [reference.gram(rows)], 1e-10
        cuts = torch.randint(shape[2] + 1, (shape[0], 5), generator=g).sort(1).values
        got = ops.segment_gram(rows.to(device), cuts.to(device))
        yield f"segments {shape}", [got], [reference_windows.segment_gram(rows, cuts)], 1e-10


def _solves(device: str, g: torch.Generator) -> Iterator[Result]:
    for classes, width, form in [(2, 1, "label"), (10, 13, "label"), (10, 5, "grad"),
                                 (11, 5, "raw"), (17, 20, "label"), (34, 12, "label")]:  # fmt: skip
        q = solve_problem(35, classes, width, form, 2.0, g)
        here = [q.gram, q.log_prob, q.label, q.grad]
        there = [None if t is None else t.to(device) for t in here]
        name = f"K = {classes}, p = {width}, {form}"
        yield (f"exact {name}", ops.solve_exact(*there, 1e-9)[1:],
               reference.solve_exact(*here, 1e-9)[1:], 0.0)  # fmt: skip
        yield (f"truncated {name}", ops.solve_truncated(*there, 1e-3)[1:],
               reference.solve_truncated(*here, 1e-3)[1:], 0.0)  # fmt: skip
        got = ops.solve_damped(*there, q.tau.to(device))
        yield f"damped {name}", [got], [reference.solve_damped(*here, q.tau)], 1e-7


def _windows(device: str, g: torch.Generator) -> Iterator[Result]:
    for shape, scales in [((2, 3, 5, 9), (1, 3)), ((1, 1, 19), (5, 1)), ((1, 2, 3, 4, 3), (3,)),
                          ((1, 1, 35, 34), (7, 1, 3))]:  # fmt: skip
        rows, q = window_rows(shape, 10, "label", torch.float32, g)
        for channels in ("separate", "joint", "mean"):
            for rule, parameter in (("damped", 0.0), ("exact", 1e-6), ("truncated", 1e-3)):
                tau = q.tau if rule == "damped" else None
                got = ops.window_influence(
                    rows.to(device), q.log_prob.to(device), q.label.to(device), None, scales,  # type: ignore[union-attr]
                    channels, rule, parameter, None if tau is None else tau.to(device), True,
                )  # fmt: skip
                want = reference_windows.window_influence(
                    rows, q.log_prob, q.label, None, scales, channels, rule, parameter, tau, True
                )
                name = f"windows {shape}, {channels}, {rule}"
                if rule == "damped":
                    yield name, got[:1], want[:1], 1e-7
                else:  # FI of a window whose rows are almost dependent may be anything
                    yield name, got[1:], want[1:], 0.0


def _layers(device: str, g: torch.Generator) -> Iterator[Result]:
    for shape in CONVOLUTIONS[:10]:
        for n, dtype in ((9, torch.float32), (2, torch.bfloat16)):
            x, d = layer_inputs(shape, 2, n, dtype, g)
            want = blas.conv_gram(x.double(), [t.double() for t in d], *shape.form, False)
            for ghost in (True, False):
                there = [t.to(device) for t in d]
                got = ops.conv_gram(x.to(device), there, *shape.form, ghost)
                yield f"conv {shape.title()}, ghost {ghost}", [got], [want], 1e-3
    for positions, inputs, outputs in [(1, 7, 5), (19, 33, 17), (65, 6, 70)]:
        a = torch.randn(2, positions, inputs, generator=g)
        d = [torch.randn(2, positions, outputs, generator=g) for _ in range(9)]
        want = blas.linear_gram(a.double(), [t.double() for t in d], False)
        for ghost in (True, False):
            got = ops.linear_gram(a.to(device), [t.to(device) for t in d], ghost)
            yield f"linear {positions, inputs, outputs}, ghost {ghost}", [got], [want], 1e-3
    pairs = [
        [torch.randn(3, c, t, generator=g) for c, t in [(5, 3), (1, 33), (33, 1)]] for _ in (0, 1)
    ]
    got = ops.channel_sums(*[[t.to(device) for t in side] for side in pairs])
    yield "channel_sums", [got], [blas.channel_sums(*pairs)], 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """The number of wrong results, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    g = torch.Generator().manual_seed(options.seed)
    wrong = count = 0
    for part in (_rows, _solves, _windows, _layers):
        for name, got, want, bound in part(options.device, g):
            count += 1
            for a, b in zip(got, want, strict=True):
                a, b = a.cpu().double(), b.double()
                scale = float(b.abs().max()) if b.numel() else 0.0
                error = float((a - b).abs().max()) if b.numel() else 0.0
                # A window may be ill posed by chance: one rank in a hundred may differ.
                few = bound == 0 and float((a != b).double().mean()) <= 0.01
                if not (error <= bound * scale or few):
                    wrong += 1
                    print(f"WRONG  {name}: off by {error:.2e}, at most {bound * scale:.2e} allowed")
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} results, {wrong} wrong" if wrong else f"{count} results, all operators right")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
