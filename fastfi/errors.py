"""Every exception that fastfi raises on purpose.

All derive from :class:`FastfiError`, and from the built-in class that a caller would otherwise have
caught (``ValueError``, ``RuntimeError``). Messages say what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DataError",
    "FastfiError",
    "InputError",
    "LabelError",
    "ModelModeError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "ResumeError",
    "SampleError",
    "WeightsError",
    "WriteError",
]


def list_some(values: Sequence[int], most: int = 10) -> str:
    """``"3, 7, 12, ... (20 in all)"``."""
    text = ", ".join(map(str, values[:most]))
    return text + (f", ... ({len(values)} in all)" if len(values) > most else "")


class FastfiError(Exception):
    """Base class of every error raised by fastfi."""


class SampleError(FastfiError, ValueError):
    """An error about certain samples of a batch.

    Attributes:
        indices: their positions in the batch, in increasing order; empty where all are meant.
    """

    def __init__(self, message: str, indices: Sequence[int] = ()) -> None:
        """``{samples}`` in the message stands for the positions."""
        self.indices = tuple(sorted(indices))
        self._message = message
        super().__init__(message, indices)

    def __str__(self) -> str:
        return self._message.replace("{samples}", list_some(self.indices))

    def of_one(self) -> str:
        """The message for a sample that the reader knows by other means, without its position."""
        return self._message.replace(" in samples {samples}", "")

    def at(self, positions: Sequence[int]) -> Self:
        """The same error for samples that stand at other positions of the caller's batch."""
        return type(self)(self._message, [positions[i] for i in self.indices])


class InputError(FastfiError, ValueError):
    """The input ``x`` cannot be used: not floating point, empty, wrong number of dimensions."""


class LabelError(SampleError):
    """The labels ``y`` cannot be used: wrong dtype, wrong length, out of range."""


class ModelModeError(FastfiError, RuntimeError):
    """The model is in a state in which its samples are random or depend on one another."""


class OutputError(SampleError):
    """The model returned something that is not a batch of logits, log-probabilities or
    probabilities."""


class OptionError(FastfiError, ValueError):
    """An option (``inverse``, ``objective``, ``lump``, ...) has a value that has no meaning."""


class NonFiniteError(SampleError):
    """Pixels or logits are NaN or infinite."""


class DataError(FastfiError, ValueError):
    """A data file or folder cannot be read; the message names it."""


class WeightsError(FastfiError, ValueError):
    """A weights file cannot be read safely or does not fit the model (the message names keys)."""


class ResumeError(FastfiError, ValueError):
    """Results are there already, of another model, data set or configuration; the message says
    what differs."""


class WriteError(FastfiError, OSError):
    """A result cannot be written; the message names it."""
