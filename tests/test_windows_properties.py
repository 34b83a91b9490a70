"""What holds for the window kernels whatever the problem: they agree with the reference, and a
window's result depends on nothing but its own pixels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windows import Layout, random_arguments

from fastfi.backends import cpu, reference_windows

RULES = ("exact", "truncated", "damped")
MODES = ("label", "grad", "raw")
CHANNELS = ("separate", "joint", "mean")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Both implementations are within the contract of the truth.
TOLERANCE = {"exact": 2e-10, "truncated": 2e-8, "damped": 2e-8}

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_agree(rule: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Equal but for two roundings; FI of an h that is orthogonal to the contrasts is 0 but for the
    square of one."""
    torch.testing.assert_close(got[0], want[0], rtol=TOLERANCE[rule], atol=1e-20)
    assert torch.equal(got[1], want[1])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Images of 1 to 3 dimensions with at most 40 pixels."""
    size = st.integers(1, 9)
    spatial: tuple[int, ...] = draw(
        st.one_of(
            st.tuples(size),
            st.tuples(size, size),
            st.tuples(size, st.integers(1, 4), size),
        ).filter(lambda s: torch.Size(s).numel() <= 40)
    )
    scales = draw(st.lists(st.sampled_from([1, 3, 5, 7, 19]), min_size=1, max_size=4, unique=True))
    channels = draw(st.sampled_from(CHANNELS))
    return Layout(spatial, draw(st.integers(1, 3)), tuple(scales), channels)


@given(
    layout=layouts(),
    classes=st.integers(2, 12),
    mode=st.sampled_from(MODES),
    rule=st.sampled_from(RULES),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_kernels_equal_the_reference(
    layout: Layout, classes: int, mode: str, rule: str, batch: int, dtype: torch.dtype, seed: int
) -> None:
    args = random_arguments(seed, layout, classes, mode, rule, batch, dtype)
    want = reference_windows.window_influence(*args)
    assert_agree(rule, torch.ops.fastfi.window_influence(*args), want)
    for isa in cpu.instruction_sets():
        assert_agree(rule, cpu.window_influence(*args, isa=isa), want)


@cache
def many_classes(rule: str, mode: str, classes: int) -> list[tuple[Any, tuple[Tensor, Tensor]]]:
    out = []
    for channels in CHANNELS:
        layout = Layout((3, 3), 2, (1, 3, 5), channels)
        args = random_arguments(classes, layout, classes, mode, rule)
        out.append((args, reference_windows.window_influence(*args)))
    return out


# R = K - 1 on both sides of 15 and of 32, where kernels change their way.
@pytest.mark.parametrize("classes", [16, 17, 20, 33, 34, 40])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_more_classes(window_kernels: Any, rule: str, mode: str, classes: int) -> None:
    for args, want in many_classes(rule, mode, classes):
        assert_agree(rule, window_kernels.window_influence(*args), want)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_in_any_layout(window_ops: Any, rule: str, dtype: torch.dtype) -> None:
    layout = Layout((3, 4), 2, (1, 3), "separate")
    args = random_arguments(1, layout, 4, "label", rule, dtype=dtype)
    rows, want = args[0], window_ops.window_influence(*args)
    views = {
        "channels last": rows.movedim(2, -1).contiguous().movedim(-1, 2),
        "classes first": rows.transpose(0, 1).contiguous().transpose(0, 1),
        "every second pixel": torch.stack([rows, rows + 1], 5).flatten(4)[..., ::2],
        "a slice": torch.cat([rows, rows], 1)[:, :3],
    }
    for name, view in views.items():
        assert torch.equal(view, rows)
        assert not view.is_contiguous(), name
        got = window_ops.window_influence(view, *args[1:])
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), name
    strided = [torch.stack([a, a], 1)[:, 0] if isinstance(a, Tensor) else a for a in args[1:]]
    got = window_ops.window_influence(rows, *strided)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_do_not_meet(
    window_kernels: Any, rule: str, channels: str, dtype: torch.dtype
) -> None:
    """Bitwise the same alone, in a batch of 7, and at any place in it."""
    layout = Layout((5, 6), 2, (1, 3, 5), channels)
    args = random_arguments(2, layout, 10, "label", rule, batch=7)
    torch.manual_seed(2)
    args = (torch.randn(args[0].shape, dtype=torch.float64).to(dtype), *args[1:])
    fi, rank = window_kernels.window_influence(*args)
    for b in (0, 3, 6):
        part = [a[b : b + 1] if isinstance(a, Tensor) else a for a in args]
        alone, alone_rank = window_kernels.window_influence(*part)
        assert torch.equal(alone[0], fi[b])
        assert rule == "damped" or torch.equal(alone_rank[0], rank[b])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_threads_change_nothing(
    window_kernels: Any, rule: str, mode: str, threads_restored: None
) -> None:
    layout = Layout((7, 6), 2, (1, 3, 7), "separate")
    args = random_arguments(3, layout, 6, mode, rule, batch=3)
    args = (args[0] + 0.1 * torch.randn(args[0].shape, dtype=torch.float64), *args[1:])
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(window_kernels.window_influence(*args))
    for fi, rank in results[1:]:
        assert torch.equal(fi, results[0][0])
        assert torch.equal(rank, results[0][1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e6])
def test_pixels_outside_a_window_do_not_matter(
    window_kernels: Any, rule: str, joint: bool, size: float
) -> None:
    """Bitwise: a sum that slides over the image would carry its past along."""
    layout = Layout((6, 7), 2, (1, 3, 5), "joint" if joint else "separate")
    args = random_arguments(4, layout, 6, "label", rule, batch=1)
    torch.manual_seed(4)
    rows = torch.randn(args[0].shape, dtype=torch.float64)
    fi, _ = window_kernels.window_influence(rows, *args[1:])
    changed = rows.clone()
    changed[0, :, 1, 2, 3] = size  # one pixel of one channel
    got, _ = window_kernels.window_influence(changed, *args[1:])
    for s, scale in enumerate(layout.scales):
        holds = torch.zeros(6, 7, dtype=torch.bool)
        holds[max(0, 2 - scale // 2) : 3 + scale // 2, max(0, 3 - scale // 2) : 4 + scale // 2] = 1
        if joint:
            assert torch.equal(got[0, s][~holds], fi[0, s][~holds])
        else:
            assert torch.equal(got[0, s, 0], fi[0, s, 0])
            assert torch.equal(got[0, s, 1][~holds], fi[0, s, 1][~holds])
        now, before = (t[0, s] if joint else t[0, s, 1] for t in (got, fi))
        assert rule != "damped" or not bool((now[holds] == before[holds]).any())


@pytest.mark.parametrize("rule", RULES)
def test_a_window_of_everything_is_the_solve(window_ops: Any, rule: str) -> None:
    """Scale 13 at every pixel: the Gram matrix of the whole image."""
    for mode in MODES:
        layout = Layout((3, 4), 2, (13,), "joint")
        args = random_arguments(5, layout, 5, mode, rule)
        rows, log_prob, label, grad, _, _, _, parameter, tau, _ = args
        fi, rank = window_ops.window_influence(*args)
        gram = torch.ops.fastfi.gram(rows.flatten(2))
        if rule == "damped":
            want = torch.ops.fastfi.solve_damped(gram, log_prob, label, grad, tau)
        else:
            solve = getattr(torch.ops.fastfi, f"solve_{rule}")
            want, count = solve(gram, log_prob, label, grad, parameter)
            assert torch.equal(rank, count.view(2, 1, 1, 1).expand(2, 1, 3, 4))
        want = want.view(2, 1, 1, 1).expand(2, 1, 3, 4)
        torch.testing.assert_close(fi, want, rtol=TOLERANCE[rule], atol=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_mean_is_the_mean_of_separate(window_ops: Any, rule: str) -> None:
    layout = Layout((3, 4), 3, (1, 3), "separate")
    args = random_arguments(6, layout, 4, "label", rule)
    apart, rank = window_ops.window_influence(*args)
    mean, mean_rank = window_ops.window_influence(*args[:5], "mean", *args[6:])
    # a sum of three numbers that are not negative, in any order
    torch.testing.assert_close(mean, apart.mean(2), rtol=4 * 2.0**-53, atol=0.0)
    assert torch.equal(rank, mean_rank)


def test_the_exact_rule_knows_no_scale(window_ops: Any) -> None:
    """float32 rows of 1e-15 and 1e18: products overflow and vanish in float32."""
    layout = Layout((3, 4), 2, (1, 3, 5), "separate")
    args = random_arguments(7, layout, 6, "label", "exact")
    want = window_ops.window_influence(*args)
    for power in (-50, 60, 100):
        rows = torch.ldexp(args[0], torch.tensor(power)).float()
        got = window_ops.window_influence(rows, *args[1:])
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0.0)
        assert torch.equal(got[1], want[1])


def test_rtol_is_a_relative_length(window_ops: Any) -> None:
    """Two rows that differ by 2^-10 of their length are one row to an rtol of 2^-8. In the unit of
    the longest row of each window, not of the image."""
    rows = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    rows[0, :, 0, 0] = 1.0
    rows[0, 1, 0, 1] = 2.0**-10  # pixels 0 and 1: nearly parallel; pixel 1 alone: short
    args = (torch.tensor([[0.5, 0.3, 0.2]]).double().log(), torch.tensor([1]), None)
    for rtol, wanted in [(2.0**-8, [1, 1, 1, 0]), (2.0**-13, [2, 2, 1, 0])]:
        _, rank = window_ops.window_influence(
            rows, *args, [3], "separate", "exact", rtol, None, True
        )
        assert rank.flatten().tolist() == wanted


@pytest.mark.parametrize("mode", MODES)
def test_the_cut_of_the_truncated_rule_is_absolute(window_ops: Any, mode: str) -> None:
    """As the rows shrink, singular values fall below it one by one."""
    layout = Layout((3, 3), 1, (1, 3), "separate")
    args = random_arguments(8, layout, 5, mode, "truncated")
    kept = []
    for power in (0, -4, -6, -8, -20):
        rows = torch.ldexp(args[0], torch.tensor(power))
        _, rank = window_ops.window_influence(rows, *args[1:])
        kept.append(rank)
    assert all(bool((a >= b).all()) for a, b in pairwise(kept))
    assert int(kept[0].max()) == 4
    assert int(kept[-1].max()) == 0


@pytest.mark.parametrize("channels", CHANNELS)
def test_padding_classes_do_not_count(window_ops: Any, channels: str) -> None:
    """Lumping leaves positions of log P = -inf with rows of zeros."""
    layout = Layout((3, 4), 2, (1, 3, 5), channels)
    for rule in RULES:
        args = random_arguments(9, layout, 4, "label", rule)
        want = window_ops.window_influence(*args)
        rows = torch.cat([args[0], torch.zeros_like(args[0][:, :2])], 1)
        log_prob = torch.nn.functional.pad(args[1], (0, 2), value=-torch.inf)
        assert_agree(rule, window_ops.window_influence(rows, log_prob, *args[2:]), want)


@pytest.mark.parametrize("mode", ["label", "grad"])
@pytest.mark.parametrize("rule", ["exact", "damped"])
def test_windows_within_windows(window_ops: Any, rule: str, mode: str) -> None:
    """FI = max (h . w)^2 / (w^T (G + tau I) w) over w on the window: more pixels, more of them.
    (For G alone where h lies in its range, as it does for a gradient in z with sum 0.)"""
    layout = Layout((5, 6), 2, (1, 3, 5, 7, 13), "separate")
    args = random_arguments(10, layout, 9, mode, rule)
    fi, rank = window_ops.window_influence(*args)
    slack = 1 + 1e-9  # both sides are within 1e-10, or 1e-8 at tau of order 1e-2 and less
    assert bool((fi[:, :-1] <= fi[:, 1:] * slack).all())
    assert bool((fi[:, 0] < fi[:, 2]).any())
    joint, joint_rank = window_ops.window_influence(*args[:5], "joint", *args[6:])
    assert bool((fi <= joint[:, :, None] * slack).all())
    if rule == "exact":
        assert bool((rank[:, :-1] <= rank[:, 1:]).all())
        assert bool((rank <= joint_rank[:, :, None]).all())


def test_the_helpers_own_windows() -> None:
    """Corners are clipped, and channels joined."""
    layout = Layout((2, 3), 2, (3,), "separate")
    assert layout.columns()[0] == (0, 1, 3, 4)
    assert layout.columns()[6] == (6, 7, 9, 10)
    assert layout.columns()[1] == (0, 1, 2, 3, 4, 5)
    assert replace(layout, channels="joint").columns()[0] == (0, 1, 3, 4, 6, 7, 9, 10)
