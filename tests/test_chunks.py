"""Chunks: sizes from a budget, recovery from out-of-memory, results that do not depend on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastfi
from fastfi import memory
from fastfi.memory import ActivationMeter, ChunkPlan, chunks

pytestmark = pytest.mark.usefixtures("one_thread")


class Watched(nn.Module):
    """A network that records the batch sizes it is called with and may run out of memory."""

    def __init__(self, most: int | None = None, error: Exception | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 4))
        self.sizes: list[int] = []
        self.most, self.error = most, error

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.most is not None and len(x) > self.most:
            assert self.error is not None
            raise self.error
        return self.net(x)


X = torch.randn(100, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(100) % 4
CPU_ERROR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [CPU_ERROR, torch.OutOfMemoryError("CUDA"), MemoryError()])
@pytest.mark.parametrize("most", [1, 5, 30])
@pytest.mark.parametrize("options", [{}, {"assume_full_rank": True}, {"lump": 0.2}])
def test_out_of_memory_halves_the_chunk_and_loses_nothing(error, most, options):
    want = fastfi.influence(Watched(), X, Y, **options)
    model = Watched(most, error)
    got = fastfi.influence(model, X, Y, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert max(model.sizes) > most  # it was reached, or the test shows nothing


def test_out_of_memory_with_one_sample_is_raised():
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        fastfi.influence(Watched(0, torch.OutOfMemoryError("CUDA")), X, Y)


def test_other_errors_are_raised_at_once():
    model = Watched(50, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fastfi.influence(model, X, Y, assume_full_rank=True)
    assert model.sizes == [100]


def test_a_small_pass_is_measured_and_thrown_away():
    model = Watched()
    fastfi.influence(model, X, Y)
    assert model.sizes == [2, 100]
    model.sizes.clear()
    fastfi.influence(model, X, Y)  # remembered
    assert model.sizes == [100]
    # Saved by autograd: the input copy (36 floats), the hidden layer (64), twice; 3 rows of 36.
    each = 4 * (2 * (36 + 64) + 3 * 36)
    fastfi.influence(model, X, Y, memory_budget=20 * each)
    assert max(model.sizes[1:]) <= 20
    assert min(model.sizes[1:]) >= 10  # not needlessly small, and evenly cut


def test_what_was_measured_is_remembered_for_this_model_and_kind_of_input_only():
    model = Watched()
    fastfi.influence(model, X, Y)
    for x, first in [(X, 100), (X.double(), 2), (X.reshape(100, 36), 2)]:
        model.sizes.clear()
        model.to(x.dtype)
        fastfi.influence(model, x, Y)
        assert model.sizes[0] == first
    model.float().sizes.clear()
    fastfi.influence(model, X, Y, memory_budget=1)
    assert model.sizes == [1] * 100  # the budget is the call's own


def test_tensors_that_the_model_overwrote_are_an_error_on_every_call():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.a(x))
            z = self.b(h[:, :3])
            h.mul_(0)
            return z

    model = Overwrites().eval()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fastfi.influence(model, torch.rand(40, 6))


def test_models_that_use_torch_func_cannot_be_measured_and_work_all_the_same():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def model(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda v: inner(v).square().sum()))(x)

    x = torch.rand(40, 6)
    got = fastfi.influence(model, x)
    want = fastfi.influence(model, x[:3])
    torch.testing.assert_close(got[:3], want, rtol=1e-4, atol=0)


def test_a_budget_below_one_sample_still_works():
    model = Watched()
    fastfi.influence(model, X[:5], Y[:5], memory_budget=1)
    assert model.sizes == [2] + [1] * 5  # the first is the measurement


def test_the_meter_counts_each_saved_storage_once():
    x = torch.randn(8, 36, requires_grad=True)
    with ActivationMeter() as meter:
        y = x.exp()  # saves its result
        (y * y).sum()  # saves the same storage twice
    assert meter.total == meter.largest == 8 * 36 * 4
    model = nn.Linear(36, 4)
    with ActivationMeter() as meter:
        model(x * 1.0)
    assert meter.total == 8 * 36 * 4  # not the parameters


def test_cpu_chunks_keep_activations_in_cache():
    plan = ChunkPlan(1 << 40, X)
    meter = ActivationMeter()
    meter.total = meter.largest = 16 * (1 << 20)
    plan.measure(meter, 16, 0)
    assert plan.size == memory.CPU_ACTIVATION_BYTES >> 20


def test_chunks_cover_everything_once():
    for total in (1, 2, 15, 16, 17, 33, 100):
        for size in (1, 3, 16, 200):
            seen: list[int] = []
            plan = ChunkPlan(None, X, fixed=size)
            for part in chunks(total, plan, lambda p: p):
                assert part.stop - part.start <= size
                seen += range(part.start, part.stop)
            assert seen == list(range(total))


def test_lumped_samples_of_a_chunk_need_similar_numbers_of_rows():
    """With lump, samples are computed in the order of their class counts and returned in theirs."""
    model = nn.Linear(12, 12, bias=False)
    nn.init.eye_(model.weight)
    calls = []

    def counted(x: Tensor) -> Tensor:
        z = model(x)
        if z.requires_grad:
            calls.append(0)
            z.register_hook(lambda g: calls.__setitem__(-1, calls[-1] + 1))
        return z

    torch.manual_seed(0)
    easy = torch.randn(48, 12)
    easy[:, 0] += 30  # one class holds all the mass
    hard = torch.randn(16, 12) * 0.1
    x = torch.cat([easy, hard])[torch.randperm(64)]
    # Saved: 12 floats, twice; rows: 11 of 12 floats. Chunks of 16.
    got = fastfi.influence(counted, x, lump=1e-3, memory_budget=16 * 4 * (2 * 12 + 11 * 12))
    # At full rank cross-entropy does not change by lumping.
    want = fastfi.influence(model, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-30)
    calls = [n for n in calls if n > 0]  # the measurement has no backward pass
    assert calls[0] == 1
    assert calls[-1] == 11
