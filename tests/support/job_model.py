"""A plain model of what jobs ought to be, and of those that were split, to hold a store against."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

from omnirt_tasks.contract import ALLOWED_MOVES, Event, EventName, JobState, Priority
from omnirt_tasks.contract.job import PartCounts
from omnirt_tasks.jobs.effects import NEXT_HIGHER, RANKS
from omnirt_tasks.jobs.values import Checkpoint, Lease, Requeue, StoredJob
from tests.support.jobs import DEATHS_MAX, PICTURES_PER_PART, PROMOTE_AFTER_MS

STATE_AFTER = {
    EventName.JOB_ENQUEUED: JobState.QUEUED,
    EventName.JOB_STARTED: JobState.RUNNING,
    EventName.JOB_REQUEUED: JobState.QUEUED,
    EventName.JOB_FINISHED: JobState.SUCCEEDED,
    EventName.JOB_FAILED: JobState.FAILED,
    EventName.JOB_CANCELLED: JobState.CANCELLED,
}

OVER = {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@dataclass
class Model:
    """What a job, or a part of one, ought to be; `leases` are all that it ever had, the newest last.

    Times are the machine's. The job that it is a part of, if it is, follows it.
    """

    serial: int
    whole: "Whole | None" = None
    deadline_at: float = float("inf")
    key: str | None = None
    state: JobState = JobState.QUEUED
    error: str | None = None
    attempt: int = 0
    leases: list[Lease] = field(default_factory=list)
    to_cancel: bool = False
    # of the attempt in hand
    worker_id: str = ""
    alone: bool = False
    lease_until: int = 0
    # of the next attempt
    priority: Priority = Priority.NORMAL
    ranked_at: int = 0
    runs_alone: bool = False
    not_before: int = 0
    delayed: bool = False  # and no round has sent its message since
    dropped: bool = False  # its message was taken, and left, by the worker that is to leave it to another
    avoided: str = ""
    avoided_until: int = 0
    awaited: str = ""
    awaited_until: int = 0
    deaths: int = 0
    retries: int = 0
    checkpoint: Checkpoint | None = None
    dead_letter: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in line."""
        return RANKS[self.priority], self.serial

    def end(self, state: JobState, error: str | None = None) -> None:
        self.state, self.error = state, error
        if self.whole is not None:
            self.whole.after(self)

    def cancel(self) -> None:
        """As its caller does."""
        if self.state is JobState.QUEUED:
            self.end(JobState.CANCELLED)
        elif self.state is JobState.RUNNING:
            self.to_cancel = True

    def claimed(self, lease: Lease, *, worker_id: str, alone: bool, until: int) -> None:
        self.state = JobState.RUNNING
        self.attempt += 1
        self.leases.append(lease)
        self.worker_id, self.alone, self.lease_until = worker_id, alone, until
        if self.whole is not None and self.whole.state is JobState.QUEUED:
            self.whole.state = JobState.RUNNING

    def release(self, how: Requeue, now: int) -> None:
        """End the attempt without an outcome."""
        to_blame = how.died and self.alone
        self.deaths += to_blame
        self.retries += how.retry
        self.runs_alone |= how.died or how.alone
        if self.to_cancel:
            self.end(JobState.CANCELLED)
        elif self.deadline_at <= now:
            self.end(JobState.FAILED, "timeout")
        elif to_blame and self.deaths >= DEATHS_MAX:
            (self.whole or self).dead_letter = True
            self.end(JobState.FAILED, "worker_lost")
        else:
            self.state = JobState.QUEUED
            self.not_before, self.delayed, self.dropped = now + how.delay_ms, how.delay_ms > 0, False
            self.avoided, self.avoided_until = self.worker_id, now + how.delay_ms + how.avoid_ms
            self.awaited = ""

    def act_on_time(self, now: int) -> bool:
        """What a round does with a job whose time has come; a claim does it with one that waits. Whether it had."""
        if self.state is JobState.RUNNING and self.lease_until <= now:
            self.release(Requeue("lease_expired", died=True), now)
        elif self.state is JobState.QUEUED and self.deadline_at <= now:
            self.end(JobState.FAILED, "timeout")
        else:
            return False
        return True

    def promote(self, serials: "count[int]", now: int) -> bool:
        """What a round does with a job that waits; whether it has come to a higher priority."""
        higher = NEXT_HIGHER.get(self.priority)
        if higher is None or now < self.ranked_at + PROMOTE_AFTER_MS:
            return False
        self.priority, self.serial, self.ranked_at = higher, next(serials), now
        return True


