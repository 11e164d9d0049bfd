"""The job store and the event feed in memory: what OmniEngine uses, and the plain statement of the store's rules."""

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from threading import RLock

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import (
    ALLOWED_MOVES,
    CancelOutcome,
    ErrorInfo,
    Event,
    EventName,
    ExecutionMode,
    JobState,
    Phase,
    QueueStatus,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.jobs.effects import (
    AWAITED_MS,
    DEATHS_MAX,
    JOB_STAGE,
    LEASE_EXPIRED,
    accepted,
    deadline_passed,
    died_too_often,
    ending,
    failure,
    idempotency_mismatch,
    phase_of,
    progress_of,
    queue_full,
    queues_max,
    remaining_ms,
    too_many_queues,
    unknown_job,
)
from omnirt_tasks.jobs.memory_entry import Entry, KeyUse, passed
from omnirt_tasks.jobs.store import (
    Checkpoint,
    Claim,
    EventDraft,
    Failed,
    Idempotency,
    JobPage,
    JobQuery,
    Lease,
    MustRunAlone,
    NewJob,
    Outcome,
    QueueDepth,
    Reconciled,
    Renewal,
    Requeue,
    StoredJob,
    Succeeded,
)

WEEK_S = 7 * 24 * 3600.0


class MemoryJobStore:
    """JobStore in this process, gone with it. `now_ms` is the clock; jobs are kept `job_ttl_s` after their end."""

    def __init__(
        self, *, job_ttl_s: float = WEEK_S, deaths_max: int = DEATHS_MAX, now_ms: Callable[[], int] = unix_ms
    ) -> None:
        self._job_ttl_ms = round(job_ttl_s * 1000)
        self._deaths_max = deaths_max
        self._now_ms = now_ms
        self._lock = RLock()
        self._entries: dict[str, Entry] = {}  # in the order of arrival
        self._keys: dict[tuple[str, str], KeyUse] = {}  # (owner, key)
        self._serial = 0
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        self._listeners: dict[str, list[Callable[[Event], None]]] = {}
        self._cancel_callbacks: list[Callable[[str], None]] = []

    def create(self, job: NewJob, *, queue_limit: int | None = None) -> StoredJob:
        """See JobStore."""
        with self._lock:
            if job.idempotency and (submitted := self.submitted(job.owner, job.idempotency)):
                return submitted
            if known := self._entries.get(job.id):
                return known.job
            if queue_limit is not None and self.depth(job.queue).waiting >= queue_limit:
                raise queue_full(job.queue, queue_limit)
            most = queues_max(job.queue)
            if most is not None and len(queues := self.queues()) >= most and job.queue not in queues:
                raise too_many_queues()
            now_ms = self._now_ms()
            self._serial += 1
            stored = StoredJob(accepted(job, now_ms), job.owner, job.queue, job.resolved, job.traceparent)
            entry = self._entries[job.id] = Entry(stored, self._serial, sent_at_ms=now_ms)
            if key := job.idempotency:
                self._keys[job.owner, key.key] = KeyUse(job.id, key.fingerprint, now_ms + key.ttl_ms)
            self._count(entry)
            self._log(entry, EventName.JOB_ENQUEUED, {"queue": job.queue})
            return entry.job

    def submitted(self, owner: str, idempotency: Idempotency) -> StoredJob | None:
        """See JobStore."""
        with self._lock:
            use = self._keys.get((owner, idempotency.key))
            if use is None or use.until_ms <= self._now_ms():
                return None
            if use.fingerprint != idempotency.fingerprint:
                raise idempotency_mismatch(idempotency.key)
            return self._entries[use.job_id].job

    def get(self, job_id: str) -> StoredJob:
        """See JobStore."""
        with self._lock:
            return self._entry(job_id).job

    def page(self, query: JobQuery) -> JobPage:
        """See JobStore."""
        below = int(query.cursor) if query.cursor and query.cursor.isascii() and query.cursor.isdigit() else None
        with self._lock:
            matching = [
                entry
                for entry in reversed(self._entries.values())
                if (below is None or entry.serial < below) and _matches(entry.job, query)
            ]
        page = matching[: query.limit]
        jobs = [replace(entry.job, record=entry.record.model_copy(update={"result": None})) for entry in page]
        return JobPage(jobs, str(page[-1].serial) if len(matching) > len(page) else None)

    def claim(
        self,
        job_id: str,
        *,
        worker_id: str,
        lease_ttl_ms: int,
        execution_mode: ExecutionMode | None = None,
        alone: bool = False,
        queues: Collection[str] | None = None,
        token: str | None = None,
    ) -> Claim | MustRunAlone | None:
        """See JobStore."""
        with self._lock:
            entry = self._entries.get(job_id)
            if entry is None or (queues is not None and entry.job.queue not in queues):
                return None
            if token is not None and self._held(Lease(job_id, entry.record.attempt, token)):
                return _claim(entry)
            now_ms = self._now_ms()
            if entry.record.state is JobState.QUEUED:
                self._act_on_time(entry, now_ms)
            if entry.record.state is not JobState.QUEUED or entry.delayed(now_ms):
                return None
            if entry.avoided and entry.avoided[0] == worker_id and now_ms < entry.avoided[1]:
                entry.sent_at_ms = 0  # its message is gone now: the next round sends it again
                return None
            if entry.job.runs_alone and not alone:
                if entry.awaited and entry.awaited[0] != worker_id and now_ms < entry.awaited[1]:
                    return MustRunAlone(awaited=True)
                entry.awaited = worker_id, now_ms + AWAITED_MS
                return MustRunAlone()
            if execution_mode is not None:
                entry.update(execution_mode=execution_mode)
            self._enter(entry, JobState.RUNNING)
            attempt = entry.record.attempt + 1
            entry.token, entry.alone = secrets.token_hex(16) if token is None else token, alone
            entry.update(attempt=attempt, worker_id=worker_id, phase=Phase.WAITING, started_at_ms=now_ms, queue=None)
            entry.job = replace(entry.job, lease_expires_at_ms=now_ms + lease_ttl_ms)
            self._log(entry, EventName.JOB_STARTED, {"attempt": attempt, "worker_id": worker_id})
            return _claim(entry)

    def renew(self, lease: Lease, *, lease_ttl_ms: int) -> Renewal:
        """See JobStore."""
        with self._lock:
            entry = self._held(lease)
            if entry is None:
                return Renewal(held=False)
            entry.job = replace(entry.job, lease_expires_at_ms=self._now_ms() + lease_ttl_ms)
            return Renewal(held=True, cancel_requested=entry.record.cancel_requested)

    def append(self, lease: Lease, drafts: Sequence[EventDraft], *, call: str | None = None) -> bool:
        """See JobStore."""
        with self._lock:
            entry = self._held(lease)
            if entry is None:
                return False
            if call is not None and entry.appended == call:
                return True
            entry.appended = call
            for draft in drafts:
                self._log(entry, draft.event, draft.data, draft.stage)
                if phase := phase_of(draft):
                    entry.update(phase=phase)
                if moved := progress_of(draft):
                    entry.update(progress=moved)
            return True

    def commit(self, lease: Lease, outcome: Outcome) -> bool:
        """See JobStore."""
        end = ending(outcome)
        with self._lock:
            entry = self._held(lease)
            if entry is None:
                return False
            if end.execution_mode is not None:
                entry.update(execution_mode=end.execution_mode)
            match outcome:
                case Succeeded(result):
                    entry.update(result=result)
                case Failed(error):
                    entry.update(error=error)
            self._finish(entry, end.state, end.event, end.data)
            return True

    def checkpoint(self, lease: Lease, *, name: str, step: int) -> bool:
        """See JobStore."""
        with self._lock:
            entry = self._held(lease)
            if entry is None:
                return False
            entry.job = replace(entry.job, checkpoint=Checkpoint(lease.attempt, name, step))
            self._log(entry, EventName.CHECKPOINT, {"step": step})
            return True

    def give_back(self, lease: Lease, requeue: Requeue) -> bool:
        """See JobStore."""
        with self._lock:
            entry = self._held(lease)
            if entry is None:
                return False
            self._release(entry, requeue)
            return True

    def cancel(self, job_id: str) -> CancelOutcome:
        """See JobStore."""
        with self._lock:
            entry = self._entry(job_id)
            if entry.record.finished:
                return CancelOutcome.ALREADY_FINISHED
            entry.update(cancel_requested=True)
            if entry.record.state is JobState.QUEUED:
                self._finish(entry, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
                return CancelOutcome.CANCELLED
        self._tell_of_cancel(job_id)
        return CancelOutcome.REQUESTED

    def forget_dead_letter(self, job_id: str) -> None:
        """See JobStore."""
        with self._lock:
            self._entry(job_id).update(dead_letter=False)

    def purge(self, job_id: str) -> None:
        """See JobStore."""
        with self._lock:
            entry = self._entries.get(job_id)
            if entry is None:
                return
            unfinished = not entry.record.finished
            if unfinished:
                self._finish(entry, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
            del self._entries[job_id]
            self._keys = {key: use for key, use in self._keys.items() if use.job_id != job_id}
        if unfinished:
            self._tell_of_cancel(job_id)

    def reconcile(self, *, unclaimed_after_ms: int, spare_leases: bool = False) -> Reconciled:
        """See JobStore."""
        resend: list[tuple[str, str]] = []
        expired: list[str] = []
        overdue: list[str] = []
        with self._lock:
            now_ms = self._now_ms()
            for job_id, entry in self._entries.items():
                before = entry.record.state
                if before is JobState.RUNNING and spare_leases:
                    continue
                if self._act_on_time(entry, now_ms):
                    (expired if before is JobState.RUNNING else overdue).append(job_id)
                    if entry.record.state is JobState.QUEUED:
                        resend.append((job_id, entry.job.queue))
                elif before is JobState.QUEUED and entry.to_send(now_ms, unclaimed_after_ms):
                    entry.sent_at_ms, entry.due_at_ms = now_ms, None
                    resend.append((job_id, entry.job.queue))
        return Reconciled(resend, expired, overdue)

    def expired(self, limit: int = 100, *, skip: int = 0) -> Sequence[StoredJob]:
        """See JobStore."""
        with self._lock:
            now_ms = self._now_ms()
            jobs = [entry.job for entry in self._entries.values()]
        ended = [(job.record.expires_at_ms, job) for job in jobs if job.record.expires_at_ms is not None]
        oldest_first = sorted(ended, key=lambda pair: pair[0])
        return [job for expires_at_ms, job in oldest_first if expires_at_ms <= now_ms][skip : skip + limit]

    def events(self, job_id: str, *, after: int = 0) -> Sequence[Event]:
        """See JobStore."""
        with self._lock:
            return [event for event in self._entry(job_id).log if event.seq > after]

    def depth(self, queue: str) -> QueueDepth:
        """See JobStore."""
        with self._lock:
            states = Counter(entry.record.state for entry in self._entries.values() if entry.job.queue == queue)
        return QueueDepth(states[JobState.QUEUED], states[JobState.RUNNING])

    def position(self, job_id: str) -> int | None:
        """See JobStore."""
        with self._lock:
            queue = self._entry(job_id).job.queue
            waiting = [
                waiting_id
                for waiting_id, entry in self._entries.items()
                if entry.job.queue == queue and entry.record.state is JobState.QUEUED
            ]
        return waiting.index(job_id) + 1 if job_id in waiting else None

    def queues(self) -> Sequence[str]:
        """See JobStore."""
        with self._lock:
            return sorted({entry.job.queue for entry in self._entries.values() if not entry.record.finished})

    def state_counts(self) -> Mapping[tuple[str, str, str, str], int]:
        """See JobStore."""
        with self._lock:
            return dict(self._counts)

    def ping(self) -> None:
        """See JobStore."""

    def listen(self, job_id: str, listener: Callable[[Event], None]) -> None:
        """Call `listener` with each event of the job, in order, from the thread that logs it; it must not block."""
        with self._lock:
            self._listeners.setdefault(job_id, []).append(listener)

    def unlisten(self, job_id: str, listener: Callable[[Event], None]) -> None:
        """Undo `listen`. Idempotent."""
        with self._lock:
            listeners = self._listeners.get(job_id, [])
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                self._listeners.pop(job_id, None)

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """See EventFeed; the thread is the canceller's."""
        with self._lock:
            self._cancel_callbacks.append(callback)

    def _entry(self, job_id: str) -> Entry:
        if entry := self._entries.get(job_id):
            return entry
        raise unknown_job(job_id)

    def _held(self, lease: Lease) -> Entry | None:
        entry = self._entries.get(lease.job_id)
        held = entry is not None and entry.record.state is JobState.RUNNING and entry.token == lease.token
        return entry if held else None

    def _count(self, entry: Entry) -> None:
        mode = entry.record.execution_mode or "unknown"
        resolved = entry.job.resolved
        self._counts[(resolved.task.value, resolved.model, str(mode), entry.record.state.value)] += 1

    def _enter(self, entry: Entry, state: JobState) -> None:
        if state not in ALLOWED_MOVES[entry.record.state]:
            raise AssertionError(f"a job never moves from {entry.record.state} to {state}")
        entry.update(state=state, phase=None, queue=None)
        entry.job = replace(entry.job, lease_expires_at_ms=None)
        entry.token, entry.alone, entry.due_at_ms, entry.avoided, entry.awaited = "", False, None, None, None
        self._count(entry)

    def _finish(self, entry: Entry, state: JobState, event: EventName, data: JsonObject) -> None:
        self._enter(entry, state)
        now_ms = self._now_ms()
        entry.update(finished_at_ms=now_ms, expires_at_ms=now_ms + self._job_ttl_ms)
        self._log(entry, event, data)

    def _fail(self, entry: Entry, error: ErrorInfo) -> None:
        entry.update(error=error)
        self._finish(entry, JobState.FAILED, EventName.JOB_FAILED, failure(error))

    def _act_on_time(self, entry: Entry, now_ms: int) -> bool:
        """End the attempt under an expired lease, fail what waits past its deadline; whether there was one of them."""
        match entry.record.state:
            case JobState.RUNNING if passed(entry.job.lease_expires_at_ms, now_ms):
                self._release(entry, Requeue(LEASE_EXPIRED, died=True))
            case JobState.QUEUED if passed(entry.record.deadline_at_ms, now_ms):
                self._fail(entry, deadline_passed())
            case _:
                return False
        return True

    def _release(self, entry: Entry, requeue: Requeue) -> None:
        """Put the job back to its old place, unless nobody wants it any more, its time is over, or it is to blame."""
        now_ms = self._now_ms()
        to_blame = requeue.died and entry.alone
        entry.job = replace(
            entry.job,
            deaths=entry.job.deaths + to_blame,
            retries=entry.job.retries + requeue.retry,
            runs_alone=entry.job.runs_alone or requeue.died or requeue.alone,
        )
        if entry.record.cancel_requested:
            self._finish(entry, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
        elif passed(entry.record.deadline_at_ms, now_ms):
            self._fail(entry, deadline_passed())
        elif to_blame and entry.job.deaths >= self._deaths_max:
            entry.update(dead_letter=True)
            self._fail(entry, died_too_often(self._deaths_max))
        else:
            worker_id = entry.record.worker_id
            self._enter(entry, JobState.QUEUED)
            entry.update(
                worker_id=None, started_at_ms=None, progress=None, queue=QueueStatus(name=entry.job.queue, workers=0)
            )
            entry.sent_at_ms = now_ms
            if requeue.delay_ms > 0:
                entry.due_at_ms = now_ms + requeue.delay_ms
            if requeue.avoid_ms > 0:
                entry.avoided = (worker_id, now_ms + requeue.delay_ms + requeue.avoid_ms)
            self._log(entry, EventName.JOB_REQUEUED, {"attempt": entry.record.attempt, "reason": requeue.reason})

    def _log(self, entry: Entry, name: EventName, data: JsonObject, stage: str = JOB_STAGE) -> None:
        seq = entry.job.last_seq + 1
        event = Event(seq=seq, event=name, stage=stage, timestamp_ms=self._now_ms(), data=data)
        entry.job = replace(entry.job, last_seq=seq)
        entry.log.append(event)
        for listener in self._listeners.get(entry.record.id, ()):
            listener(event)

    def _tell_of_cancel(self, job_id: str) -> None:
        with self._lock:
            callbacks = tuple(self._cancel_callbacks)
        for callback in callbacks:
            callback(job_id)


def _claim(entry: Entry) -> Claim:
    lease = Lease(entry.record.id, entry.record.attempt, entry.token)
    return Claim(lease, entry.job, remaining_ms(entry.record))


def _matches(job: StoredJob, query: JobQuery) -> bool:
    return job.owner == query.owner and (not query.dead_letters or job.record.dead_letter) and query.matches(job)
