"""When a waiting job will be done, from what its queue's workers and its newest service times tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.eta import Eta, Line, Served
from omnirt_tasks.jobs.effects import service_kind
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import StoredJob

TOLD_ANEW_S = 1.0


@dataclass(frozen=True)
class _Told:
    """What the store told of a queue, and until when that serves."""

    until_s: float
    served: Served
    running: int


class Expectations:
    """Tells of waiting jobs what the store told of their queues within a second. Safe to share between threads."""

    def __init__(self, store: JobStore, clock: Callable[[], float] = monotonic) -> None:
        self._store = store
        self._clock = clock
        self._told: dict[str, _Told] = {}  # replaced whole

    def eta(self, job: StoredJob, position: int, workers: Sequence[WorkerCapability]) -> Eta | None:
        """When the job at `position` (from 1) will be done by these workers of its queue; None if nothing tells.

        Of a job that is split, its last part is meant. Raises StoreUnavailable.
        """
        if not workers:
            return None
        told = self._asked(job.queue)
        resolved, counts = job.resolved, job.record.parts
        if counts is not None:
            position += max(counts.queued - 1, 0)
            try:
                resolved = self._store.get(job.parts[-1]).resolved
            except JobNotFound:  # it was purged just now
                return None
        line = Line(
            position=position,
            waited_s=max(unix_ms() - job.record.enqueued_at_ms, 0) / 1000,
            slots=sum(worker.concurrency for worker in workers),
            running=told.running,
        )
        return told.served.eta(line, service_kind(resolved))

    def _asked(self, queue: str) -> _Told:
        now_s = self._clock()
        told = self._told.get(queue)
        if told is None or now_s >= told.until_s:
            served = Served(self._store.service_times(queue))
            told = _Told(now_s + TOLD_ANEW_S, served, self._store.depth(queue).running)
            fresh = {name: each for name, each in self._told.items() if each.until_s > now_s}
            self._told = {**fresh, queue: told}  # another thread's may be lost by that, and asked anew
        return told