@dataclass
class Whole:
    """What a job that was split ought to be: it follows its parts."""

    key: str | None = None
    parts: dict[str, Model] = field(default_factory=dict)
    state: JobState = JobState.QUEUED
    error: str | None = None
    to_cancel: bool = False
    dead_letter: bool = False

    @property
    def attempt(self) -> int:
        return max(part.attempt for part in self.parts.values())

    def states(self) -> list[JobState]:
        return [part.state for part in self.parts.values()]

    def after(self, part: Model) -> None:
        """One of its parts is over."""
        if self.state in OVER:
            return
        if part.state is JobState.FAILED:
            self.state, self.error = JobState.FAILED, part.error
            self._stop()
        elif part.state is JobState.CANCELLED:
            self.cancel()
        elif set(self.states()) == {JobState.SUCCEEDED}:
            self.state = JobState.SUCCEEDED
        elif self.to_cancel and JobState.RUNNING not in self.states():
            self.state = JobState.CANCELLED

    def cancel(self) -> None:
        if self.state in OVER:
            return
        self.to_cancel = True
        self._stop()
        if JobState.RUNNING not in self.states():
            self.state = JobState.CANCELLED

    def _stop(self) -> None:
        for part in self.parts.values():
            if part.state is JobState.RUNNING:
                part.to_cancel = True
            elif part.state is JobState.QUEUED:
                part.state = JobState.CANCELLED


def check_unit(job: StoredJob, model: Model) -> None:
    """The store says of a job that is not split, or of a part, what the model says."""
    record = job.record
    assert (record.state, record.attempt, job.priority) == (model.state, model.attempt, model.priority)
    assert (record.error.code if record.error else None) == model.error
    assert (record.result is not None) == (record.state is JobState.SUCCEEDED)
    assert (job.runs_alone, job.deaths, job.retries) == (model.runs_alone, model.deaths, model.retries)
    assert (record.dead_letter, job.checkpoint) == (model.dead_letter, model.checkpoint)


def check_whole(job: StoredJob, whole: Whole) -> None:
    """The store says of a split job what the model says."""
    record, states = job.record, whole.states()
    assert (record.state, record.attempt, record.dead_letter) == (whole.state, whole.attempt, whole.dead_letter)
    assert (record.error.code if record.error else None) == whole.error
    assert record.parts == PartCounts(
        total=len(states),
        queued=states.count(JobState.QUEUED),
        running=states.count(JobState.RUNNING),
        succeeded=states.count(JobState.SUCCEEDED),
    )
    if record.finished:
        assert JobState.QUEUED not in states
    if record.state is JobState.SUCCEEDED:
        assert record.result is not None
        pictures = range(PICTURES_PER_PART * len(states))
        assert [output.name for output in record.result.outputs] == [f"{index}.png" for index in pictures]
    else:
        assert record.result is None


def check_log(log: Sequence[Event], state: JobState) -> None:
    """A log without gaps that tells of legal moves, of at most one end, and of the state that the job is in."""
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    entered = [STATE_AFTER[event.event] for event in log if event.event in STATE_AFTER]
    assert all(after in ALLOWED_MOVES[before] for before, after in pairwise(entered))
    assert entered[-1] is state
    assert sum(event.terminal for event in log) <= 1
    assert not any(event.terminal for event in log[:-1])
