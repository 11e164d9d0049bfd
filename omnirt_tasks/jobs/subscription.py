"""Live events as their watchers receive them; `feed` and `memory_feed` give them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from omnirt_tasks.contract import (
    Event,
)


@dataclass(frozen=True)
class Missed:
    """Events may have been lost, by a slow watcher or while the connection was away: read the log."""


class EventSource(Protocol):
    """Live events, for watchers of one job. Safe to share between threads."""

    def subscribe(self, job_id: str) -> "Subscription":
        """Start to receive the job's events; returns once nothing published from now on can be missed.

        Raises StoreUnavailable when the store cannot be reached.
        """
        ...


class EventFeed(EventSource, Protocol):
    """The live events of a process, and what else is told beside them."""

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """Call `callback` with the id of each running job whose cancel is asked for, from a thread of the feed.

        Notices may be lost with the connection; a renewal tells the same, later. Raises StoreUnavailable.
        """
        ...

    def close(self) -> None:
        """Stop receiving; every subscription ends. Idempotent."""
        ...


class Subscription(Protocol):
    """One watcher's bounded queue. Not shared between threads."""

    def next(self, timeout_s: float) -> Event | Missed | None:
        """The next live event, or None after `timeout_s`.

        A slow watcher loses events and is told so by Missed; the terminal event always arrives. Raises
        StoreUnavailable when the feed is closed.
        """
        ...

    def wake(self) -> None:
        """Let the `next` that waits, or else the next one, return None at once. Any thread may call it."""
        ...

    def close(self) -> None:
        """Stop receiving. Idempotent."""
        ...
