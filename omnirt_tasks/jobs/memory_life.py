"""The moves of a job's life in memory, and how the record of one that was split follows its parts.

What parts.lua and its prelude are to Redis. Nothing here is safe to share between threads: the store has a lock.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from omnirt_tasks.contract import (
    ALLOWED_MOVES,
    ErrorInfo,
    Event,
    EventName,
    JobState,
    Phase,
    Progress,
    QueueStatus,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.job import PartCounts
from omnirt_tasks.jobs.effects import (
    JOB_STAGE,
    LEASE_EXPIRED,
    SERVICE_TIMES_KEPT_MS,
    SERVICE_TIMES_MAX,
    deadline_passed,
    died_too_often,
    ending,
    failure,
    phase_of,
    progress,
    progress_of,
    service_kind,
)
from omnirt_tasks.jobs.memory_entry import Entry, ServiceTimes, passed
from omnirt_tasks.jobs.parts import error_of_part, joined, origins_of
from omnirt_tasks.jobs.values import Cancelled, EventDraft, Failed, Outcome, Requeue, ServiceTime, Succeeded


class Lives:
    """Every job there is, and what may become of it."""

    def __init__(self, *, job_ttl_ms: int, deaths_max: int, now_ms: Callable[[], int]) -> None:
        self.entries: dict[str, Entry] = {}  # in the order of arrival, each job before its parts
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        self.service_times: dict[str, ServiceTimes] = {}  # by queue
        self.listeners: dict[str, list[Callable[[Event], None]]] = {}
        self.to_stop: list[str] = []  # running jobs and parts whose cancel was asked for; whoever tells them takes them
        self._job_ttl_ms = job_ttl_ms
        self._deaths_max = deaths_max
        self._now_ms = now_ms

    def begin(self, entry: Entry) -> None:
        """Add a job that begins its life, or a part of one."""
        self.entries[entry.record.id] = entry
        if entry.job.part is None:
            self._count(entry)
            self._log(entry, EventName.JOB_ENQUEUED, {"queue": entry.job.queue})

    def whole_of(self, entry: Entry) -> Entry | None:
        """The job that it is a part of, if it is."""
        return None if entry.job.part is None else self.entries[entry.job.part.job_id]

    def parts_of(self, entry: Entry) -> list[Entry]:
        """The parts of a split job, in order."""
        return [self.entries[part_id] for part_id in entry.job.parts]

    def start(self, entry: Entry, worker_id: str, lease_ttl_ms: int) -> None:
        """Begin the next attempt; of a split job that had none, the whole job too."""
        now_ms, attempt = self._now_ms(), entry.record.attempt + 1
        self._enter(entry, JobState.RUNNING)
        entry.update(attempt=attempt, worker_id=worker_id, phase=Phase.WAITING, started_at_ms=now_ms)
        entry.job = replace(entry.job, lease_expires_at_ms=now_ms + lease_ttl_ms)
        told: JsonObject = {"attempt": attempt, "worker_id": worker_id}
        whole = self.whole_of(entry)
        if whole is None:
            self._log(entry, EventName.JOB_STARTED, told)
            return
        if whole.state is JobState.QUEUED:
            whole.update(execution_mode=entry.record.execution_mode)
            self._enter(whole, JobState.RUNNING)
            whole.update(phase=Phase.WAITING, started_at_ms=now_ms)
            self._log(whole, EventName.JOB_STARTED, told)
        self._log(entry, EventName.PART_STARTED, told)
        self._follow(whole)

    def append(self, entry: Entry, draft: EventDraft) -> None:
        """Log an event of the attempt in hand; the progress of a part is that of the whole job, to whoever watches."""
        whole, data = self.whole_of(entry), draft.data
        if moved := progress_of(draft):
            entry.update(progress=moved)
            if whole is not None and not whole.record.finished:
                self._follow(whole)
                if together := whole.record.progress:
                    data = {**data, "step": together.step, "total": together.total}
        self._log(entry, draft.event, data, draft.stage)
        if phase := phase_of(draft):
            entry.update(phase=phase)
            if whole is not None and not whole.record.finished:
                whole.update(phase=phase)

    def note(self, entry: Entry, event: EventName, data: JsonObject) -> None:
        """Log an event of the job's own."""
        self._log(entry, event, data)

    def end(self, entry: Entry, outcome: Outcome) -> None:
        """End a job that is not split, or a part, and perhaps the whole job with it."""
        match outcome:
            case Succeeded(result):
                entry.update(result=result)
                entry.job = replace(entry.job, origins=origins_of(entry.record.id, entry.record.attempt, result))
                self._note_service_time(entry)
            case Failed(error):
                entry.update(error=error)
        end = ending(outcome)
        for told in (entry, self.whole_of(entry)):
            if told is not None and end.execution_mode is not None:
                told.update(execution_mode=end.execution_mode)
        self._finish(entry, end.state, end.event, end.data)
        if (whole := self.whole_of(entry)) is not None:
            self._go_on_after(entry, whole, outcome)

    def cancel_whole(self, whole: Entry) -> bool:
        """Cancel a split job; whether it is over then: not as long as a part runs."""
        whole.update(cancel_requested=True)
        self._stop_parts(whole)
        if any(part.runs for part in self.parts_of(whole)):
            return False
        self._finish(whole, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
        return True

    def purge(self, entry: Entry) -> None:
        """Forget a job and its parts; what is not over ends as cancelled first."""
        for each in (*self.parts_of(entry), entry):
            if not each.record.finished:
                if each.state is JobState.RUNNING or not each.job.part:
                    self.to_stop.append(each.record.id)
                self._finish(each, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
        for job_id in (*entry.job.parts, entry.record.id):
            del self.entries[job_id]

    def act_on_time(self, entry: Entry) -> bool:
        """End the attempt under an expired lease, fail what waits past its deadline; whether it was one of them."""
        now_ms = self._now_ms()
        if entry.runs and passed(entry.job.lease_expires_at_ms, now_ms):
            self.release(entry, Requeue(LEASE_EXPIRED, died=True))
        elif entry.waits and passed(entry.record.deadline_at_ms, now_ms):
            self.end(entry, Failed(deadline_passed()))
        else:
            return False
        return True

    def release(self, entry: Entry, requeue: Requeue) -> None:
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
            self.end(entry, Cancelled())
        elif passed(entry.record.deadline_at_ms, now_ms):
            self.end(entry, Failed(deadline_passed()))
        elif to_blame and entry.job.deaths >= self._deaths_max:
            (self.whole_of(entry) or entry).update(dead_letter=True)
            self.end(entry, Failed(died_too_often(self._deaths_max)))
        else:
            self._requeue(entry, requeue, now_ms)

    def _requeue(self, entry: Entry, requeue: Requeue, now_ms: int) -> None:
        worker_id, whole = entry.record.worker_id, self.whole_of(entry)
        self._enter(entry, JobState.QUEUED)
        entry.update(
            worker_id=None, started_at_ms=None, progress=None, queue=QueueStatus(name=entry.job.queue, workers=0)
        )
        entry.sent_at_ms = now_ms
        if requeue.delay_ms > 0:
            entry.due_at_ms = now_ms + requeue.delay_ms
        if requeue.avoid_ms > 0:
            entry.avoided = (worker_id, now_ms + requeue.delay_ms + requeue.avoid_ms)
        event = EventName.JOB_REQUEUED if whole is None else EventName.PART_REQUEUED
        self._log(entry, event, {"attempt": entry.record.attempt, "reason": requeue.reason})
        if whole is not None:
            self._follow(whole)

    def _go_on_after(self, part: Entry, whole: Entry, outcome: Outcome) -> None:
        """After a part, with which the whole job may be over."""
        self._follow(whole)
        if whole.record.finished:
            return
        match outcome:
            case Failed(error):
                self._fail(whole, error_of_part(error, part.told_as))
                self._stop_parts(whole)
            case Cancelled():
                self.cancel_whole(whole)
            case Succeeded():
                parts = self.parts_of(whole)
                if all(each.state is JobState.SUCCEEDED for each in parts):
                    whole.job = joined(whole.job, [each.job for each in parts])
                    names: JsonObject = {"outputs": [name for each in parts for name in each.job.origins]}
                    self._finish(whole, JobState.SUCCEEDED, EventName.JOB_FINISHED, names)
                elif whole.record.cancel_requested and not any(each.runs for each in parts):
                    self._finish(whole, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
                else:
                    self._log(part, EventName.PART_FINISHED, ending(outcome).data)

    def _stop_parts(self, whole: Entry) -> None:
        """Let no part of the job begin any more: end those that wait, and ask the holders of those that run to stop."""
        for part in self.parts_of(whole):
            if part.record.finished:
                continue
            part.update(cancel_requested=True)
            if part.runs:
                self.to_stop.append(part.record.id)
            else:
                self._finish(part, JobState.CANCELLED, EventName.JOB_CANCELLED, {})
        self._follow(whole)

    def _follow(self, whole: Entry) -> None:
        """Let the record of a split job say what its parts do; once it is over, only how they stand."""
        parts = self.parts_of(whole)
        states = Counter(part.state for part in parts)
        whole.update(
            parts=PartCounts(
                total=len(parts),
                queued=states[JobState.QUEUED],
                running=states[JobState.RUNNING],
                succeeded=states[JobState.SUCCEEDED],
            )
        )
        if whole.record.finished:
            return
        workers = {part.record.worker_id for part in parts} - {None}
        whole.update(
            attempt=max(part.record.attempt for part in parts),
            worker_id=workers.pop() if len(workers) == 1 else None,
            progress=_together(parts),
        )

    def _enter(self, entry: Entry, state: JobState) -> None:
        if state not in ALLOWED_MOVES[entry.state]:
            raise AssertionError(f"a job never moves from {entry.state} to {state}")
        entry.update(state=state, phase=None, queue=None)
        entry.job = replace(entry.job, lease_expires_at_ms=None)
        entry.token, entry.alone, entry.due_at_ms, entry.avoided, entry.awaited = "", False, None, None, None
        self._count(entry)

    def _finish(self, entry: Entry, state: JobState, event: EventName, data: JsonObject) -> None:
        """End one record; that of a part silently, and it is kept as long as the whole job is."""
        self._enter(entry, state)
        now_ms = self._now_ms()
        entry.update(finished_at_ms=now_ms)
        if entry.job.part is None:
            entry.update(expires_at_ms=now_ms + self._job_ttl_ms)
            self._log(entry, event, data)

    def _fail(self, entry: Entry, error: ErrorInfo) -> None:
        entry.update(error=error)
        self._finish(entry, JobState.FAILED, EventName.JOB_FAILED, failure(error))

    def _count(self, entry: Entry) -> None:
        if entry.job.part is None:
            mode, resolved = entry.record.execution_mode or "unknown", entry.job.resolved
            self.counts[(resolved.task.value, resolved.model, str(mode), entry.state.value)] += 1

    def _note_service_time(self, entry: Entry) -> None:
        now_ms, started_at_ms = self._now_ms(), entry.record.started_at_ms
        self.service_times = {queue: times for queue, times in self.service_times.items() if times.until_ms > now_ms}
        times = self.service_times.setdefault(entry.job.queue, ServiceTimes(deque(maxlen=SERVICE_TIMES_MAX), now_ms))
        times.until_ms = now_ms + SERVICE_TIMES_KEPT_MS
        if started_at_ms is not None:
            times.newest.appendleft(ServiceTime(service_kind(entry.job.resolved), now_ms - started_at_ms))

    def _log(self, entry: Entry, name: EventName, data: JsonObject, stage: str = JOB_STAGE) -> None:
        """Log an event; one of a part in the log of the whole job, as long as that is not over."""
        teller, part = self.whole_of(entry) or entry, entry.job.part
        if part is not None:
            if teller.record.finished:
                return
            data = {"part": part.number, **data}
        seq = teller.job.last_seq + 1
        event = Event(seq=seq, event=name, stage=stage, timestamp_ms=self._now_ms(), data=data)
        for each in (teller, entry):
            each.job = replace(each.job, last_seq=seq)
        teller.log.append(event)
        for listener in self.listeners.get(teller.record.id, ()):
            listener(event)


def _together(parts: Sequence[Entry]) -> Progress | None:
    """The progress of a split job.

    Steps of a part that has not told how many it has count as many as another's; one that succeeded has made them all.
    """
    told = [done for part in parts if (done := part.done()) is not None]
    if not told:
        return None
    silent = [part.state is JobState.SUCCEEDED for part in parts if part.record.progress is None]
    most = max(done.total for done in told)
    return progress(
        sum(done.step for done in told) + sum(silent) * most, sum(done.total for done in told) + len(silent) * most
    )
