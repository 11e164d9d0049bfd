"""What workers say of themselves, asked for at most a few times a second however many requests there are."""

from threading import Lock
from time import monotonic

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.fleet import Fleet

RECENT_S = 0.2


class RecentFleet:
    """A Fleet whose `live` may be `RECENT_S` old. Safe to share between threads."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lock = Lock()
        self._read_at = float("-inf")
        self._live: tuple[WorkerCapability, ...] = ()

    def publish(self, capability: WorkerCapability, *, ttl_ms: int) -> None:
        """See Fleet."""
        self._fleet.publish(capability, ttl_ms=ttl_ms)

    def withdraw(self, worker_id: str) -> None:
        """See Fleet."""
        self._fleet.withdraw(worker_id)

    def live(self) -> tuple[WorkerCapability, ...]:
        """See Fleet."""
        if monotonic() - self._read_at > RECENT_S:
            live = self._fleet.live()  # by two threads at once now and then, which harms nothing
            with self._lock:
                self._live, self._read_at = live, monotonic()
        return self._live
