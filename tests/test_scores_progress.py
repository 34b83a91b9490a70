"""fastfi.scoring.progress where rich is not installed."""

from __future__ import annotations

import io
import sys

import pytest

from fastfi._extras import MissingExtraError
from fastfi.scoring.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)


@pytest.mark.parametrize(
    ("show", "shown"), [(None, ""), (False, ""), (True, "scored 3 of 3, 0 s left")]
)
def test_elsewhere_it_is_not_needed(monkeypatch, show, shown):
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with progress(3, show) as advance:
        advance(3)
    assert err.getvalue().startswith(shown) and bool(err.getvalue()) == bool(shown)


def test_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as pythonw has it
    with progress(3) as advance:
        advance(3)


def test_a_terminal_needs_it_for_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for show in (None, True):
        with (
            pytest.raises(MissingExtraError, match=r"showing progress needs rich.*fastfi\[score\]"),
            progress(3, show),
        ):
            pass
    with progress(3, False) as advance:
        advance(3)
