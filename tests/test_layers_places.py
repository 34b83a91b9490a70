"""Where the samples lie in a model's tensors may depend on the data: rows that are sorted, routed
to experts, or freed of padding belong to other samples in the next batch.

Where the places cannot be told, the samples are taken one by one; each test says which way it means
to enter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_agreement import Written, agree, spied, texts, unpadding, vectors
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastfi
from fastfi.layers import grams
from fastfi.layers.sweeper import Sweeper
from fastfi.layers.trace import Stale

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def alone(monkeypatch) -> list[Any]:
    """Chunks whose samples were taken one by one."""
    return spied(monkeypatch, Sweeper, "_one_by_one")


@pytest.fixture
def checks(monkeypatch) -> list[Any]:
    """Checks of the samples' places in a chunk: Stale where they failed."""
    return spied(monkeypatch, grams, "_check_places")


@pytest.fixture
def replanned(monkeypatch) -> list[Any]:
    """Chunks that showed that what was known of the model no longer holds."""
    return spied(monkeypatch, Sweeper, "_plan_on")


def test_texts_of_one_length_need_no_care(alone, checks):
    agree(unpadding(), texts(4, 4, 4, 4, 4, 4))
    assert alone == [] and checks == [None]


def test_lengths_that_are_equal_on_average(alone, checks):
    """32 rows for 8 samples, but not 4 for each."""
    agree(unpadding(), texts(4, 4, 4, 4, 4, 6, 2, 4))
    assert alone == [None]
    assert [type(c) for c in checks] == [Stale] * 3  # as planned, planned again, less strictly


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4, 4, 6, 3, 4), (3, 4, 6, 2, 4, 6, 3, 4)])
def test_ragged_texts(lengths):
    """Also where the first samples show it."""
    agree(unpadding(), texts(*lengths))


def test_ragged_texts_after_equal_ones(replanned):
    net = unpadding()
    agree(net, texts(4, 4, 4, 4, 4))
    assert replanned == []
    agree(net, texts(3, 5))
    assert replanned == [None]
    agree(net, texts(5, 3, 4))


def routed(net: Any, x: Tensor) -> Tensor:
    """Each token goes to one of two experts, weighted by the router."""
    batch, length, size = x.shape
    rows = x.reshape(batch * length, size)
    weight, which = net.router(rows).softmax(1).max(1)
    out = torch.zeros_like(rows)
    for k, expert in enumerate(net.experts):
        at = (which == k).nonzero()[:, 0]
        if len(at) > 0 or not net.skip:
            out = out.index_add(0, at, expert(rows[at]).tanh() * weight[at, None])
    return net.head(out.view(batch, length, size).mean(1))


def mixture(skip: bool = True) -> Written:
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    parts = {"router": nn.Linear(4, 2, bias=False), "experts": experts, "head": nn.Linear(4, 5)}
    net = Written(routed, **parts)
    net.skip = skip
    return net


def tokens_for(net: Any, *counts: int) -> Tensor:
    """Four tokens a sample, so many of them for the first expert, in any order."""
    normal = net.router.weight.detach()[0] - net.router.weight.detach()[1]
    x = vectors(len(counts), 4, 4)
    for i, count in enumerate(counts):
        first = torch.randperm(4) < count
        side = x[i] @ normal
        flip = (side > 0) != first
        x[i, flip] -= 2 * side[flip, None] * normal / normal.square().sum()
        assert int((x[i] @ normal > 0).sum()) == count
    return x


def test_experts_with_equal_shares(alone):
    net = mixture()
    agree(net, tokens_for(net, 2, 2, 2, 2, 2, 2))
    assert alone == []


def test_experts_with_other_shares_than_in_the_first_call(checks, replanned):
    """2 of 4 tokens at first; then 3, 1 and 2, which are 2 on average."""
    net = mixture()
    agree(net, tokens_for(net, 2, 2, 2, 2, 2, 2))
    assert replanned == []
    agree(net, tokens_for(net, 3, 1, 2))
    assert replanned and any(isinstance(c, Stale) for c in checks)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("counts", [(2, 2, 2, 2, 2, 3, 1), (4, 4, 4, 4, 4, 2, 0), (1, 3, 0, 4)])
def test_experts_with_other_shares_in_one_batch(counts, skip):
    """An expert without tokens is called with none, or not at all."""
    net = mixture(skip)
    agree(net, tokens_for(net, *counts))


