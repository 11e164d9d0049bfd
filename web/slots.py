"""How many may hold on at once: a bound per owner and in all, so that watchers never take every thread."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from omnirt_tasks.errors import TooManyStreams


class Slots:
    """Counts what is held. Safe to share between threads."""

    def __init__(self, *, per_owner: int, total: int, what: str) -> None:
        """`what` names the held things in the error, in the plural."""
        self._per_owner = per_owner
        self._total = total
        self._what = what
        self._held: Counter[str] = Counter()
        self._lock = Lock()

    def take(self, owner: str) -> "Slot":
        """A slot for the owner. Raises TooManyStreams when the owner, or all together, hold as many as allowed."""
        with self._lock:
            if self._held[owner] >= self._per_owner:
                raise TooManyStreams(f"This key holds {self._per_owner} {self._what}, its limit.", "Close some first.")
            if self._held.total() >= self._total:
                raise TooManyStreams(f"The gateway holds {self._total} {self._what}, its limit.", "Try again later.")
            self._held[owner] += 1
        return Slot(self, owner)

    @contextmanager
    def held(self, owner: str) -> Iterator[None]:
        """Hold a slot for the length of a block. Raises like `take`."""
        slot = self.take(owner)
        try:
            yield
        finally:
            slot.release()

    @property
    def count(self) -> int:
        """How many are held now."""
        with self._lock:
            return self._held.total()

    def give(self, owner: str) -> None:
        """Take a slot back; called by `Slot.release` alone."""
        with self._lock:
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]


class Slot:
    """One slot that is held until it is released."""

    def __init__(self, slots: Slots, owner: str) -> None:
        self._slots: Slots | None = slots
        self._owner = owner

    def release(self) -> None:
        """Give the slot back. Idempotent; called by one thread."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.give(self._owner)
