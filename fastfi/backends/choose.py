"""Which kernel runs each operator on an NVIDIA GPU: one function decides, the others carry it out.

Compiled CUDA kernels do the small dense algebra, Triton's do the contractions, and plain torch does
what neither does. Only whether a module can be found decides. Nothing is imported before the first
call on a GPU, because triton takes a while; what is there and broken raises then, instead of being
replaced in silence.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from fastfi._ops import OP_NAMES

__all__ = ["CHOICES", "ENVIRONMENT", "OLDEST", "TORCH", "Kernel", "choice", "cuda_kernels"]
__all__ += ["descriptions", "found", "function", "on_gpu", "register", "triton_is_old"]

ENVIRONMENT = "FASTFI_GPU_KERNELS"  # rules kernels out: "torch", "triton" or "compiled"
CHOICES = ("", "torch", "triton", "compiled")

# The compiled module holds code for sm_80 and later; so does what Triton promises to support.
OLDEST = (8, 0)
OLDEST_TRITON = (3, 5)


class Kernel(NamedTuple):
    """The function of the operator's name in ``module``, and what to call it in a report."""

    module: str
    description: str


_REFERENCE = Kernel("fastfi.backends.reference", "torch reference")
_WINDOWS = Kernel("fastfi.backends.reference_windows", "torch reference")
# For layers the definition would form what must not be formed.
_PRODUCTS = Kernel("fastfi.backends.blas", "torch matrix products")

TORCH = {
    "gram": _REFERENCE,
    "segment_gram": _WINDOWS,
    "solve_exact": _REFERENCE,
    "solve_truncated": _REFERENCE,
    "solve_damped": _REFERENCE,
    "window_influence": _WINDOWS,
    "linear_gram": _PRODUCTS,
    "conv_gram": _PRODUCTS,
    "channel_sums": _PRODUCTS,
}
_TRITON = {
    "gram": Kernel("fastfi.backends.triton_gram", "Triton"),
    "segment_gram": Kernel("fastfi.backends.triton_gram", "Triton"),
    "linear_gram": Kernel("fastfi.backends.triton_layers", "Triton"),
    "conv_gram": Kernel("fastfi.backends.triton_layers", "Triton"),
    "channel_sums": Kernel("fastfi.backends.triton_sums", "Triton"),
}
_COMPILED_OPS = ("solve_exact", "solve_truncated", "solve_damped", "window_influence")
_COMPILED = dict.fromkeys(_COMPILED_OPS, Kernel("fastfi.backends.cuda", "CUDA C++"))


def cuda_kernels(
    compiled: bool, triton: bool, capability: tuple[int, int], only: str = ""
) -> dict[str, Kernel]:
    """The kernel of every operator on one GPU.

    Args:
        compiled: the module fastfi._CUDA was built.
        triton: the package triton is installed, in version 3.5 or later.
        capability: of the GPU.
        only: "torch": nothing but torch; "triton", "compiled": these where they have a kernel, and
            torch for the rest; "": whatever there is.

    Raises:
        ValueError: ``only`` is another word, or asks for what is not there or cannot run.
    """
    if only not in CHOICES:
        raise ValueError(f"{ENVIRONMENT}: expected one of {CHOICES[1:]}, got {only!r}")
    wanted = {
        "triton": (triton, "the package triton, version 3.5 or later"),
        "compiled": (compiled, "the module fastfi._CUDA"),
    }
    if only in wanted:
        there, what = wanted[only]
        if not there:
            raise ValueError(f"{ENVIRONMENT}={only}: expected {what}, which was not found")
        if capability < OLDEST:
            came, needed = (".".join(map(str, c)) for c in (capability, OLDEST))
            raise ValueError(
                f"{ENVIRONMENT}={only}: expected a GPU of capability {needed} or later, got {came}"
            )
    kernels = dict(TORCH)
    if triton and capability >= OLDEST and only in ("", "triton"):
        kernels |= _TRITON
    if compiled and capability >= OLDEST and only in ("", "compiled"):
        kernels |= _COMPILED
    return kernels


def triton_is_old() -> bool:
    """Whether triton is older than 3.5, as its metadata say (a build without any is taken for new).
    Older ones have no product of float64 matrices."""
    try:
        release = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in release[:2] if part.isdecimal()) < OLDEST_TRITON


def found() -> tuple[bool, bool]:
    """Whether fastfi._CUDA and a triton that is new enough are there, without importing them."""
    names = ("fastfi._CUDA", "triton")
    compiled, triton = (importlib.util.find_spec(name) is not None for name in names)
    return compiled, triton and not triton_is_old()


def choice() -> str:
    """What the environment asks for; see :func:`cuda_kernels`."""
    return os.environ.get(ENVIRONMENT, "")


@cache
def function(op: str, index: int) -> Callable[..., Any]:
    """What runs an operator on the GPU of that index, imported now if it was not yet.

    Raises:
        ValueError: see :func:`cuda_kernels`.
        ImportError: the chosen module is there and cannot be imported.
    """
    kernel = cuda_kernels(*found(), torch.cuda.get_device_capability(index), choice())[op]
    try:
        module = importlib.import_module(kernel.module)
    except Exception as error:  # a damaged package can raise anything
        raise ImportError(
            f"{op} runs as {kernel.description} on this GPU, but {kernel.module} cannot be "
            f"imported ({type(error).__name__}: {error}). 'python -m fastfi.doctor' says what is "
            f"wrong; {ENVIRONMENT}=torch does without"
        ) from error
    run: Callable[..., Any] = getattr(module, op)
    return run


def on_gpu(op: str) -> Callable[..., Any]:
    """The kernel that torch calls for an operator on any GPU: it passes the call on to the one
    chosen for that GPU, which makes it the current device where that matters."""

    def run(*arguments: Any) -> Any:
        first = arguments[0]
        index = (first[0] if isinstance(first, (list, tuple)) else first).device.index
        return function(op, index)(*arguments)

    return run


def register(
    register_kernel: Callable[[str, str, Callable[..., Any]], Any] = torch.library.register_kernel,
    cuda: str | None = torch.version.cuda,
) -> None:
    """Registers :func:`on_gpu` for all operators where torch was built for CUDA. (For ROCm, which
    torch calls "cuda" too, what serves every device remains.)"""
    if cuda is not None:
        for op in OP_NAMES:
            register_kernel(f"fastfi::{op}", "cuda", on_gpu(op))


def descriptions() -> dict[str, str]:
    """What each operator runs on the current GPU; where torch sees none, on one that is new enough.

    Raises:
        ValueError: see :func:`cuda_kernels`.
        ImportError: fastfi._CUDA is there and broken.
    """
    if torch.version.hip is not None:
        return {op: kernel.description for op, kernel in TORCH.items()}
    compiled, triton = found()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST
    kernels = cuda_kernels(compiled, triton, capability, choice())
    table = {op: kernel.description for op, kernel in kernels.items()}
    if any(kernel in _COMPILED.values() for kernel in kernels.values()):
        targets = importlib.import_module("fastfi._CUDA").targets()
        table |= {op: f"CUDA C++ ({', '.join(targets)})" for op in _COMPILED}
    return table
