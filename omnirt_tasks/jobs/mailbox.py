"""A watcher's bounded queue: what both feeds hand to their subscribers."""

from collections import deque
from collections.abc import Callable
from threading import Condition

from omnirt_tasks.contract import Event
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.subscription import Missed

MAILBOX_SIZE = 256


class Mailbox:
    """A Subscription. One thread reads; any may offer.

    When it is full the oldest events are dropped and the reader is told once that it missed some, so the newest
    event, and with it the terminal one, always arrives.
    """

    def __init__(self, on_close: Callable[["Mailbox"], None], size: int = MAILBOX_SIZE) -> None:
        self._events: deque[Event] = deque()
        self._size = size
        self._missed = False
        self._cut_off = False
        self._woken = False
        self._changed = Condition()
        self._on_close = on_close

    def offer(self, event: Event) -> None:
        """Add an event; never blocks."""
        with self._changed:
            if len(self._events) >= self._size:
                self._events.clear()
                self._missed = True
            self._events.append(event)
            self._changed.notify()

    def miss(self) -> None:
        """Tell the reader that events may have been lost."""
        with self._changed:
            self._missed = True
            self._changed.notify()

    def cut_off(self) -> None:
        """Tell the reader that nothing will come any more: the feed is closed."""
        with self._changed:
            self._cut_off = True
            self._changed.notify()

    def wake(self) -> None:
        """See Subscription."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def next(self, timeout_s: float) -> Event | Missed | None:
        """See Subscription. Raises StoreUnavailable once the feed is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._missed or self._cut_off or self._woken, timeout_s)
            if self._woken:
                self._woken = False
                return None
            if self._missed:
                self._missed = False
                return Missed()
            if self._events:
                return self._events.popleft()
            if self._cut_off:
                raise StoreUnavailable("This process is closing its event feed.", "Watch the job again.")
            return None

    def close(self) -> None:
        """Stop receiving. Idempotent."""
        self._on_close(self)
