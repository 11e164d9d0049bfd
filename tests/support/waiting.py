"""Waiting for what happens, instead of for seconds."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.01


def eventually(probe: Callable[[], T], timeout_s: float = 10.0, *, told: Callable[[], str] | None = None) -> T:
    """The first truthy value of `probe`, asked again and again.

    Raises AssertionError after `timeout_s`, with the last value, and what `told` says (a process's output, say).
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            more = f"\n{told()}" if told is not None else ""
            raise AssertionError(f"not within {timeout_s} s; last seen: {value!r}{more}")
        time.sleep(POLL_S)
