"""Which kernel a GPU runs: the decision for every combination, the registration, late imports."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastfi
from fastfi._ops import OP_NAMES
from fastfi.backends import choose

SOLVES = {"solve_exact", "solve_truncated", "solve_damped", "window_influence"}
CONTRACTIONS = {"gram", "segment_gram", "linear_gram", "conv_gram", "channel_sums"}
NEW, OLD = (9, 0), (7, 5)


@pytest.fixture(autouse=True)
def nothing_chosen_before(monkeypatch):
    monkeypatch.delenv(choose.ENVIRONMENT, raising=False)
    choose.function.cache_clear()
    yield
    choose.function.cache_clear()


def kinds(kernels):
    """Operators by what runs them: compiled, triton or torch."""
    table = {"compiled": set(), "triton": set(), "torch": set()}
    for op, kernel in kernels.items():
        name = kernel.module.removeprefix("fastfi.backends.")
        kind = "compiled" if name == "cuda" else "triton" if "triton" in name else "torch"
        table[kind].add(op)
    return table


@pytest.mark.parametrize("only", choose.CHOICES)
@pytest.mark.parametrize("capability", [(5, 0), OLD, (7, 9), (8, 0), (8, 6), NEW, (10, 0), (12, 1)])
@pytest.mark.parametrize(("compiled", "triton"), list(itertools.product([False, True], repeat=2)))
def test_the_decision(compiled, triton, capability, only):
    """Spelt out: what there is, unless the GPU is too old or the user rules it out."""
    there = {"compiled": compiled, "triton": triton}
    new = capability[0] >= 8
    if only in there and not (there[only] and new):
        with pytest.raises(ValueError, match=f"FASTFI_GPU_KERNELS={only}: expected"):
            choose.cuda_kernels(compiled, triton, capability, only)
        return
    kernels = choose.cuda_kernels(compiled, triton, capability, only)
    assert set(kernels) == set(OP_NAMES)
    want = {"compiled": set(), "triton": set()}
    if new and compiled and only in ("", "compiled"):
        want["compiled"] = SOLVES
    if new and triton and only in ("", "triton"):
        want["triton"] = CONTRACTIONS
    want["torch"] = set(OP_NAMES) - want["compiled"] - want["triton"]
    assert kinds(kernels) == want
    for op in want["torch"]:
        assert kernels[op] == choose.TORCH[op]


def test_bad_choices():
    with pytest.raises(ValueError, match=r"expected one of .*'torch'.*, got 'cutlass'"):
        choose.cuda_kernels(True, True, NEW, "cutlass")
    with pytest.raises(ValueError, match=r"expected the module fastfi\._CUDA"):
        choose.cuda_kernels(False, True, NEW, "compiled")
    with pytest.raises(ValueError, match="expected the package triton"):
        choose.cuda_kernels(True, False, NEW, "triton")
    with pytest.raises(ValueError, match=r"capability 8\.0 or later, got 7\.5"):
        choose.cuda_kernels(True, True, OLD, "compiled")


def test_found(monkeypatch, tmp_path):
    """By looking for the modules, which are not run."""
    (tmp_path / "triton.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    # An editable installation would find the real ones.
    finders = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(fastfi, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "fastfi._CUDA", raising=False)
    monkeypatch.setattr(choose, "triton_is_old", lambda: False)
    assert choose.found() == (False, True)
    (tmp_path / "_CUDA.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "triton.py").unlink()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert choose.found() == (True, False)


@pytest.mark.parametrize(
    ("version", "old"), [("3.4.0", True), ("3.5.0", False), ("3.10.1+git5", False), ("4.0", False)]
)
def test_triton_without_float64_products_counts_as_absent(monkeypatch, version, old):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert choose.triton_is_old() is old
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose.found() == (True, not old)


def test_every_torch_kernel_is_there():
    for op, kernel in choose.TORCH.items():
        assert callable(getattr(sys.modules[kernel.module], op))


def test_torch_built_without_cuda_gets_no_kernels():
    """Nor does a build for ROCm, whose version.cuda is None too."""
    choose.register(lambda *a: pytest.fail(f"registered {a}"), None)


@pytest.fixture
def gpus(monkeypatch):
    """GPUs by index, as far as the choice sees them, in .capability; fake modules, whose functions
    return the module's name, the operator's and the arguments; in .imported what was imported."""
    capability = {0: NEW, 1: OLD, 2: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability[i])
    monkeypatch.setattr(choose, "found", lambda: (True, True))
    tables = (choose.TORCH, choose.cuda_kernels(True, True, NEW))
    fakes: dict[str, ModuleType] = {}
    for op, kernel in itertools.chain.from_iterable(t.items() for t in tables):
        fake = fakes.setdefault(kernel.module, ModuleType(kernel.module))
        name = kernel.module.rpartition(".")[2]
        setattr(fake, op, lambda *arguments, name=name, op=op: (name, op, arguments))
    imported = []

    def import_module(name):
        imported.append(name)
        return fakes[name]

    monkeypatch.setattr(choose.importlib, "import_module", import_module)
    return SimpleNamespace(capability=capability, imported=imported)


def on(index):
    """As much of a tensor as the choice looks at."""
    return SimpleNamespace(device=torch.device("cuda", index))


def registered():
    table = {}
    choose.register(lambda op, kind, call: table.setdefault((op, kind), call), "13.0")
    return table


def test_each_device_has_its_own_kernels(gpus):
    """Decided at the first call, once for each device."""
    table = registered()
    assert set(table) == {(f"fastfi::{op}", "cuda") for op in OP_NAMES}
    assert gpus.imported == []
    solve, products = table["fastfi::solve_exact", "cuda"], table["fastfi::conv_gram", "cuda"]
    for index, module in ((0, "cuda"), (1, "reference"), (2, "cuda")):
        arguments = (on(index), None, 1.0)
        assert solve(*arguments) == (module, "solve_exact", arguments)
    for index, module in ((0, "triton_layers"), (1, "blas")):
        arguments = (on(index), [on(index)])
        assert products(*arguments) == (module, "conv_gram", arguments)
    before = list(gpus.imported)
    gpus.capability.clear()  # not asked again
    assert solve(on(0), None, 1.0)[0] == "cuda"
    assert gpus.imported == before


def test_operators_of_lists(gpus):
    """channel_sums takes lists of tensors only."""
    arguments = ([on(2), on(2)], [on(2), on(2)])
    sums = registered()["fastfi::channel_sums", "cuda"]
    assert sums(*arguments) == ("triton_sums", "channel_sums", arguments)


@pytest.mark.parametrize(
    ("only", "gram", "solve"),
    [
        ("torch", "reference", "reference"),
        ("triton", "triton_gram", "reference"),
        ("compiled", "reference", "cuda"),
        ("", "triton_gram", "cuda"),
    ],
)
def test_the_environment_rules_kernels_out(gpus, monkeypatch, only, gram, solve):
    monkeypatch.setenv(choose.ENVIRONMENT, only)
    assert choose.on_gpu("gram")(on(0))[0] == gram
    assert choose.on_gpu("solve_damped")(on(0))[0] == solve


def test_a_bad_environment_is_an_error_when_used(gpus, monkeypatch):
    monkeypatch.setenv(choose.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match=r"FASTFI_GPU_KERNELS: expected one of .* got 'fast'"):
        choose.on_gpu("gram")(on(0))
    with pytest.raises(ValueError, match="got 'fast'"):
        fastfi.backends()


def test_a_broken_build_is_not_replaced(monkeypatch, gpus):
    """It is found, so it is used, and its own error is told with what to do about it."""

    def broken(name):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(choose.importlib, "import_module", broken)
    for _ in range(2):  # not remembered as a choice either
        with pytest.raises(ImportError) as caught:
            choose.on_gpu("solve_exact")(on(0), None)
        message = str(caught.value)
        for part in ("solve_exact", "fastfi.backends.cuda", "libcuda.so.1: cannot open"):
            assert part in message
        assert "python -m fastfi.doctor" in message and "FASTFI_GPU_KERNELS=torch" in message
        assert isinstance(caught.value.__cause__, OSError)


def test_the_table(monkeypatch):
    """What a GPU runs is told also where there is none; the targets come from the module."""
    fake = ModuleType("fastfi._CUDA")
    fake.targets = lambda: ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setitem(sys.modules, "fastfi._CUDA", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for compiled, triton in itertools.product([False, True], repeat=2):
        monkeypatch.setattr(choose, "found", lambda found=(compiled, triton): found)
        table = fastfi.backends()
        for op in SOLVES:
            want = "CUDA C++ (sm_80, sm_90, compute_90)" if compiled else "torch reference"
            assert table[op]["cuda"] == want
        for op in CONTRACTIONS:
            assert table[op]["cuda"] == ("Triton" if triton else table[op]["default"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: OLD)
    assert all(row["cuda"] == row["default"] for row in fastfi.backends().values())


def test_rocm_keeps_the_default(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(choose, "found", lambda: (True, True))
    assert all(row["cuda"] == row["default"] for row in fastfi.backends().values())


def test_users_of_the_cpu_import_no_gpu_kernels():
    """triton takes a while to import."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastfi\n"
        "assert 'fastfi.backends.choose' in sys.modules\n"
        "gpu = ('triton', 'fastfi._CUDA', 'fastfi.backends.triton', 'fastfi.backends.cuda')\n"
        "found = [n for n in set(sys.modules) - before if n.startswith(gpu)]\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="they are registered already")
