"""window_influence as torch sees it: opcheck, fake kernel, shapes, dispatch, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from windows import Layout, random_arguments

from fastfi.backends import cpu, reference_windows

RULES = ("exact", "truncated", "damped")
MODES = ("label", "grad", "raw")
CHANNELS = ("separate", "joint", "mean")
SPATIAL = [(4,), (2, 3), (2, 1, 3)]

pytestmark = pytest.mark.usefixtures("one_thread")


def layout(channels: str = "separate", spatial: tuple[int, ...] = (2, 3)) -> Layout:
    return Layout(spatial, 2, (1, 3), channels)


@pytest.mark.parametrize(("mode", "channels"), list(zip(MODES, CHANNELS, strict=True)))
@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str, mode: str, channels: str) -> None:
    with_rank = mode != "grad"
    args = random_arguments(0, layout(channels), 3, mode, rule, with_rank=with_rank)
    torch.library.opcheck(torch.ops.fastfi.window_influence.default, args)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize(("spatial", "dtype"), [
    ((4,), torch.float16), ((2, 3), torch.bfloat16), ((2, 1, 3), torch.float32),
])  # fmt: skip
def test_opcheck_of_dimensions(spatial: tuple[int, ...], dtype: torch.dtype, batch: int) -> None:
    args = random_arguments(
        1, layout("joint", spatial), 4, "label", "exact", batch=batch, dtype=dtype
    )
    torch.library.opcheck(torch.ops.fastfi.window_influence.default, args)


@pytest.mark.parametrize("with_rank", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_shapes(
    window_ops: Any, rule: str, channels: str, with_rank: bool, spatial: tuple[int, ...]
) -> None:
    """Kernel and fake kernel agree on shapes and dtypes, with an empty batch too."""
    for batch in (0, 3):
        args = random_arguments(
            2, layout(channels, spatial), 4, "label", rule, batch=batch, with_rank=with_rank
        )
        fi, rank = window_ops.window_influence(*args)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fake_fi, fake_rank = torch.ops.fastfi.window_influence(*fake)
        assert fi.shape == fake_fi.shape == layout(channels, spatial).shape(batch)
        assert fi.dtype == fake_fi.dtype == torch.float64
        ranked = with_rank and rule != "damped"
        shape = layout(channels, spatial).shape(batch, rank=True) if ranked else (0,)
        assert rank.shape == fake_rank.shape == shape
        assert rank.dtype == fake_rank.dtype == torch.int64
        assert fi.is_contiguous() and rank.is_contiguous()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rule", RULES)
def test_the_rank_costs_nothing_else(window_ops: Any, rule: str, channels: str) -> None:
    args = random_arguments(3, layout(channels), 4, "label", rule)
    fi, _ = window_ops.window_influence(*args)
    without, _ = window_ops.window_influence(*args[:-1], False)
    assert torch.equal(fi, without)


def test_scales_are_independent_and_in_order(window_ops: Any) -> None:
    """Each scale alone gives its part of the map, whatever the order they are asked for in."""
    big = Layout((4, 5), 2, (5, 1, 7, 3), "separate")
    for rule in RULES:
        args = random_arguments(4, big, 4, "label", rule)
        fi, rank = window_ops.window_influence(*args)
        for s, scale in enumerate(big.scales):
            alone, alone_rank = window_ops.window_influence(*args[:4], [scale], *args[5:])
            # the same sums of integers, so nothing may differ but the order of the solves' own
            torch.testing.assert_close(fi[:, s], alone[:, 0], rtol=1e-10, atol=0.0)
            if rule != "damped":
                assert torch.equal(rank[:, s], alone_rank[:, 0])


@pytest.mark.parametrize("rule", RULES)
def test_arguments_are_left_alone(window_ops: Any, rule: str) -> None:
    for mode in MODES:
        args = random_arguments(5, layout(), 4, mode, rule)
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        window_ops.window_influence(*args)
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("rule", RULES)
def test_meta_tensors(rule: str) -> None:
    """No CPU kernel is entered for another device."""
    args = random_arguments(6, layout(), 4, "label", rule)
    fi, rank = torch.ops.fastfi.window_influence(
        *(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    )
    assert fi.device.type == rank.device.type == "meta"
    assert fi.shape == (2, 2, 2, 2, 3)


def test_compiled_graphs_call_the_op() -> None:
    args = random_arguments(7, layout(), 4, "label", "exact")

    def f(rows: Tensor, log_prob: Tensor, label: Tensor) -> Tensor:
        return torch.ops.fastfi.window_influence(rows, log_prob, label, *args[3:])[0] + 1.0

    got = torch.compile(f, backend="aot_eager", fullgraph=True)(*args[:3])
    torch.testing.assert_close(got, f(*args[:3]), rtol=0.0, atol=0.0)


def replaced(args: tuple[Any, ...], changes: dict[int, Any]) -> tuple[Any, ...]:
    return tuple(changes.get(i, a) for i, a in enumerate(args))


META = torch.ones(2, 3, 2, 2, 3, device="meta")
# Arguments: rows, log_prob, label, grad, scales, channels, inverse, parameter, tau, with_rank.
REFUSED: dict[str, tuple[str, str, dict[int, Any], str]] = {
    "rows without pixels": ("label", "exact", {0: torch.ones(2, 3, 2)}, r"rows.*\[2, 3, 2\]"),
    "rows in 4-d space": ("label", "exact", {0: torch.ones(2, 3, 2, 1, 1, 1, 1)}, "rows.*1, 1, 1"),
    "rows of integers": ("label", "exact", {0: torch.ones(2, 3, 2, 4).int()}, "rows.*int32"),
    "rows too many": ("label", "exact", {0: torch.ones(2, 4, 2, 2, 3)}, "gram.*3, 3.*4, 4"),
    "rows of another batch": ("label", "exact", {0: torch.ones(3, 3, 2, 2, 3)}, "gram"),
    "no scales": ("label", "exact", {4: []}, r"scales.*\[\]"),
    "an even scale": ("label", "exact", {4: [1, 4]}, r"scales.*odd.*\[1, 4\]"),
    "a scale of zero": ("label", "exact", {4: [0]}, r"scales.*\[0\]"),
    "a negative scale": ("label", "exact", {4: [-1]}, r"scales.*\[-1\]"),
    "a scale twice": ("label", "exact", {4: [3, 1, 3]}, r"scales.*distinct.*\[3, 1, 3\]"),
    "unknown channels": ("label", "exact", {5: "rgb"}, "channels.*'separate'.*'rgb'"),
    "unknown inverse": ("label", "exact", {6: "pinv"}, "inverse.*'damped'.*'pinv'"),
    "damped without tau": ("label", "damped", {8: None}, "tau with 'damped'.*None"),
    "tau for exact": ("label", "exact", {8: torch.ones(2).double()}, "tau with 'damped'.*'exact'"),
    "tau float32": ("label", "damped", {8: torch.ones(2)}, "tau.*float32"),
    "tau too long": ("label", "damped", {8: torch.ones(3).double()}, r"tau.*\[3\]"),
    "log_prob float32": ("label", "exact", {1: torch.ones(2, 4)}, "log_prob.*float32"),
    "log_prob of one class": ("label", "exact", {1: torch.ones(2, 1).double()}, "log_prob.*2, 1"),
    "label int32": ("label", "exact", {2: torch.zeros(2, dtype=torch.int32)}, "label.*int32"),
    "label too long": ("label", "exact", {2: torch.zeros(3, dtype=torch.int64)}, r"label.*\[3\]"),
    "label and grad": ("label", "exact", {3: torch.zeros(2, 4).double()}, "both"),
    "grad of contrasts": ("grad", "exact", {3: torch.zeros(2, 3).double()}, r"grad.*\[2, 3\]"),
    "raw without its row": ("label", "exact", {2: None}, "gram.*4, 4.*3, 3"),
    "rows on meta": ("label", "exact", {0: META}, "meta|cpu"),
    "label on meta": ("label", "exact", {2: torch.ones(2, device="meta").long()}, "label.*meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(window_ops: Any, case: str) -> None:
    """Each error names the argument, what was expected and what came."""
    mode, rule, changes, message = REFUSED[case]
    args = replaced(random_arguments(8, layout(), 4, mode, rule), changes)
    with pytest.raises(ValueError, match=message) as error:
        window_ops.window_influence(*args)
    assert "scale" in case or "window_influence" in str(error.value)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_labels_out_of_range_are_not_read(
    window_ops: Any, rule: str, label: int, request: pytest.FixtureRequest
) -> None:
    """A position outside 0..K-1 must be refused, not used as an address; or give NaN, where a
    refusal would have to wait for a GPU."""
    args = random_arguments(9, layout(), 4, "label", rule)
    args[2][1] = label
    if request.node.callspec.params["window_ops"] == "emulated":
        fi = window_ops.window_influence(*args)[0].isnan().flatten(1)
        assert fi[1].all() and not fi[0].any() and not fi[2:].any()
        return
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        window_ops.window_influence(*args)


def test_an_unknown_instruction_set_is_refused() -> None:
    args = random_arguments(10, layout(), 4, "label", "exact")
    with pytest.raises(ValueError, match="instruction set 'mmx' is not available"):
        cpu.window_influence(*args, isa="mmx")


@pytest.mark.parametrize("spatial", [(1,), (2,), (3, 1), (4, 5), (2, 3, 2)])
def test_window_columns(spatial: tuple[int, ...]) -> None:
    """The reference's own windows are those of the definition; outside stands past the last."""
    for scale in (1, 3, 5, 9):
        flat = Layout(spatial, 1, (scale,), "separate")
        got = reference_windows.window_columns(spatial, scale).tolist()
        assert [tuple(i for i in at if i < flat.pixels) for at in got] == flat.columns()
        assert all(len(set(at) - {flat.pixels}) == sum(i < flat.pixels for i in at) for at in got)
