"""Reading ahead for a GPU: order, errors in their place, at most one ahead, nothing left behind."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from fastfi.cli._batches import ScoreOptions, process
from fastfi.data import Batch, ImageSource
from fastfi.errors import DataError, NonFiniteError, OptionError, OutputError
from fastfi.scoring import prefetch
from fastfi.scoring.prefetch import ahead, on_device

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WAIT = 60.0  # seconds, for what happens at once unless it is broken


def batch(k: int, size: int = 2) -> Batch:
    x = torch.full((size, 1, 3, 3), float(k))
    return Batch(range(k * size, (k + 1) * size), x, torch.full((size,), k))


class Reader:
    """Batches 0, 1, ...; knows how many were asked for, from which threads, and whether it was
    closed. ``failing`` maps the number of a batch to the error of reading it; ``begin`` is called
    before each is read."""

    def __init__(self, count, failing=None, begin=lambda: None):
        self.count, self.failing, self.begin = count, failing or {}, begin
        self.asked = threading.Semaphore(0)
        self.begun, self.closed, self.threads, self.read = 0, False, set(), []

    def __call__(self):
        try:
            for k in range(self.count):
                self.begun += 1
                self.threads.add(threading.current_thread())
                self.begin()
                self.asked.release()
                if k in self.failing:
                    raise self.failing[k]
                one = batch(k)
                self.read.append(weakref.ref(one.x))
                yield one
                del one
        finally:
            self.closed = True


class Arrived:
    def __init__(self, x, waits):
        self.x, self.waits = x, waits

    def wait(self):
        self.waits.append(threading.current_thread())
        return self.x


class FakeTransfer:
    """Copies in ordinary memory. ``failing`` maps the number of a copy to its error."""

    def __init__(self, device=None, failing=None):
        self.failing = failing or {}
        self.pinned, self.copied, self.copies, self.waits, self.threads = [], [], 0, [], set()

    def pin(self, x):
        self.threads.add(threading.current_thread())
        pinned = x.clone()
        self.pinned.append(weakref.ref(pinned))
        return pinned

    def copy(self, x):
        self.threads.add(threading.current_thread())
        self.copies += 1
        if self.copies - 1 in self.failing:
            raise self.failing[self.copies - 1]
        copied = x.clone()
        self.copied.append(weakref.ref(copied))
        return Arrived(copied, self.waits)


def reading():
    """Threads of ours that are alive."""
    return [t for t in threading.enumerate() if t.name.startswith("fastfi-read-ahead")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert reading() == []


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_order_and_contents(count):
    reader, transfer = Reader(count), FakeTransfer()
    got = list(ahead(reader(), transfer))
    assert len(got) == transfer.copies == count
    for k, (one, x) in enumerate(got):
        want = batch(k)
        assert list(one.ids) == list(want.ids)
        assert torch.equal(one.x, want.x) and torch.equal(one.y, want.y)
        assert torch.equal(x, want.x) and x is not one.x
    assert reader.closed


def test_the_next_batch_is_read_meanwhile_and_no_other():
    """While batch k is in use, exactly batch k + 1 is asked for."""
    reader = Reader(6)
    for k, _ in enumerate(ahead(reader(), FakeTransfer())):
        if k == 0:
            assert reader.asked.acquire(timeout=WAIT)  # itself
        if k < 5:
            assert reader.asked.acquire(timeout=WAIT)  # the next
        time.sleep(0.02)  # time to do wrong
        assert reader.begun == min(k + 2, 6)


def test_what_is_held_when_a_batch_is_read():
    """The batch that was handed over, pinned and on the device: no earlier one, none unpinned."""
    transfer, held = FakeTransfer(), []

    def count():
        everything = (reader.read, transfer.pinned, transfer.copied)
        held.append([sum(r() is not None for r in refs) for refs in everything])

    reader = Reader(8, begin=count)
    for one, x in ahead(reader(), transfer):  # enumerate would hold one more
        k = int(one.y[0])
        while k < 7 and len(held) < k + 2:  # until the next is being read
            assert reader.asked.acquire(timeout=WAIT)
        del one, x
    assert held == [[0, 0, 0]] + [[0, 1, 1]] * 7


def test_nothing_is_held_while_waiting_for_a_slow_read():
    """Not the batch that was used."""
    transfer, seen = FakeTransfer(), []

    def wait():
        end = time.monotonic() + 10.0
        while any(r() is not None for r in transfer.pinned + transfer.copied):
            if time.monotonic() > end:
                raise DataError("the batches before are still held")
            time.sleep(0.001)

    for one, x in ahead(Reader(4, begin=wait)(), transfer):
        seen.append(int(one.y[0]))
        del one, x
    assert seen == [0, 1, 2, 3]


def test_who_does_what():
    """Reading, pinning and copying in one thread; waiting for the copy where it is used."""
    reader, transfer = Reader(4), FakeTransfer()
    assert len(list(ahead(reader(), transfer))) == 4
    (thread,) = reader.threads
    assert transfer.threads == {thread}
    assert thread is not threading.current_thread()
    assert transfer.waits == [threading.current_thread()] * 4


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("where", ["read", "copy"])
def test_an_error_takes_its_batchs_place(k, where):
    """After all earlier batches, as itself."""
    error = DataError("row 7 is damaged")
    reader = Reader(5, {k: error} if where == "read" else None)
    transfer = FakeTransfer(failing={k: error} if where == "copy" else None)
    seen = []
    with pytest.raises(DataError) as caught:
        for one, _ in ahead(reader(), transfer):
            seen.append(int(one.y[0]))
            time.sleep(0.01)  # the next one has failed by now
    assert caught.value is error
    assert seen == list(range(k))
    assert reader.closed


@pytest.mark.parametrize("used", [0, 1, 3])
def test_stopping_early(used):
    reader = Reader(100)
    batches = ahead(reader(), FakeTransfer())
    for _ in range(used):
        next(batches)
    batches.close()
    assert reading() == []
    assert reader.begun <= used + 1 and (used == 0 or reader.closed)


def test_stopping_early_waits_for_the_read_under_way():
    """A reader is never closed while it runs."""
    go, order = threading.Event(), []

    def read():
        try:
            yield batch(0)
            go.wait(WAIT)
            order.append("read")
            yield batch(1)
        finally:
            order.append("closed")

    batches = ahead(read(), FakeTransfer())
    next(batches)
    threading.Timer(0.05, go.set).start()
    batches.close()
    assert order == ["read", "closed"]


def test_a_failing_read_of_a_batch_that_nobody_wants():
    """The caller stopped before it."""
    reader = Reader(3, {1: DataError("damaged")})
    batches = ahead(reader(), FakeTransfer())
    next(batches)
    assert reader.asked.acquire(timeout=WAIT) and reader.asked.acquire(timeout=WAIT)
    batches.close()


def test_an_iterator_that_cannot_be_closed():
    assert [int(b.y[0]) for b, _ in ahead(iter([batch(0), batch(1)]), FakeTransfer())] == [0, 1]


def test_the_cpu_reads_in_no_thread_and_only_when_asked():
    reader = Reader(3)
    for k, (one, x) in enumerate(on_device(reader(), CPU)):
        assert reader.begun == k + 1
        assert x is one.x  # no copy
    assert reader.threads == {threading.current_thread()}


# The whole of `process`, on a GPU that is none.


class Images(ImageSource):
    format, length, shape, labelled = "test", None, (1, 3, 3), True
    path = Path("images")

    def __init__(self, reader):
        self.reader = reader

    def _read(self, batch_size):
        yield from self.reader()


def run(reader, work, monkeypatch, device=GPU, failing=None):
    monkeypatch.setattr(prefetch, "SideStream", lambda d: FakeTransfer(d, failing))
    options = ScoreOptions("true", {}, device, batch_size=2)
    return process(torch.nn.Flatten(), Images(reader), options, work)


def total(x, y, one):
    return float(x.sum()), y.tolist(), list(one.ids)


def test_process_gives_the_same_on_both(monkeypatch):
    want = list(run(Reader(5), total, monkeypatch, CPU))
    assert len(want) == 5 and want[1] == (18.0, [1, 1], [2, 3])
    assert list(run(Reader(5), total, monkeypatch)) == want


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_process_is_interrupted(monkeypatch, device, error):
    """In the work on a batch: the reader is closed before the error is seen."""
    reader = Reader(9)

    def work(x, y, one):
        if y[0] == 2:
            raise error
        return int(y[0])

    seen = []
    with pytest.raises(error) as caught:  # whose traceback holds the frames
        for k in run(reader, work, monkeypatch, device):
            seen.append(k)
    assert seen == [0, 1]
    assert reading() == [] and reader.closed
    assert caught.value.__traceback__ is not None
    assert reader.begun <= (3 if device == CPU else 4)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_process_is_closed_early(monkeypatch, device):
    reader = Reader(9)
    results = run(reader, total, monkeypatch, device)
    next(results)
    results.close()
    assert reading() == [] and reader.closed


@pytest.mark.parametrize("device", [CPU, GPU])
def test_process_names_the_images_of_the_right_batch(monkeypatch, device):
    def work(x, y, one):
        if y[0] == 2:
            raise NonFiniteError("not finite", (1,))
        return int(y[0])

    with pytest.raises(NonFiniteError, match="image 5: not finite"):
        list(run(Reader(9), work, monkeypatch, device))


def test_process_out_of_memory_of_the_copy(monkeypatch):
    """The batch ahead needs memory too."""
    results = run(Reader(4), total, monkeypatch, failing={2: torch.OutOfMemoryError("full")})
    assert len([next(results), next(results)]) == 2
    with pytest.raises(OptionError, match=r"not enough memory on cuda .*--batch-size.*full"):
        next(results)


def test_process_a_model_that_fails(monkeypatch):
    options = ScoreOptions("true", {}, GPU, batch_size=2)
    monkeypatch.setattr(prefetch, "SideStream", FakeTransfer)
    with pytest.raises(OutputError, match="the model fails on an image"):
        list(process(torch.nn.Linear(2, 2), Images(Reader(3)), options, total))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """Batches arrive whole, although the stream that uses them lags behind the copies, which get
    the memory of batches that the host has dropped."""
    size = 1 << 14
    weight = torch.randn(2048, 2048, device=GPU)
    sums = []
    for one, x in on_device((batch(k, size) for k in range(40)), GPU):
        assert one.x.is_pinned() and x.is_cuda
        for _ in range(5):
            weight = torch.tanh(weight @ weight)
        sums.append(x.double().sum())
        del one, x
    assert [float(s) for s in sums] == [float(k * size * 9) for k in range(40)]