def test_torch_takes_the_registration():
    """torch's own function, for as long as the library lives."""
    key = torch._C._dispatch_has_kernel_for_dispatch_key
    with torch.library._scoped_library("fastfi", "FRAGMENT") as library:
        choose.register(partial(torch.library.register_kernel, lib=library), "13.0")
        assert all(key(f"fastfi::{op}", "CUDA") for op in OP_NAMES)
    assert not any(key(f"fastfi::{op}", "CUDA") for op in OP_NAMES)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_a_cuda_build_of_torch_has_them_registered():
    for op in OP_NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastfi::{op}", "CUDA")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("only", ["", "torch"])
def test_on_a_gpu(monkeypatch, only):
    monkeypatch.setenv(choose.ENVIRONMENT, only)
    x = torch.randn(3, 4, 100, device="cuda")
    got = torch.ops.fastfi.gram(x)
    want = x.double() @ x.double().mT
    # sums of 100 products in float64, of at most 100 max^2 in all
    bound = 200 * 2.0**-53 * 100 * float(x.abs().max()) ** 2
    torch.testing.assert_close(got, want, rtol=0.0, atol=bound)


@pytest.mark.parametrize("op", OP_NAMES)
def test_the_chosen_functions_exist_and_take_the_operators_arguments(op):
    """Looked up in the sources: triton and the compiled module may not be there."""
    kernel = choose.cuda_kernels(True, True, NEW)[op]
    path = Path(fastfi.__file__).parent.joinpath(*kernel.module.split(".")[1:]).with_suffix(".py")
    defined = {
        f.name: f for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)
    }
    names = [a.arg for a in defined[op].args.args]
    schema = getattr(torch.ops.fastfi, op).default._schema
    assert names == [a.name for a in schema.arguments]
