"""The CUDA windows' sources, run by the emulation: tiles, launches, teams, order, types.

Their accuracy is tested with that of all other implementations (fixture ``window_ops``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_problems import INVERSES, ORDERS, SOLVES, inputs, last, parameter, same, window_inputs
from emulated import emulated_ops

from fastfi.backends import cpu, reference_windows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpu() -> Any:
    return emulated_ops()


# shape [B, C, *spatial], classes, scales, channels
WINDOWS = {
    "an image": ((2, 3, 6, 7), 10, (1, 3, 5), "separate"),
    "channels together, scales in any order": ((2, 3, 6, 7), 10, (5, 1, 3), "joint"),
    "wider than a block's 64 columns": ((1, 1, 9, 130), 4, (1, 3), "separate"),
    "a signal longer than a block": ((2, 2, 150), 7, (1, 9, 3), "mean"),
    "a volume": ((1, 1, 3, 4, 5), 5, (1, 3), "separate"),
    "teams of 16": ((1, 2, 5, 4), 14, (1, 3), "separate"),
    "warps": ((1, 1, 4, 4), 20, (3,), "separate"),
    "one pixel": ((2, 1, 1, 1), 3, (1, 3), "separate"),
    "more scales than a launch takes": ((1, 1, 2, 3), 2, tuple(range(1, 41, 2)), "separate"),
    "two classes": ((2, 2, 4, 5), 2, (1, 3), "joint"),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("mode", ["label", "grad", "raw"])
def test_windows(gpu: Any, poisoned: None, name: str, mode: str) -> None:
    shape, classes, scales, channels = WINDOWS[name]
    args = window_inputs(shape, classes, mode)
    for inverse in INVERSES:
        tau = torch.linspace(0.2, 0.9, shape[0]).double() if inverse == "damped" else None
        rest = (scales, channels, inverse, parameter(inverse), tau, True)
        same(gpu.window_influence(*args, *rest), cpu.window_influence(*args, *rest), 1e-8)


@pytest.mark.parametrize("inverse", INVERSES)
def test_windows_too_wide_for_shared_memory(gpu: Any, inverse: str) -> None:
    args = window_inputs((1, 1, 1, 420), 10, "label")
    tau = torch.ones(1, dtype=torch.float64) if inverse == "damped" else None
    rest = ((801,), "separate", inverse, parameter(inverse), tau, True)
    problem = (args[0][..., :6], *args[1:])  # the reference on all of it would take minutes
    small = ((11,), "separate", inverse, parameter(inverse), tau, True)
    same(gpu.window_influence(*problem, *small), cpu.window_influence(*problem, *small), 1e-8)
    same(gpu.window_influence(*args, *rest), cpu.window_influence(*args, *rest), 1e-8)


@pytest.mark.parametrize("kilobytes", [99, 163])
def test_windows_on_smaller_devices(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    """Compute capability 8.6 and 8.0: tiles and teams fit the device's shared memory."""
    monkeypatch.setenv("FASTFI_EMULATED_SHARED", str(kilobytes << 10))
    args = window_inputs((1, 1, 6, 150), 10, "grad")
    for inverse in INVERSES:
        tau = torch.ones(1, dtype=torch.float64) if inverse == "damped" else None
        rest = ((1, 7, 151), "separate", inverse, parameter(inverse), tau, True)
        same(gpu.window_influence(*args, *rest), cpu.window_influence(*args, *rest), 1e-8)
    for classes, mode in ((17, "label"), (16, "raw")):
        teams = inputs(17, 2, classes, 20, mode)
        for name in SOLVES:
            want = getattr(cpu, name)(*teams, last(name, 2))
            same(getattr(gpu, name)(*teams, last(name, 2)), want, 1e-8)


def test_windows_in_any_order(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = window_inputs((1, 2, 5, 9), 9, "label")
    for inverse in INVERSES:
        tau = torch.ones(1, dtype=torch.float64) if inverse == "damped" else None
        seen = []
        for order in (*ORDERS, "8"):
            monkeypatch.setenv("FASTFI_EMULATED_ORDER", order)
            seen.append(gpu.window_influence(
                *args, (1, 3, 7), "separate", inverse, parameter(inverse), tau, True))  # fmt: skip
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_of_rows(gpu: Any, dtype: torch.dtype) -> None:
    rows, *rest = window_inputs((2, 1, 4, 4), 6, "label")
    rows = rows.to(dtype)
    got = gpu.window_influence(rows, *rest, (1, 3), "separate", "exact", 1e-6, None, True)
    want = reference_windows.window_influence(
        rows, *rest, (1, 3), "separate", "exact", 1e-6, None, True
    )
    same(got, want, 1e-8)
