"""Images larger than the parts in which the kernels compute them, and numbers near the ends of
float64's range."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from windows import Layout, random_arguments

from fastfi.backends import reference_windows

RULES = ("exact", "truncated", "damped")
# Both implementations are within the contract of the truth.
TOLERANCE = {"exact": 2e-10, "truncated": 2e-8, "damped": 2e-8}

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernels take 8 lines at a time and at most 128 columns; 16 columns where many classes leave no
# room for more, so that scale 41 reaches beyond a neighbouring part.
LAYOUTS = {
    "high": (Layout((19, 3), 1, (1, 5, 41), "separate"), 4),
    "wide": (Layout((2, 290), 1, (3, 1), "separate"), 3),
    "wide, joint": (Layout((150,), 2, (1, 7), "joint"), 4),
    "wide windows": (Layout((1, 140), 1, (41, 3), "separate"), 3),
    "deep": (Layout((9, 9, 2), 1, (1, 3), "separate"), 3),
    "many classes": (Layout((2, 50), 1, (3, 11), "separate"), 36),
    "many classes, joint": (Layout((10, 18), 2, (1, 3), "joint"), 18),
}


@cache
def problem(name: str, mode: str, rule: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    layout, classes = LAYOUTS[name]
    args = random_arguments(1, layout, classes, mode, rule, batch=1, dtype=torch.float32)
    return args, reference_windows.window_influence(*args)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_large_images(window_kernels: Any, poisoned: None, name: str, rule: str) -> None:
    for mode in ("label", "raw"):
        args, want = problem(name, mode, rule)
        fi, rank = window_kernels.window_influence(*args)
        # 1e-20: h orthogonal to the contrasts is 0 but for the square of a rounding
        torch.testing.assert_close(fi, want[0], rtol=TOLERANCE[rule], atol=1e-20)
        assert torch.equal(rank, want[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_crop_far_from_its_border(window_kernels: Any, rule: str) -> None:
    """Windows that lie inside a crop are those of the image."""
    layout = Layout((24, 150), 1, (3, 5), "separate")
    args = random_arguments(2, layout, 4, "label", rule, batch=1)
    fi, _ = window_kernels.window_influence(*args)
    crop = args[0][..., 5:20, 120:145]
    part, _ = window_kernels.window_influence(crop, *args[1:])
    torch.testing.assert_close(
        part[..., 2:-2, 2:-2], fi[..., 7:18, 122:143], rtol=TOLERANCE[rule], atol=0.0
    )


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("length", [1.0, 1e-8, 1e-60, 1e-120])
def test_exact_of_two_classes_is_the_odds(window_ops: Any, scale: int, length: float) -> None:
    """FI = (1 - P_y) / P_y wherever class 1 moves at all: 1e-12 for any spread (the contract), and
    whatever the unit of the pixels."""
    rows = torch.zeros(3, 1, 1, 2, 4, dtype=torch.float64)
    rows[..., 1:] = length * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    odds = torch.tensor([-1.0, -100.0, -700.0], dtype=torch.float64)  # log P_1 / P_0
    log_prob = torch.stack([torch.zeros(3).double(), odds], 1).log_softmax(1)
    for y, want in [(1, (-odds).exp()), (0, odds.exp())]:
        label = torch.full((3,), y)
        fi, rank = window_ops.window_influence(
            rows, log_prob, label, None, [scale], "separate", "exact", 0.0, None, True
        )
        first = 1 if scale == 1 else 0
        got = fi[:, 0, 0, :, first:]
        torch.testing.assert_close(got, want[:, None, None].expand_as(got), rtol=1e-12, atol=0.0)
        assert bool((rank[..., first:] == 1).all())
        assert bool((fi[..., :first] == 0).all()) and bool((rank[..., :first] == 0).all())


@pytest.mark.parametrize("power", [-490, -200, 200, 490])
@pytest.mark.parametrize("mode", ["label", "grad", "raw"])
def test_confident_samples_in_any_unit(window_ops: Any, mode: str, power: int) -> None:
    """The exact rule is invariant under x -> c x, which scales all rows, an own one too. Logits of
    standard deviation 60, and the least likely class as label."""
    layout = Layout((3, 4), 1, (1, 3), "separate")
    args = random_arguments(3, layout, 6, mode, "exact")
    logits = 60 * torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    log_prob = logits.sort(1, descending=True).values.log_softmax(1)
    assert -250 < float(log_prob.min()) < -100
    args = (*args[:2], None if args[2] is None else torch.tensor([5, 5]), *args[3:])
    want = reference_windows.window_influence(args[0], log_prob, *args[2:])
    rows = torch.ldexp(args[0], torch.tensor(power))
    got = window_ops.window_influence(rows, log_prob, *args[2:])
    # powers of two round nothing; both are within 1e-10 of the truth
    torch.testing.assert_close(got[0], want[0], rtol=2e-10, atol=0.0)
    assert torch.equal(got[1], want[1])
