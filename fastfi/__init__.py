"""fastfi: first-order local influence (FI) of neural network classifiers, exact and fast."""

from importlib.metadata import PackageNotFoundError, version

from fastfi.backends import backends
from fastfi.direction import direction
from fastfi.errors import (
    DataError,
    FastfiError,
    InputError,
    LabelError,
    ModelModeError,
    NonFiniteError,
    OptionError,
    OutputError,
    WeightsError,
)
from fastfi.influence import Influence, influence
from fastfi.inverse import Damped, Exact, Truncated

try:
    __version__ = version("fastfi")
except PackageNotFoundError:  # used from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "Damped",
    "DataError",
    "Exact",
    "FastfiError",
    "Influence",
    "InputError",
    "LabelError",
    "ModelModeError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "Truncated",
    "WeightsError",
    "__version__",
    "backends",
    "direction",
    "influence",
]
