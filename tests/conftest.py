"""Shared fixtures: the two implementations of the ops, and hypothesis with a fixed profile."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings

import fastfi
from fastfi.backends import cpu, reference, reference_windows

sys.path.insert(0, str(Path(__file__).parent))  # oracle and samplers, from any working directory

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("explore", deadline=None, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=["reference", "compiled"])
def ops(request: pytest.FixtureRequest) -> Any:
    """gram, solve_exact, solve_truncated, solve_damped: in plain torch, and as compiled."""
    if request.param == "reference":
        return reference
    return compiled_ops()


@pytest.fixture
def kernels() -> Any:
    """The compiled ops alone, for properties that plain torch does not promise."""
    return compiled_ops()


@pytest.fixture(params=["op", "reference", *cpu.instruction_sets()])
def window_ops(request: pytest.FixtureRequest) -> Any:
    """window_influence and segment_gram: as registered, in plain torch, and compiled for each
    instruction set."""
    return reference_windows if request.param == "reference" else _windows_of(request.param)


@pytest.fixture(params=["op", *cpu.instruction_sets()])
def window_kernels(request: pytest.FixtureRequest) -> Any:
    """The compiled ones alone, for properties that plain torch does not promise."""
    return _windows_of(request.param)


def _windows_of(name: str) -> Any:
    if name == "op":
        return compiled_ops()
    return SimpleNamespace(
        window_influence=partial(cpu.window_influence, isa=name),
        segment_gram=partial(cpu.segment_gram, isa=name),
    )


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules of small tensors, where a pool of threads costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def compiled_ops() -> Any:
    """torch.ops.fastfi; fails unless its CPU kernels are the compiled ones."""
    for name, kernel in fastfi.backends().items():
        if "C++" not in kernel.get("cpu", ""):
            pytest.fail(f"{name} runs {kernel} on the CPU: build the extension (pip install -e .)")
    return torch.ops.fastfi


def pytest_configure() -> None:
    # A shell's background jobs start with Ctrl-C ignored, and some tests are about what it does.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
