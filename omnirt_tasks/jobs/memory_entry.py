"""A job as the store in memory holds it."""

from collections import deque
from dataclasses import dataclass, field, replace

from omnirt_tasks.contract import Event, JobRecord, JobState, Priority, Progress
from omnirt_tasks.jobs.effects import EVENT_LOG_LENGTH, RANKS
from omnirt_tasks.jobs.values import ServiceTime, StoredJob


@dataclass(frozen=True)
class KeyUse:
    """What an idempotency key stands for, and until when."""

    job_id: str
    fingerprint: str
    until_ms: int


@dataclass
class ServiceTimes:
    """The newest service times of a queue, newest first, and how long they are kept."""

    newest: deque[ServiceTime]
    until_ms: int


@dataclass
class Entry:
    """One job, or part of one, and what is kept beside it; `serial` is its place in the order of arrival.

    `alone` is said of the attempt in hand, `appended` names what it appended last. While it waits: `line_serial` is its
    place among those of its priority, which it has had since `ranked_at_ms`, `due_at_ms` is set until its message is
    to be sent, `avoided` is the worker that may not claim it before a time, and `awaited` the one that waits until then
    to give it a device to itself. The errors of a part are told of the whole job after `told_as`.
    """

    job: StoredJob
    serial: int
    sent_at_ms: int
    line_serial: int
    ranked_at_ms: int
    told_as: str = ""
    token: str = ""
    alone: bool = False
    appended: str | None = None
    due_at_ms: int | None = None
    avoided: tuple[str | None, int] | None = None
    awaited: tuple[str, int] | None = None
    log: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENT_LOG_LENGTH))

    @property
    def record(self) -> JobRecord:
        return self.job.record

    @property
    def state(self) -> JobState:
        return self.job.record.state

    @property
    def waits(self) -> bool:
        """Whether it stands in its queue's line: of a split job the parts do."""
        return self.state is JobState.QUEUED and not self.job.parts

    @property
    def runs(self) -> bool:
        """Whether an attempt has it: of a split job the parts do."""
        return self.state is JobState.RUNNING and not self.job.parts

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in line; the lowest is first."""
        return RANKS[self.job.priority], self.line_serial

    def lapses_at(self) -> tuple[float, str]:
        """When its lease expires, and its id."""
        expires_at_ms = self.job.lease_expires_at_ms
        return float("inf") if expires_at_ms is None else expires_at_ms, self.record.id

    def late_at(self) -> tuple[float, str]:
        """When its deadline passes, and its id."""
        deadline_at_ms = self.record.deadline_at_ms
        return float("inf") if deadline_at_ms is None else deadline_at_ms, self.record.id

    def update(self, **changes: object) -> None:
        """Change fields of the record."""
        self.job = replace(self.job, record=self.record.model_copy(update=changes))

    def delayed(self, now_ms: int) -> bool:
        """Whether the waiting job is not to be claimed yet."""
        return self.due_at_ms is not None and now_ms < self.due_at_ms

    def to_send(self, now_ms: int, unclaimed_after_ms: int) -> bool:
        """Whether the waiting job's message is to be sent (again)."""
        due_at_ms = self.sent_at_ms + unclaimed_after_ms if self.due_at_ms is None else self.due_at_ms
        return due_at_ms <= now_ms

    def rank(self, priority: Priority, line_serial: int, now_ms: int) -> None:
        """Put it behind those of another priority."""
        self.job = replace(self.job, priority=priority)
        self.line_serial, self.ranked_at_ms = line_serial, now_ms

    def done(self) -> Progress | None:
        """How far it has come, as far as it has told; all the way once it has succeeded."""
        told = self.record.progress
        if told is None or self.state is not JobState.SUCCEEDED:
            return told
        return told.model_copy(update={"step": told.total})


def passed(at_ms: int | None, now_ms: int) -> bool:
    """Whether a time, if there is one, has come."""
    return at_ms is not None and at_ms <= now_ms
