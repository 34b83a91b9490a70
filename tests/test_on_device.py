"""Every public call on every device that is there, against float64 on the CPU, sample by sample.

On the CPU this compares a batch of seven with its samples alone; on a GPU it compares the devices
as well. Float64 networks have to agree within the contract of the solves, float32 ones within the
contract from end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from architectures import build
from conftest import Forwarded, forwarded, there
from torch import Tensor, nn

import fastfi
from bench.gpu_clock import precision
from fastfi._ops import OP_NAMES

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAMES = ["mlp", "cnn", "depthwise", "conv1d", "transposed2d", "vit", "swin", "reused", "norms",
         "in_place"]  # fmt: skip
IMAGES = ["cnn", "resnet18", "conv1d", "vit"]
RULES = ("exact", "truncated", "damped")

pytestmark = pytest.mark.usefixtures("one_thread", "ieee")


@pytest.fixture
def ieee() -> Iterator[None]:
    """Float32 is float32: cuDNN's convolutions would be TF32."""
    with precision(tf32=False):
        yield


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 on the CPU, seven samples, and labels."""
    model, x = build(name)
    torch.manual_seed(len(name))
    x = torch.cat([x, x[:1] + torch.randn(7 - len(x), *x.shape[1:], dtype=x.dtype)])
    with torch.no_grad():
        z = model(x)
    return model, x, torch.arange(7) % z.shape[1]


def on(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = network(name)
    return deepcopy(model).to(device, dtype), x.to(device, dtype), y.to(device)


def wrts(name: str) -> list[Any]:
    """Every kind: words, and a list of a module and a parameter."""
    model = network(name)[0]
    parameters = [n for n, p in model.named_parameters() if p.requires_grad]
    module = next(n for n in (p.split(".")[0] for p in parameters) if "." not in n)
    return ["input", "params", "all", "layers", [module, parameters[-1]]]


def alone(name: str, call: Any) -> list[Any]:
    """What a call returns for each sample by itself, in float64 on the CPU."""
    model, x, y = network(name)
    return [call(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-8 if dtype == torch.float64 else 1e-3


def assert_agree(got: Tensor, want: Tensor, top: Tensor, dtype: torch.dtype) -> None:
    """Within the contract. Blocks that hardly move the logits show rounding noise, a millionth of
    what the sample's FI is at full rank in float32, and its square in float64.

    Args:
        top: [B], that FI.
    """
    noise = 1e-6 if dtype == torch.float32 else 1e-12
    room = tolerance(dtype) * want.abs() + noise * top.view(-1, *[1] * (want.dim() - 1))
    error = (got.cpu().double() - want.double()).abs()
    assert got.shape == want.shape
    assert bool((error <= room).all()), f"off by {float((error / room).max()):.3g} x allowed"


def full_rank(out: Any) -> Tensor:
    """(1 - P_y) / P_y of results."""
    log_prob = torch.cat([r.log_prob for r in out])
    return torch.expm1(-log_prob)


def influence(model: nn.Module, x: Tensor, y: Tensor, wrt: Any, rule: str) -> Any:
    return fastfi.influence(
        model, x, y, wrt=wrt, inverse=rule, full_output=True, dtype=torch.float64
    )


@cache
def expected(name: str) -> dict[tuple[int, str], tuple[Tensor, Tensor | None, Tensor]]:
    """FI, rank and full-rank FI of every sample alone, by number of the wrt and rule."""
    found = {}
    for i, wrt in enumerate(wrts(name)):
        for rule in RULES:
            one = alone(name, lambda m, a, b: influence(m, a, b, wrt, rule))  # noqa: B023
            rank = None if rule == "damped" else torch.cat([r.rank for r in one])
            found[i, rule] = torch.cat([r.fi for r in one]), rank, full_rank(one)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_influence(name: str, dtype: torch.dtype, device: str) -> None:
    model, x, y = on(name, device, dtype)
    for (i, rule), (want, rank, top) in expected(name).items():
        got = influence(model, x, y, wrts(name)[i], rule)
        tensors = [t for t in (got.fi, got.rank, got.label, got.log_prob) if t is not None]
        assert all(t.device.type == device for t in tensors)
        if rank is None:
            assert_agree(got.fi, want, top, dtype)
            continue
        # The contract is about blocks whose rank is clear: where it is not K - 1 (in Exact), FI is
        # as ill-conditioned as the rows, and float32 may decide another.
        same = got.rank.cpu() == rank
        assert bool(same.all()) if dtype == torch.float64 else float(same.double().mean()) > 0.8
        if rule == "exact":
            same &= rank == x_classes(name) - 1
        assert bool(same.any()) or i == 4, "no block of full rank: nothing was compared"
        fi, want = (torch.where(same, t.cpu().double(), 0.0) for t in (got.fi, want))
        if rule == "exact" or dtype == torch.float64:
            assert_agree(fi, want, top, dtype)


def x_classes(name: str) -> int:
    model, x, _ = network(name)
    with torch.no_grad():
        return model(x).shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IMAGES)
def test_maps_and_regions(name: str, dtype: torch.dtype, device: str) -> None:
    model, x, y = on(name, device, dtype)
    spatial = x.shape[2:]
    regions = torch.arange(spatial.numel()).view(spatial) % 5 - 1

    def maps(m: Any, a: Tensor, b: Tensor, **more: Any) -> Any:
        return fastfi.influence_map(m, a, b, scales=(3, 1), full_output=True, **more)

    def parts(m: Any, a: Tensor, b: Tensor, **more: Any) -> Any:
        r = regions.to(a.device)
        return fastfi.region_influence(m, a, b, r, inverse="damped", full_output=True, **more)

    for call in (maps, parts):
        got = call(model, x, y, dtype=torch.float64, memory_budget=1 << 20)
        one = alone(name, call)
        assert got.fi.device.type == got.log_prob.device.type == device
        assert_agree(got.fi, torch.cat([r.fi for r in one]), full_rank(one), dtype)
        assert float(got.fi.max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_direction(name: str, dtype: torch.dtype, device: str) -> None:
    """The unit vectors agree up to the error of FI: |v - w|^2 = 2 - 2 v.w, no sign to choose."""
    model, x, y = on(name, device, dtype)
    got = fastfi.direction(model, x, y, inverse="damped", memory_budget=1 << 20)
    want = torch.cat(alone(name, lambda m, a, b: fastfi.direction(m, a, b, inverse="damped")))
    assert got.device.type == device and got.dtype == dtype
    distance = (got.cpu().double() - want).flatten(1).norm(dim=1)
    assert float(distance.max()) <= tolerance(dtype)
    assert torch.allclose(got.flatten(1).norm(dim=1).cpu().double(), torch.ones(7).double())


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_ranks_and_verification(name: str, device: str) -> None:
    model, x, _ = on(name, device, torch.float64)
    found = fastfi.check_rank(model, x, wrt="layers", memory_budget=1 << 20)
    one = alone(name, lambda m, a, b: fastfi.check_rank(m, a, wrt="layers"))
    assert {t.device.type for t in (found.rank, found.margin, found.full)} == {device}
    # Gram matrices lose half the digits of small singular values.
    want = torch.cat([r.margin for r in one])
    torch.testing.assert_close(found.margin.cpu(), want, rtol=1e-6, atol=1e-7)
    clear = want > 1e-6
    assert bool(clear.any())
    assert torch.equal(found.rank.cpu()[clear], torch.cat([r.rank for r in one])[clear])
    proof = fastfi.layers.verify(model, x[:3])
    assert proof.error.device.type == device
    assert proof.disagree == () and float(proof.error.max()) <= proof.bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attack(dtype: torch.dtype, device: str) -> None:
    """The same pixels, and what the attack says of its own result is what the model says."""
    model, x, y = on("cnn", device, dtype)
    x = x.sigmoid()
    scores = torch.rand(7, *x.shape[2:], generator=torch.Generator().manual_seed(3)).to(device)
    hit = fastfi.attack.one_pixel(model, x, y, scores, pixels=2)
    assert {t.device.type for t in hit} == {device}
    best = scores.cpu().flatten(1).topk(2).indices
    flat = hit.positions[..., 0] * x.shape[3] + hit.positions[..., 1]
    assert torch.equal(flat.cpu(), best)
    with torch.no_grad():
        after = model(hit.x).double().log_softmax(1)
    assert torch.equal(after.argmax(1), hit.label_after)
    log_prob = after.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(hit.log_prob_after, log_prob, rtol=tolerance(dtype), atol=1e-6)
    assert bool((hit.log_prob_after <= hit.log_prob_before + 1e-6).all())


def test_a_recurrent_network(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cuDNN, which differentiates recurrent layers in training mode alone."""
    if device == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    model, x, y = on("lstm", device, torch.float64)

    def call(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return fastfi.influence(m, a, b, wrt="layers", inverse="damped")

    got, want = call(model, x, y), torch.cat(alone("lstm", call))
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-12 * float(want.max()))


