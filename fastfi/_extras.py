"""Optional dependencies, imported when they are first needed.

``import fastfi`` needs torch and numpy only. Whatever else a part of the package uses comes with
an extra, and its absence is reported with the command that installs it.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastfi.errors import FastfiError

__all__ = ["MissingExtraError", "require"]


class MissingExtraError(FastfiError, ImportError):
    """An optional dependency is not installed or does not import; the message says what to do."""


def require(module: str, purpose: str, extra: str = "cli") -> Any:
    """Imports an optional module.

    Args:
        module: the dotted name, for example ``"pyarrow.parquet"``.
        purpose: what needs it, as the start of a sentence: ``"reading Parquet files"``.
        extra: the extra of the fastfi distribution that installs it.

    Returns:
        The module.

    Raises:
        MissingExtraError: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which cannot be imported ({error}): "
            f'pip install "fastfi[{extra}]"'
        ) from error
