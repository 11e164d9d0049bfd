"""A job as the store in memory holds it."""

from collections import deque
from dataclasses import dataclass, field, replace

from omnirt_tasks.contract import Event, JobRecord
from omnirt_tasks.jobs.effects import EVENT_LOG_LENGTH
from omnirt_tasks.jobs.store import StoredJob


@dataclass(frozen=True)
class KeyUse:
    """What an idempotency key stands for, and until when."""

    job_id: str
    fingerprint: str
    until_ms: int


@dataclass
class Entry:
    """One job and what is kept beside it; `serial` is its place in the order of arrival.

    `alone` is said of the attempt in hand, `appended` names what it appended last. While it waits: `due_at_ms` is set
    until its message is to be sent, `avoided` is the worker that may not claim it before a time, and `awaited` the one
    that waits until then to give it a device to itself.
    """

    job: StoredJob
    serial: int
    sent_at_ms: int
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


def passed(at_ms: int | None, now_ms: int) -> bool:
    """Whether a time, if there is one, has come."""
    return at_ms is not None and at_ms <= now_ms