@pytest.mark.parametrize("name", ["embedding", "tied_embedding"])
def test_tokens(name: str, device: str) -> None:
    model, x = build(name)

    def call(m: Any, a: Tensor) -> Tensor:
        return fastfi.influence(m, a, wrt="layers", inverse="damped")

    got = call(deepcopy(model).to(device), x.to(device))
    want = torch.cat([call(model, x[i : i + 1]) for i in range(len(x))])
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-12 * float(want.max()))


def test_labels_may_be_elsewhere(device: str) -> None:
    """Labels are brought to the samples' device, whatever they come as."""
    model, x, y = on("mlp", device, torch.float64)
    want = fastfi.influence(model, x, y)
    for labels in (y.cpu(), y.tolist(), y.cpu().numpy()):
        assert torch.equal(fastfi.influence(model, x, labels), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU's kernels refuse these labels")
@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_labels_outside_the_classes_give_nan(label: int) -> None:
    """A GPU's kernel cannot raise without being waited for: that sample's FI is NaN, nothing is
    read out of bounds, and the others are what they were."""
    if "C++" not in fastfi.backends()["solve_damped"]["cuda"]:
        pytest.skip("the reference's own indexing stops the device")
    rows = torch.randn(3, 3, 5, dtype=torch.float64, device="cuda")
    log_prob = torch.log_softmax(torch.zeros(3, 4, dtype=torch.float64, device="cuda"), 1)
    labels = torch.tensor([1, 2, 3], device="cuda")
    tau = torch.ones(3, dtype=torch.float64, device="cuda")
    wrong = labels.clone()
    wrong[1] = label
    for op, last in (("exact", 1e-9), ("truncated", 1e-3), ("damped", tau)):
        solve = getattr(torch.ops.fastfi, f"solve_{op}")
        want, got = (solve(rows @ rows.mT, log_prob, y, None, last) for y in (labels, wrong))
        want, got = (out if isinstance(out, Tensor) else out[0] for out in (want, got))
        assert bool(got[1].isnan()) and torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("wrt", ["input", "layers"])
def test_a_model_on_another_device(wrt: str, device: str) -> None:
    """An error that speaks of devices, and no result."""
    model, x, y = on("mlp", device, torch.float32)
    elsewhere = "cpu" if device == "cuda" else "meta"
    with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
        fastfi.influence(model.to(elsewhere), x, y, wrt=wrt, inverse="damped")


def strided() -> Iterator[Tensor]:
    base = torch.randn(5, 4, 6)
    yield base[1:, :, ::2]
    yield base.transpose(0, 2)
    yield base[:, :1].expand(5, 4, 6)
    yield base[2:3]
    yield base


def test_tensors_go_elsewhere_as_they_lie(device: str) -> None:
    """What ``--device`` rests on: numbers, strides and offsets arrive."""
    for t in strided():
        got = there(t, device)
        assert got.device.type == device and torch.equal(got.cpu(), t)
        assert got.stride() == t.stride()
        assert got.data_ptr() % 16 == t.data_ptr() % 16


def test_operators_are_forwarded(device: str) -> None:
    """Inside, every operator gets its tensors on the device; results are back on the CPU, right,
    and outside it is itself again."""
    seen: list[str] = []

    def gram(rows: Tensor) -> Tensor:
        seen.append(rows.device.type)
        return right(rows)

    rows, right = torch.randn(2, 3, 5), torch.ops.fastfi.gram
    assert torch.equal(Forwarded(gram, device)(rows), right(rows.to(device)).cpu())
    assert seen == [device]
    with forwarded(torch.ops.fastfi, device):
        found = [getattr(torch.ops.fastfi, name) for name in OP_NAMES]
        assert all(isinstance(op, Forwarded) for op in found)
        got = torch.ops.fastfi.linear_gram(rows, [rows, 2 * rows], True)
        assert torch.ops.fastfi.gram.default is right.default
    assert torch.ops.fastfi.gram is right
    want = torch.ops.fastfi.linear_gram(rows, [rows, 2 * rows], True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    assert got.device.type == "cpu"
