"""RankHost: rank 0's DeviceHost, which the executor speaks to; its orders are worked off in the first thread."""

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass

from omnirt_tasks.contract import EventName
from workers.host import (
    DeviceCapability,
    HostEvent,
    HostHealth,
    InterruptReason,
    OnEvent,
    RunInterrupted,
    RunOrder,
    RunOutcome,
)

STAGE = "generate"


@dataclass(frozen=True, eq=False)
class _Job:
    order: RunOrder
    on_event: OnEvent
    outcome: "Future[RunOutcome]"


class RankHost:
    """Takes orders from any thread, and hands them to the one that works, one at a time."""

    def __init__(self, device: str, dtype: str) -> None:
        self._capability = DeviceCapability(
            backend=device.partition(":")[0],
            device=device,
            device_name=device,
            memory_bytes=None,
            dtypes=(dtype,),
            models=(),
            loaded=(),
            concurrency=1,
        )
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._known: list[_Job] = []
        self._reasons: dict[str, InterruptReason] = {}
        self._closed = False
        self._ending = False
        self._left = threading.Event()

    # For the executor

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        job = _Job(order, on_event, Future())
        with self._lock:
            if self._closed:
                job.outcome.set_result(RunInterrupted(InterruptReason.GIVE_BACK))
                return job.outcome
            self._known.append(job)
            self._jobs.put(job)
        return job.outcome

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        with self._lock:
            known = any(job.order.job_id == job_id for job in self._known)
            if known:
                self._reasons.setdefault(job_id, reason)
        return known

    def end_by_force(self, why: str) -> bool:
        del why
        return False  # whoever started this process ends it

    def capability(self) -> DeviceCapability:
        return self._capability

    def health(self) -> HostHealth:
        return HostHealth(ok=False, detail="the group ends") if self._ending else HostHealth(ok=True)

    def close(self, timeout_s: float = 10.0) -> None:
        with self._lock:
            self._closed = True
            for job in self._known:
                self._reasons.setdefault(job.order.job_id, InterruptReason.GIVE_BACK)
            self._jobs.put(None)
        self._left.wait(timeout_s)

    # For the thread that works

    def next_order(self, within_s: float) -> RunOrder | None:
        """The order to run now; None once there will be no more. Raises queue.Empty when none comes in time."""
        job = self._jobs.get(timeout=within_s)
        return None if job is None else job.order

    def told(self, step: int, total: int) -> InterruptReason | None:
        """Say that a step of the job in hand is done; why it is to stop, if it is."""
        job = self._known[0]
        job.on_event(HostEvent(EventName.STAGE_PROGRESS, STAGE, {"step": step, "total": total}))
        return self._reasons.get(job.order.job_id)

    def ended(self, outcome: RunOutcome, *, group_ends: bool = False) -> None:
        """Say what became of the job in hand, and whether it was the last that this group can run."""
        with self._lock:
            self._ending = group_ends
            job = self._known.pop(0)
            self._reasons.pop(job.order.job_id, None)
        job.outcome.set_result(outcome)

    def left(self) -> None:
        """No job will be worked off any more."""
        self._left.set()
