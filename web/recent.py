"""What is asked for at most a few times a second, however many requests there are."""

from collections.abc import Callable
from time import monotonic

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.fleet import LiveWorkers

RECENT_S = 0.2


class RecentFleet:
    """What workers say of themselves: a fleet whose `live` may be `RECENT_S` old. Safe to share between threads."""

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


class RecentCheck:
    """A check that may have been passed `RECENT_S` ago; one that failed is made again.

    Safe to share between threads.
    """

    def __init__(self, check: Callable[[], object], clock: Callable[[], float] = monotonic) -> None:
        self._check = check
        self._clock = clock
        self._passed_at = float("-inf")

    def __call__(self) -> None:
        """Raise what the check raises."""
        if self._clock() - self._passed_at > RECENT_S:
            self._check()
            self._passed_at = self._clock()
