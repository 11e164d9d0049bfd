"""The job store and the event feed in memory: what OmniEngine uses, and the plain statement of the store's rules."""

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import CancelOutcome, Event, EventName, ExecutionMode
from omnirt_tasks.jobs.effects import (
    AWAITED_MS,
    DEATHS_MAX,
    NEXT_HIGHER,
    PROMOTE_AFTER_S,
    accepted,
    idempotency_mismatch,
    queue_full,
    queues_max,
    remaining_ms,
    too_many_queues,
    unknown_job,
)
from omnirt_tasks.jobs.memory_entry import Entry, KeyUse
from omnirt_tasks.jobs.memory_life import Lives
from omnirt_tasks.jobs.parts import accepted_parts, part_ids
from omnirt_tasks.jobs.values import (
    Cancelled,
    Checkpoint,
    Claim,
    EventDraft,
    Idempotency,
    JobPage,
    JobQuery,
    Lease,
    MustRunAlone,
    NewJob,
    Outcome,
    PartOf,
    QueueDepth,
    Reconciled,
    Renewal,
    Requeue,
    ServiceTime,
    StoredJob,
    WakeUp,
)

WEEK_S = 7 * 24 * 3600.0


class MemoryJobStore:
    """JobStore in this process, gone with it. `now_ms` is the clock; jobs are kept `job_ttl_s` after their end."""

    def __init__(
        self,
        *,
        job_ttl_s: float = WEEK_S,
        deaths_max: int = DEATHS_MAX,
        promote_after_s: float = PROMOTE_AFTER_S,
        now_ms: Callable[[], int] = unix_ms,
    ) -> None:
        self._promote_after_ms = round(promote_after_s * 1000)
        self._now_ms = now_ms
        self._lock = RLock()
        self._lives = Lives(job_ttl_ms=round(job_ttl_s * 1000), deaths_max=deaths_max, now_ms=now_ms)
        self._keys: dict[tuple[str, str], KeyUse] = {}  # (owner, key)
        self._serial = 0
        self._cancel_callbacks: list[Callable[[str], None]] = []

    def create(self, job: NewJob, *, queue_limit: int | None = None) -> StoredJob:
        """See JobStore."""
        with self._lock:
            if job.idempotency and (submitted := self.submitted(job.owner, job.idempotency)):
                return submitted
            if known := self._lives.entries.get(job.id):
                return known.job
            if queue_limit is not None and self.depth(job.queue).waiting >= queue_limit:
                raise queue_full(job.queue, queue_limit)
            most = queues_max(job.queue)
            if most is not None and len(queues := self.queues()) >= most and job.queue not in queues:
                raise too_many_queues()
            now_ms = self._now_ms()
            entry = self._begin(job, now_ms)
            for part in accepted_parts(job):
                self._begin(part.job, now_ms, part.of, part.told_as)
            if key := job.idempotency:
                self._keys[job.owner, key.key] = KeyUse(job.id, key.fingerprint, now_ms + key.ttl_ms)
            return entry.job

    def submitted(self, owner: str, idempotency: Idempotency) -> StoredJob | None:
        """See JobStore."""
        with self._lock:
            use = self._keys.get((owner, idempotency.key))
            if use is None or use.until_ms <= self._now_ms():
                return None
            if use.fingerprint != idempotency.fingerprint:
                raise idempotency_mismatch(idempotency.key)
            return self._lives.entries[use.job_id].job

    def get(self, job_id: str) -> StoredJob:
        """See JobStore."""
        with self._lock:
            if job_id not in self._lives.entries:
                raise unknown_job(job_id)
            return self._lives.entries[job_id].job

    def page(self, query: JobQuery) -> JobPage:
        """See JobStore."""
        below = int(query.cursor) if query.cursor and query.cursor.isascii() and query.cursor.isdigit() else None
        with self._lock:
            matching = [
                entry
                for entry in reversed(self._lives.entries.values())
                if (below is None or entry.serial < below) and _matches(entry.job, query)
            ]
        page = matching[: query.limit]
        jobs = [_without_result(entry.job) for entry in page]
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
        with self._changing():
            entry = self._lives.entries.get(job_id)
            if entry is None or entry.job.parts or (queues is not None and entry.job.queue not in queues):
                return None
            if token is not None and self._held(Lease(job_id, entry.record.attempt, token)):
                return _claim(entry)
            now_ms = self._now_ms()
            if entry.waits:
                self._lives.act_on_time(entry)
            if not entry.waits or entry.delayed(now_ms):
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
            self._lives.start(entry, worker_id, lease_ttl_ms)
            entry.token, entry.alone = secrets.token_hex(16) if token is None else token, alone
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
                self._lives.append(entry, draft)
            return True

    def commit(self, lease: Lease, outcome: Outcome) -> bool:
        """See JobStore."""
        with self._changing():
            entry = self._held(lease)
            if entry is None:
                return False
            self._lives.end(entry, outcome)
            return True

    def checkpoint(self, lease: Lease, *, name: str, step: int) -> bool:
        """See JobStore."""
        with self._lock:
            entry = self._held(lease)
            if entry is None:
                return False
            entry.job = replace(entry.job, checkpoint=Checkpoint(lease.attempt, name, step))
            self._lives.note(entry, EventName.CHECKPOINT, {"step": step})
            return True

    def give_back(self, lease: Lease, requeue: Requeue) -> bool:
        """See JobStore."""
        with self._changing():
            entry = self._held(lease)
            if entry is None:
                return False
            self._lives.release(entry, requeue)
            return True

    def cancel(self, job_id: str) -> CancelOutcome:
        """See JobStore."""
        with self._changing():
            entry = self._entry(job_id)
            if entry.record.finished:
                return CancelOutcome.ALREADY_FINISHED
            if entry.job.parts:
                return CancelOutcome.CANCELLED if self._lives.cancel_whole(entry) else CancelOutcome.REQUESTED
            entry.update(cancel_requested=True)
            if entry.runs:
                self._lives.to_stop.append(job_id)
                return CancelOutcome.REQUESTED
            self._lives.end(entry, Cancelled())
            return CancelOutcome.CANCELLED

    def forget_dead_letter(self, job_id: str) -> None:
        """See JobStore."""
        with self._lock:
            self._entry(job_id).update(dead_letter=False)

    def purge(self, job_id: str) -> None:
        """See JobStore."""
        with self._changing():
            entry = self._lives.entries.get(job_id)
            if entry is None or entry.job.part is not None:
                return
            self._lives.purge(entry)
            self._keys = {key: use for key, use in self._keys.items() if use.job_id != job_id}

    def reconcile(self, *, unclaimed_after_ms: int, spare_leases: bool = False) -> Reconciled:
        """See JobStore."""
        resend: list[Entry] = []
        expired: list[str] = []
        overdue: list[str] = []
        with self._changing():
            entries = tuple(self._lives.entries.values())
            # In the order of their times, those that run first: what becomes of a part may end another.
            running = [] if spare_leases else sorted((each for each in entries if each.runs), key=Entry.lapses_at)
            for entry in running:
                if self._lives.act_on_time(entry):
                    expired.append(entry.record.id)
                    if entry.waits:
                        resend.append(entry)
            late = sorted((each for each in entries if each.waits), key=Entry.late_at)
            overdue += [entry.record.id for entry in late if self._lives.act_on_time(entry)]
            now_ms = self._now_ms()
            waiting = [entry for entry in entries if entry.waits]
            for entry in waiting:
                if entry.to_send(now_ms, unclaimed_after_ms):
                    entry.sent_at_ms, entry.due_at_ms = now_ms, None
                    resend.append(entry)
            for entry in self._promoted(waiting, now_ms):
                if not entry.delayed(now_ms):
                    entry.sent_at_ms = now_ms
                    resend.append(entry)
            found = {entry.record.id: WakeUp(entry.record.id, entry.job.queue, entry.job.priority) for entry in resend}
        return Reconciled(list(found.values()), expired, overdue)

    def expired(self, limit: int = 100, *, skip: int = 0) -> Sequence[StoredJob]:
        """See JobStore."""
        with self._lock:
            now_ms = self._now_ms()
            jobs = [entry.job for entry in self._lives.entries.values()]
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
            entries = [entry for entry in self._lives.entries.values() if entry.job.queue == queue]
            waiting = Counter(entry.job.priority for entry in entries if entry.waits)
            return QueueDepth(waiting.total(), sum(entry.runs for entry in entries), waiting)

    def position(self, job_id: str) -> int | None:
        """See JobStore."""
        with self._lock:
            entry = self._entry(job_id)
            own = [each.place for each in self._lives.parts_of(entry) or (entry,) if each.waits]
            if not own:
                return None
            others = (each for each in self._lives.entries.values() if each.job.queue == entry.job.queue and each.waits)
            return sum(each.place < min(own) for each in others) + 1

    def service_times(self, queue: str) -> Sequence[ServiceTime]:
        """See JobStore."""
        with self._lock:
            times = self._lives.service_times.get(queue)
            return [] if times is None or times.until_ms <= self._now_ms() else list(times.newest)

    def queues(self) -> Sequence[str]:
        """See JobStore."""
        with self._lock:
            return sorted({entry.job.queue for entry in self._lives.entries.values() if entry.waits or entry.runs})

    def state_counts(self) -> Mapping[tuple[str, str, str, str], int]:
        """See JobStore."""
        with self._lock:
            return dict(self._lives.counts)

    def ping(self) -> None:
        """See JobStore."""

    def listen(self, job_id: str, listener: Callable[[Event], None]) -> None:
        """Call `listener` with each event of the job, in order, from the thread that logs it; it must not block."""
        with self._lock:
            self._lives.listeners.setdefault(job_id, []).append(listener)

    def unlisten(self, job_id: str, listener: Callable[[Event], None]) -> None:
        """Undo `listen`. Idempotent."""
        with self._lock:
            listeners = self._lives.listeners.get(job_id, [])
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                self._lives.listeners.pop(job_id, None)

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """See EventFeed; the thread is the canceller's."""
        with self._lock:
            self._cancel_callbacks.append(callback)

    def _begin(self, job: NewJob, now_ms: int, part: PartOf | None = None, told_as: str = "") -> Entry:
        self._serial += 1
        stored = StoredJob(
            accepted(job, now_ms),
            job.owner,
            job.queue,
            job.resolved,
            job.traceparent,
            last_seq=0 if part is None else self._lives.entries[part.job_id].job.last_seq,
            priority=job.resolved.priority,
            parts=part_ids(job.id, len(job.parts)),
            part=part,
        )
        entry = Entry(
            stored, self._serial, sent_at_ms=now_ms, line_serial=self._serial, ranked_at_ms=now_ms, told_as=told_as
        )
        self._lives.begin(entry)
        return entry

    def _entry(self, job_id: str) -> Entry:
        """The job, as whoever knows its id may ask for it: no part of one."""
        entry = self._lives.entries.get(job_id)
        if entry is None or entry.job.part is not None:
            raise unknown_job(job_id)
        return entry

    def _held(self, lease: Lease) -> Entry | None:
        entry = self._lives.entries.get(lease.job_id)
        return entry if entry is not None and entry.runs and entry.token == lease.token else None

    def _promoted(self, waiting: Sequence[Entry], now_ms: int) -> Iterator[Entry]:
        """Promote those that have waited for long, in the order of the line."""
        for entry in sorted(waiting, key=lambda entry: entry.place):
            higher = NEXT_HIGHER.get(entry.job.priority)
            if higher is not None and now_ms >= entry.ranked_at_ms + self._promote_after_ms:
                self._serial += 1
                entry.rank(higher, self._serial, now_ms)
                if (whole := self._lives.whole_of(entry)) is not None:
                    whole.job = replace(whole.job, priority=higher)
                yield entry

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; afterwards, without it, tell who runs what is to be stopped."""
        with self._lock:
            yield
            to_stop, self._lives.to_stop = self._lives.to_stop, []
            callbacks = tuple(self._cancel_callbacks)
        for job_id in to_stop:
            for callback in callbacks:
                callback(job_id)


def _claim(entry: Entry) -> Claim:
    lease = Lease(entry.record.id, entry.record.attempt, entry.token)
    return Claim(lease, entry.job, remaining_ms(entry.record))


def _without_result(job: StoredJob) -> StoredJob:
    return replace(job, record=job.record.model_copy(update={"result": None}), origins={})


def _matches(job: StoredJob, query: JobQuery) -> bool:
    of_owner = job.owner == query.owner and job.part is None
    return of_owner and (not query.dead_letters or job.record.dead_letter) and query.matches(job)
