"""The command line: ``fastfi score``, ``fastfi map`` and ``fastfi doctor``."""

from __future__ import annotations

import sys

from fastfi._extras import MissingExtraError, require

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``fastfi`` command. Exits with 0, 2 (a bad input) or 130 (Ctrl-C)."""
    try:
        require("typer", "the command line")
        require("rich", "the command line")
    except MissingExtraError as error:
        print(f"fastfi: {error}", file=sys.stderr)
        sys.exit(2)
    from fastfi.cli._app import app

    app(prog_name="fastfi")
