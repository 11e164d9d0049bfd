"""Jobs that are split, and what becomes of their parts, to test with."""

from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Lease, Outcome, QueueDepth, part_id
from tests.support.jobs import (
    LONG_MS,
    PICTURES_PER_PART,
    Rig,
    claimed,
    new_job,
    succeeded,
)

QUEUE = "cpu-shapes"


def split_job(rig: Rig, parts: int = 3, *, deadline_s: float | None = None) -> str:
    """A job in so many parts, none of which runs yet."""
    return rig.store.create(new_job(parts=parts, deadline_s=deadline_s)).record.id


def claim_parts(rig: Rig, job_id: str, *numbers: int, worker_id: str = "w1") -> list[Lease]:
    """The leases of these of its parts, beside whatever else runs."""
    return [claimed(rig.store, part_id(job_id, number), worker_id=worker_id, alone=False) for number in numbers]


def done(number: int, *, worker_id: str = "w1") -> Outcome:
    """The outcome of a part that made its pictures."""
    return succeeded("part", first=number * PICTURES_PER_PART, count=PICTURES_PER_PART, worker_id=worker_id)


def told(store: JobStore, job_id: str) -> list[tuple[EventName, JsonObject]]:
    """What the job's log tells, without numbers and times."""
    return [(event.event, event.data) for event in store.events(job_id)]


def names_of_events(store: JobStore, job_id: str) -> list[EventName]:
    """The names of what the job's log tells."""
    return [event.event for event in store.events(job_id)]


def states_of_parts(rig: Rig, job_id: str) -> list[JobState]:
    """How its parts stand, in order."""
    return [rig.store.get(each).record.state for each in rig.store.get(job_id).parts]


def nothing_waits_or_runs(rig: Rig, job_id: str) -> None:
    """Fail where anything of a job that is over, or of its queue, may still be claimed."""
    assert rig.store.depth(QUEUE) == QueueDepth(0, 0)
    for part in rig.store.get(job_id).parts:
        assert rig.store.claim(part, worker_id="late", lease_ttl_ms=LONG_MS, alone=True) is None
    assert not rig.store.reconcile(unclaimed_after_ms=0).resend
