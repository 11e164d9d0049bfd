"""What workers say of themselves, asked for at most a few times a second however many requests there are."""

from time import monotonic

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.fleet import LiveWorkers

RECENT_S = 0.2


class RecentFleet:
    """A fleet whose `live` may be `RECENT_S` old. Safe to share between threads."""

    def __init__(self, fleet: LiveWorkers) -> None:
        self._fleet = fleet
        self._read: tuple[float, tuple[WorkerCapability, ...]] = (float("-inf"), ())

    def live(self) -> tuple[WorkerCapability, ...]:
        """See LiveWorkers."""
        read_at, live = self._read
        if monotonic() - read_at > RECENT_S:
            live = self._fleet.live()  # by several threads at once now and then, which harms nothing
            self._read = (monotonic(), live)  # one value, so that no thread sees half of it
        return live
