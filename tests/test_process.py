"""Settings of the process: made once, while anybody holds them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastfi._process import ProcessSetting


class Switch:
    """A setting with a history."""

    def __init__(self) -> None:
        self.on, self.history = False, []

    @contextmanager
    def turned(self) -> Iterator[None]:
        before, self.on = self.on, True
        self.history.append("on")
        try:
            yield
        finally:
            self.on = before
            self.history.append("off")


def test_it_lasts_until_the_last_holder_leaves() -> None:
    switch = Switch()
    setting = ProcessSetting(switch.turned)
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with setting():
            inside.set()
            leave.wait(30)
            seen.append(switch.on)

    thread = threading.Thread(target=other)
    with setting():
        thread.start()
        assert inside.wait(30)
    assert switch.on  # the first to come has left, the other thread has not
    leave.set()
    thread.join(30)
    assert seen == [True] and not switch.on
    assert switch.history == ["on", "off"]
    with setting(), setting():
        assert switch.on
    assert switch.history == ["on", "off"] * 2


def test_errors_inside_take_it_back() -> None:
    switch = Switch()
    setting = ProcessSetting(switch.turned)
    with pytest.raises(KeyError), setting():
        raise KeyError
    assert not switch.on


def test_a_setting_that_cannot_be_made_is_not_held() -> None:
    tries = []

    def make() -> Switch:
        tries.append(1)
        raise RuntimeError("cannot")

    setting = ProcessSetting(make)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot"), setting():
            pytest.fail("inside")
    assert len(tries) == 2
