"""The operators as torch sees them: opcheck, fake kernels, shapes, dtypes, dispatch, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfi
from fastfi.backends import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SOLVES = ("solve_exact", "solve_truncated", "solve_damped")
MODES = ("label", "grad", "raw")
Arguments = tuple[Any, ...]


def solve_arguments(
    name: str, mode: str, batch: int = 3, classes: int = 4, blocks: tuple[int, ...] = ()
) -> Arguments:
    """Arguments of one solve in one of the three forms of its objective."""
    torch.manual_seed(0)
    n = classes if mode == "raw" else classes - 1
    rows = torch.randn(batch, *blocks, n, n + 1, dtype=torch.float64)
    logits = torch.randn(batch, classes, dtype=torch.float64).sort(1, descending=True).values
    label = grad = None
    if mode == "label":
        label = torch.arange(batch) % classes
    elif mode == "grad":
        grad = torch.randn(batch, classes, dtype=torch.float64)
        grad = grad - grad.mean(1, keepdim=True)
    last: Any = {"solve_exact": 1e-6, "solve_truncated": 1e-3}.get(name)
    if last is None:
        last = torch.full((batch,), 0.5, dtype=torch.float64)
    return rows @ rows.mT, logits.log_softmax(1), label, grad, last


def op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.fastfi, name)


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 3, 5), (1, 1, 1)])
def test_opcheck_gram(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(torch.ops.fastfi.gram.default, (torch.ones(shape, dtype=dtype),))


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [(), (2,), (2, 3)])
def test_opcheck_solve(name: str, mode: str, blocks: tuple[int, ...]) -> None:
    for batch in (3, 1, 0):
        args = solve_arguments(name, mode, batch, 4, blocks)
        torch.library.opcheck(getattr(torch.ops.fastfi, name).default, args)


@given(
    batch=st.sampled_from([0, 1, 2, 9]),
    classes=st.sampled_from([2, 3, 8, 11]),
    blocks=st.sampled_from([(), (1,), (0,), (4,), (2, 3)]),
    mode=st.sampled_from(MODES),
    name=st.sampled_from(SOLVES),
)
def test_solve_shapes(
    batch: int, classes: int, blocks: tuple[int, ...], mode: str, name: str
) -> None:
    """Kernel, reference and fake kernel agree on shapes, dtypes and (the first two) values."""
    args = solve_arguments(name, mode, batch, classes, blocks)
    got = as_tuple(op(name)(*args))
    want = as_tuple(getattr(reference, name)(*args))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode_:
        fake_args = [mode_.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fake = as_tuple(op(name)(*fake_args))
    assert len(got) == len(want) == len(fake) == (1 if name == "solve_damped" else 2)
    for g, w, f in zip(got, want, fake, strict=True):
        assert g.shape == w.shape == f.shape == (batch, *blocks)
        assert g.dtype == w.dtype == f.dtype
        # random 8 x 9 rows: condition below 1e3, both within eps64 1e6 of the truth
        torch.testing.assert_close(g, w, rtol=1e-8, atol=0.0)
    assert got[0].dtype == torch.float64
    assert all(t.dtype == torch.int64 for t in got[1:])


@given(
    batch=st.sampled_from([0, 1, 5]),
    rows=st.sampled_from([1, 2, 9, 16]),
    width=st.sampled_from([1, 2, 31, 200]),
    dtype=st.sampled_from(DTYPES),
)
def test_gram_shapes(batch: int, rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(batch, rows, width).to(dtype)
    got, want = torch.ops.fastfi.gram(x), reference.gram(x)
    with FakeTensorMode() as mode:
        fake = torch.ops.fastfi.gram(mode.from_tensor(x))
    assert got.shape == want.shape == fake.shape == (batch, rows, rows)
    assert got.dtype == want.dtype == fake.dtype == torch.float64
    # two orders of summation, each within (p + 1) 2^-53 of a sum of |a b| <= p max^2
    bound = 2 * (width + 1) * 2.0**-53 * width * float(x.double().abs().max() ** 2 if batch else 0)
    torch.testing.assert_close(got, want, rtol=0.0, atol=bound)


@pytest.mark.parametrize("name", SOLVES)
def test_meta_tensors(name: str) -> None:
    """No CPU kernel is entered for another device."""
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in solve_arguments(name, "label")]
    for out in as_tuple(op(name)(*args)):
        assert out.device.type == "meta"
        assert out.shape == (3,)
    assert torch.ops.fastfi.gram(torch.ones(2, 3, 4, device="meta")).shape == (2, 3, 3)


def test_the_reference_is_every_devices_kernel() -> None:
    """The default kernel is registered for all devices, and the CPU's is the compiled one."""
    table = fastfi.backends()
    layers = {"linear_gram", "conv_gram", "channel_sums"}
    assert set(table) == {"gram", "segment_gram", "window_influence", *SOLVES, *layers}
    for name, kernels in table.items():
        assert set(kernels) == {"cpu", "cuda", "default"}
        assert kernels["default"] == f"torch {'matrix products' if name in layers else 'reference'}"
        assert "C++" in kernels["cpu"]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastfi::{name}", "CompositeExplicitAutograd"
        ) or torch._C._dispatch_has_kernel_for_dispatch_key(f"fastfi::{name}", "CUDA")


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("mode", MODES)
def test_arguments_are_left_alone(ops: Any, name: str, mode: str) -> None:
    args = solve_arguments(name, mode)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    getattr(ops, name)(*args)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_compiled_graphs_call_the_ops() -> None:
    """torch.compile traces through the fake kernels (aot_eager: no code generation)."""

    def f(rows: Tensor, log_prob: Tensor, label: Tensor) -> Tensor:
        gram = torch.ops.fastfi.gram(rows)
        return torch.ops.fastfi.solve_exact(gram, log_prob, label, None, 0.0)[0] + 1.0

    _, log_prob, label, _, _ = solve_arguments("solve_exact", "label")
    rows = torch.randn(3, 3, 7)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(rows, log_prob, label)
    torch.testing.assert_close(got, f(rows, log_prob, label), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(3, 4), r"\[B, R, p\].*\[3, 4\]"),
        (torch.ones(1, 2, 3, 4), r"\[B, R, p\].*\[1, 2, 3, 4\]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "int64"),
        (torch.ones(1, 2, 3, dtype=torch.complex64), "complex64"),
    ],
)
def test_gram_refuses(ops: Any, rows: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gram(rows)


def replaced(args: Arguments, at: int, value: Any) -> Arguments:
    return (*args[:at], value, *args[at + 1 :])


BAD_ARGUMENTS = {
    "gram of another size": ("label", 0, torch.ones(3, 4, 4).double(), "gram.*3, 3.*3, 4, 4"),
    "gram not square": ("label", 0, torch.ones(3, 3, 2).double(), "gram.*3, 3, 2"),
    "gram without a batch": ("label", 0, torch.ones(3, 3).double(), "gram"),
    "gram of another batch": ("label", 0, torch.ones(2, 3, 3).double(), "gram.*2, 3, 3"),
    "gram float32": ("label", 0, torch.ones(3, 3, 3), "gram.*float32"),
    "log_prob float32": ("label", 1, torch.ones(3, 4), "log_prob.*float32"),
    "log_prob flat": ("label", 1, torch.ones(12).double(), r"log_prob.*\[12\]"),
    "log_prob of one class": ("label", 1, torch.ones(3, 1).double(), "log_prob.*3, 1"),
    "label int32": ("label", 2, torch.zeros(3, dtype=torch.int32), "label.*int32"),
    "label float": ("label", 2, torch.zeros(3), "label.*float32"),
    "label too long": ("label", 2, torch.zeros(4, dtype=torch.int64), r"label.*\[4\]"),
    "label 2-d": ("label", 2, torch.zeros(3, 1, dtype=torch.int64), "label.*3, 1"),
    "label and grad": ("label", 3, torch.zeros(3, 4).double(), "both"),
    "grad float32": ("grad", 3, torch.zeros(3, 4), "grad.*float32"),
    "grad of contrasts": ("grad", 3, torch.zeros(3, 3).double(), r"grad.*\[3, 3\]"),
    "raw without its row": ("label", 2, None, "gram.*4, 4.*3, 3"),
    "gram on meta": ("label", 0, torch.ones(3, 3, 3, device="meta").double(), "meta|cpu"),
    "log_prob on meta": ("label", 1, torch.ones(3, 4, device="meta").double(), "log_prob.*meta"),
    "label on meta": ("label", 2, torch.ones(3, device="meta").long(), "label.*meta"),
    "grad on meta": ("grad", 3, torch.ones(3, 4, device="meta").double(), "grad.*meta"),
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("case", sorted(BAD_ARGUMENTS))
def test_solves_refuse(name: str, case: str) -> None:
    """Each error names the op, the argument, what was expected and what came."""
    mode, at, value, message = BAD_ARGUMENTS[case]
    args = replaced(solve_arguments(name, mode), at, value)
    with pytest.raises(ValueError, match=message) as error:
        op(name)(*args)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (torch.ones(3), "tau.*float32"),
        (torch.ones(4).double(), r"tau.*\[4\]"),
        (torch.ones(3, 1).double(), r"tau.*\[3, 1\]"),
        (torch.ones(3, device="meta").double(), "tau.*meta"),
    ],
)
def test_damped_refuses_its_damping(tau: Tensor, message: str) -> None:
    args = replaced(solve_arguments("solve_damped", "label"), 4, tau)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastfi.solve_damped(*args)


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_labels_out_of_range_are_not_read(
    ops: Any, name: str, label: int, request: pytest.FixtureRequest
) -> None:
    """A position outside 0..K-1 must be refused, not used as an address; or give NaN, where a
    refusal would have to wait for a GPU."""
    args = solve_arguments(name, "label")
    args[2][1] = label
    if request.node.callspec.params["ops"] == "emulated":
        fi = as_tuple(getattr(ops, name)(*args))[0]
        assert fi.isnan().tolist() == [False, True, False]
        return
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        getattr(ops, name)(*args)
