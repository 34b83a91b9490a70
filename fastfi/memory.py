"""Chunk sizes from a memory budget, measured on the model itself rather than guessed."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastfi.errors import LabelError, OptionError, SampleError
from fastfi.free_memory import free_memory

__all__ = [
    "ActivationMeter",
    "ChunkPlan",
    "Footprint",
    "check_budget",
    "chunks",
    "is_out_of_memory",
]

# The largest chunk that is taken without a measurement, and smaller for large samples: a network
# may keep some thousand times a sample's own size.
FIRST_CHUNK = 16
FIRST_SAMPLE_FACTOR = 2048
# On CPU, larger activations leave the caches, and from 32 MiB on the allocator maps fresh pages at
# each call: a small CNN was 1.9 times slower at 512 samples than at 256. The optimum is flat.
CPU_ACTIVATION_BYTES = 8 << 20


class ActivationMeter:
    """Context manager that counts the bytes autograd saves, each storage once, parameters not.

    Attributes:
        total: bytes saved in all.
        largest: bytes of the largest saved storage.
    """

    def __init__(self) -> None:
        self.total = 0
        self.largest = 0
        self._seen: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        owner = t if t._base is None else t._base
        if not isinstance(owner, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return t.detach()  # t itself may be the output of the node that saves it: a cycle

    def __enter__(self) -> ActivationMeter:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)


def check_budget(budget: int | None) -> None:
    """OptionError unless ``budget`` is None or a positive number of bytes."""
    if budget is not None and not (isinstance(budget, numbers.Integral) and budget > 0):
        raise OptionError(f"memory_budget: expected a positive number of bytes, got {budget!r}")


def _available(device: torch.device) -> int:
    """Bytes free on the device, for this process: half of them are the default budget."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return free_memory()


class Footprint(NamedTuple):
    """What one sample takes in a forward pass with K' - 1 backward passes, in bytes."""

    saved: int  # by autograd, in all
    largest: int  # the largest saved storage
    rows: int


# What earlier calls measured, by model and kind of input: a loop over a data loader should not
# measure each batch again.
_known: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Footprint]] = (
    weakref.WeakKeyDictionary()
)


class ChunkPlan:
    """How many samples to take at once.

    Args:
        budget: bytes for activations and rows, or None for half of what is free.
        x: the samples [B, ...].
        fixed: take this many, without a measurement (halved all the same on out-of-memory).
        model: an earlier measurement with this model and inputs like x is used again.
        variant: whatever else decides the number of rows.

    Attributes:
        size: of the next chunk.
        measured: whether ``size`` rests on a measurement yet.
    """

    def __init__(
        self,
        budget: int | None,
        x: Tensor,
        fixed: int | None = None,
        model: Any = None,
        variant: tuple[Any, ...] = (),
    ) -> None:
        self.budget = _available(x.device) // 2 if budget is None else budget
        self.device = x.device
        sample = x[0].numel() * x.element_size() * FIRST_SAMPLE_FACTOR
        self.size = fixed or max(1, min(FIRST_CHUNK, self.budget // sample))
        self.measured = fixed is not None
        self._model = model
        self._key = (x.shape[1:], x.dtype, x.device, torch.is_autocast_enabled(x.device.type))
        self._key = (*self._key, *variant)
        if fixed is None and _rememberable(model):
            known = _known.get(model, {}).get(self._key)
            if known is not None:
                self.use(known)

    def measure(self, meter: ActivationMeter, samples: int, row_bytes: int) -> None:
        """Sets the size from what ``samples`` samples kept: saved activations, as much again for
        the gradients under way, and their rows (``row_bytes``)."""
        footprint = Footprint(
            meter.total // samples, meter.largest // samples, row_bytes // samples
        )
        if _rememberable(self._model):
            _known.setdefault(self._model, {})[self._key] = footprint
        self.use(footprint)

    def use(self, footprint: Footprint) -> None:
        """Sets the size from what a sample takes."""
        self.size = max(1, self.budget // max(1, 2 * footprint.saved + footprint.rows))
        if self.device.type == "cpu" and footprint.largest > 0:
            self.size = min(self.size, max(1, CPU_ACTIVATION_BYTES // footprint.largest))
        self.measured = True


def _rememberable(model: Any) -> bool:
    # Modules live as long as their user wants them to. A lambda made anew for each call does not.
    return isinstance(model, torch.nn.Module) and isinstance(model, Hashable)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)


T = TypeVar("T")


def chunks(
    total: int, plan: ChunkPlan, run: Callable[[slice], T], order: Tensor | None = None
) -> Iterator[T]:
    """Calls run(slice) over 0..total in chunks of plan.size, which may change on the way.

    An out-of-memory error halves the chunk and tries again; with a single sample it is raised.
    The rest is cut evenly, so that no chunk is much smaller than the others.

    Args:
        order: the caller's position of each sample, where run's order is another one; errors that
            name samples name the caller's.
    """
    done = 0
    while done < total:
        left = total - done
        parts = -(-left // plan.size)
        size = -(-left // parts) if plan.measured else min(left, plan.size)
        part = slice(done, done + size)
        try:
            yield run(part)
        except SampleError as error:
            if isinstance(error, LabelError):
                raise  # checked for all samples at once: the positions are the caller's
            names = range(part.start, part.stop) if order is None else order[part].tolist()
            raise error.at(names) from error
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            plan.size, plan.measured = size // 2, True
        else:
            done = part.stop
