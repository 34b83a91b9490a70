"""Shared fixtures: the two implementations of the ops, and hypothesis with a fixed profile.

With ``--device cuda`` the operators get their tensors on the GPU and give results back on the CPU,
so that every test of an operator, and every public call on CPU tensors, runs the GPU's kernels.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Read when triton is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastfi
from fastfi._ops import OP_NAMES
from fastfi.backends import cpu, reference, reference_windows

sys.path.insert(0, str(Path(__file__).parent))  # oracle and samplers, from any working directory
sys.path.append(str(Path(__file__).parent.parent))  # bench and examples
_INTERPRET = os.environ.get("TRITON_INTERPRET")

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("explore", deadline=None, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


_device = "cpu"  # of the operators that the tests call

# Tests of the CPU's own module and of what chooses kernels, and tests with devices of their own.
_AS_THEY_ARE = ("test_kernels", "test_layer_kernels", "test_choose", "test_on_device", "test_bench")
_AS_THEY_ARE += ("test_triton", "test_cuda")
_NOT_ON_A_GPU = {
    "test_labels_out_of_range_are_not_read": "a GPU's kernel cannot raise without being waited for",
    "test_compiled_graphs_call_the_ops": "torch.compile does not trace what moves the tensors",
    "test_compiled_graphs_call_the_op": "torch.compile does not trace what moves the tensors",
}


def there(t: Tensor, device: str) -> Tensor:
    """A copy of a tensor on a device: the same numbers, strides and offset into its storage."""
    if t.is_contiguous() and t.storage_offset() == 0:
        return t.to(device)
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return whole.as_strided(t.size(), t.stride(), t.storage_offset())


class Forwarded:
    """A function of tensors on the CPU that is computed on a device. Tensors that are elsewhere, or
    none (fake ones), go to the function itself."""

    def __init__(self, function: Any, device: str) -> None:
        self._function, self._device = function, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in leaves)
        if not plain:
            return self._function(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda t: there(t, self._device), (args, kwargs))
        out = self._function(*args, **kwargs)
        for t in tree_flatten(out)[0]:
            assert t.device.type == torch.device(self._device).type, "a result on another device"
        return tree_map_only(Tensor, lambda t: t.cpu(), out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)  # an operator's overloads


@contextmanager
def forwarded(owner: Any, device: str) -> Iterator[None]:
    """The operators that are attributes of ``owner`` are computed on a device while it lasts."""
    before = {name: getattr(owner, name) for name in OP_NAMES}
    for name, op in before.items():
        setattr(owner, name, Forwarded(op, device))
    try:
        yield
    finally:
        for name, op in before.items():
            setattr(owner, name, op)


def _here(module: Any) -> Any:
    """The functions of a module, on the device that was asked for."""
    if _device == "cpu":
        return module
    names = [n for n in OP_NAMES if hasattr(module, n)]
    return SimpleNamespace(**{n: Forwarded(getattr(module, n), _device) for n in names})


@pytest.fixture(params=["reference", "compiled", "emulated"])
def ops(request: pytest.FixtureRequest) -> Any:
    """gram, solve_exact, solve_truncated, solve_damped: in plain torch, as compiled, and (the
    solves) the CUDA kernels' sources by an emulation."""
    if request.param == "reference":
        return _here(reference)
    return compiled_ops() if request.param == "compiled" else _emulated_ops()


@pytest.fixture
def kernels() -> Any:
    """The compiled ops alone, for properties that plain torch does not promise."""
    return compiled_ops()


@pytest.fixture(params=["op", "reference", "emulated", *cpu.instruction_sets()])
def window_ops(request: pytest.FixtureRequest) -> Any:
    """window_influence and segment_gram: as registered, in plain torch, compiled for each
    instruction set, and (the windows) the CUDA kernels' sources by an emulation."""
    reference_ = _here(reference_windows)
    return reference_ if request.param == "reference" else _windows_of(request.param)


@pytest.fixture(params=["op", *cpu.instruction_sets()])
def window_kernels(request: pytest.FixtureRequest) -> Any:
    """The compiled ones alone, for properties that plain torch does not promise."""
    return _windows_of(request.param)


def _emulated_ops() -> Any:
    if _device != "cpu":
        pytest.skip("the kernels themselves run on the device")
    from emulated import emulated_ops

    ops, cuda = compiled_ops(), emulated_ops()
    given = {name: getattr(cuda if hasattr(cuda, name) else ops, name) for name in OP_NAMES}
    return SimpleNamespace(**given)


def _windows_of(name: str) -> Any:
    if name == "op":
        return compiled_ops()
    if name == "emulated":
        return _emulated_ops()
    return SimpleNamespace(
        window_influence=partial(cpu.window_influence, isa=name),
        segment_gram=partial(cpu.segment_gram, isa=name),
    )


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """What bench.gpu changes for its own process: triton reads it again at a first launch."""
    yield
    if _INTERPRET is not None:
        os.environ["TRITON_INTERPRET"] = _INTERPRET


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # on a GPU, what torch cannot make so raises
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
    """torch.ops.fastfi; fails unless its kernels on the device are compiled ones."""
    for name, kernel in fastfi.backends().items():
        if "C++" not in kernel.get("cpu", ""):
            pytest.fail(f"{name} runs {kernel} on the CPU: build the extension (pip install -e .)")
        if _device != "cpu" and "torch" in kernel.get(_device, "torch"):
            pytest.fail(f"{name} runs {kernel}: no kernel for {_device} (nvcc, triton?)")
    return torch.ops.fastfi


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where the operators run"
    )


def pytest_configure(config: pytest.Config) -> None:
    global _device
    # A shell's background jobs start with Ctrl-C ignored, and some tests are about what it does.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Processes side by side share the cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _device = config.getoption("--device")
    if _device == "cuda":
        # Poisoned memory goes with deterministic algorithms, and those with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: expected a CUDA device, torch finds none")


def _as_it_is(item: pytest.Item) -> bool:
    return _device == "cpu" or item.path.stem.startswith(_AS_THEY_ARE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = getattr(item, "originalname", item.name)
        if not _as_it_is(item) and name in _NOT_ON_A_GPU:
            item.add_marker(pytest.mark.skip(reason=_NOT_ON_A_GPU[name]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if _as_it_is(item):
        return (yield)
    with forwarded(torch.ops.fastfi, _device):
        return (yield)