def sorting(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return net.head(net.first(x[order]).tanh()[order.argsort()])


@pytest.mark.parametrize("planned", ["sorted", "one", "itself"])
def test_samples_sorted_by_a_key(planned, replanned):
    """A batch that is sorted already, or has one sample, gives no hint of it."""
    net = Written(sorting, first=nn.Linear(4, 6), head=nn.Linear(6, 5))
    x = vectors(6, 4)
    first = {"sorted": x[x[:, 0].argsort()], "one": x[:1], "itself": x}[planned]
    agree(net, first)
    assert replanned == []
    agree(net, x)
    assert bool(replanned) == (planned != "itself")
    agree(net, x.flip(0))


@pytest.mark.parametrize("last", [(0, 3, 1, 1, 2, 3), (2, 1), (1,)])
def test_the_last_token_where_positions_come_first(last, checks):
    """[T * B] rows, one of which each sample's logits depend on."""

    def run(net: Any, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        rows = net.first(x.transpose(0, 1).reshape(-1, size)).tanh().view(length, batch, -1)
        return net.head(rows[x[:, 0, 0].long(), torch.arange(batch)])

    net = Written(run, first=nn.Linear(4, 6), head=nn.Linear(6, 5))
    x = vectors(len(last), 4, 4)
    x[:, 0, 0] = torch.tensor(last, dtype=torch.float64)
    agree(net, x)
    assert bool(checks) == (len(last) > 1)


def by_position(net: Any, x: Tensor) -> Tensor:
    """A layer of all tokens in one line, sample by sample or position by position."""
    batch, length, size = x.shape
    rows = (x.transpose(0, 1) if net.positions_first else x).reshape(-1, size)
    rows = net.first(rows).tanh()
    if net.positions_first:
        return net.head(rows.view(length, batch, -1)[0])
    return net.head(rows.view(batch, length, -1)[:, 0])


@pytest.mark.parametrize("positions_first", [False, True])
def test_a_layout_that_changes_between_calls(positions_first):
    net = Written(by_position, first=nn.Linear(4, 6), head=nn.Linear(6, 5))
    x = vectors(5, 3, 4)
    for net.positions_first in (positions_first, not positions_first, positions_first):
        agree(net, x)


@pytest.mark.parametrize("batch", [2, 3, 5])
@pytest.mark.parametrize("positions_first", [False, True])
def test_one_sample_first_then_more(positions_first, batch):
    """Copies of one sample tell as much of the places as different ones."""
    net = Written(by_position, first=nn.Linear(4, 6), head=nn.Linear(6, 5))
    net.positions_first = positions_first
    x = vectors(batch, 3, 4)
    agree(net, x[:1])
    agree(net, x)


def packed(net: Any, x: Tensor) -> Tensor:
    lengths = (x != 0).sum(1)
    rows = pack_padded_sequence(net.embed(x), lengths, batch_first=True, enforce_sorted=False)
    if hasattr(net, "each"):
        rows = rows._replace(data=net.each(rows.data).tanh())
    assert isinstance(rows, PackedSequence)
    return net.head(net.recurrent(rows)[1][-1])


@pytest.mark.parametrize("planned", [(8, 7, 5, 4, 3), (4, 4, 4, 4, 4), (4,)])
def test_packed_sequences(planned):
    parts = {"embed": nn.Embedding(20, 4), "recurrent": nn.GRU(4, 6, batch_first=True)}
    net = Written(packed, **parts, head=nn.Linear(6, 5))
    agree(net, texts(*planned))
    agree(net, texts(2, 5, 3, 8, 1))


def test_a_layer_of_packed_rows():
    parts = {"embed": nn.Embedding(20, 4), "recurrent": nn.GRU(4, 6, batch_first=True)}
    net = Written(packed, **parts, each=nn.Linear(4, 4), head=nn.Linear(6, 5))
    agree(net, texts(4, 4, 4, 4, 4))
    agree(net, texts(3, 5, 4, 6, 2))


def test_operations_that_differ_from_pass_to_pass():
    """Not by sample but by time: no plan can serve."""

    def run(net: Any, x: Tensor) -> Tensor:
        net.passes += 1
        h = net.first(x) if net.passes % 2 else net.second(x)
        return net.head(h.tanh())

    net = Written(run, first=nn.Linear(4, 6), second=nn.Linear(4, 6), head=nn.Linear(6, 5))
    net.passes = 0
    with pytest.raises(fastfi.OptionError, match="same operations"):
        fastfi.influence(net, vectors(4, 4), wrt="layers")
