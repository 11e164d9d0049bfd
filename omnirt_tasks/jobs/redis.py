"""The job store in Redis.

    {prefix}:job:{id}         HASH    the record of a job, or of a part of one; what is deep is JSON text
    {prefix}:log:{id}         STREAM  the newest 1,000 events; an entry has id "{seq}-0" and the event as JSON
    {prefix}:waiting:{queue}  ZSET    id → priority and serial: position and depth
    {prefix}:sent:{queue}     ZSET    id → when the waiting job's message was last sent
    {prefix}:delayed:{queue}  ZSET    id → when the waiting job's message is to be sent, its retry having a delay
    {prefix}:deadlines:{queue} ZSET   id → the waiting job's deadline
    {prefix}:running:{queue}  ZSET    id → when its lease expires
    {prefix}:times:{queue}    LIST    the newest service times
    {prefix}:owner:{owner}    ZSET    id → serial: listing
    {prefix}:dead:{owner}     ZSET    id → serial: the dead letters among them
    {prefix}:idempotency:{owner}:{SHA-256 of a key}  HASH  the job it stands for, and its body's fingerprint
    {prefix}:finished         ZSET    id → when it expires
    {prefix}:queues           SET     queues that may hold a job
    {prefix}:states           HASH    task|model|execution_mode|state → how often it was entered
    {prefix}:serial           number  of the latest job
    {prefix}:events:{id}      channel each event's JSON, as it is logged
    {prefix}:cancel           channel ids of running jobs whose cancel is asked for

A split job has a record and a log, but does not wait or run: its parts do, which have a record each and no log.

Every change is one script (`scripts/`), which checks the state it starts from, by the clock of Redis. A client
sends a call again when its answer was lost; the call's id makes it count once.
"""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import redis

from omnirt_tasks.contract import CancelOutcome, Event, ExecutionMode, JobState, Priority
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.effects import (
    DEATHS_MAX,
    PROMOTE_AFTER_S,
    RANKS,
    accepted,
    deadline_ms,
    ending,
    idempotency_mismatch,
    phase_of,
    progress_of,
    queue_full,
    queues_max,
    remaining_ms,
    too_many_queues,
    unknown_job,
    without_progress,
)
from omnirt_tasks.jobs.parts import accepted_parts, joined, part_ids
from omnirt_tasks.jobs.redis_record import (
    FIELDS_OF_PAGE,
    compact,
    fields_of,
    fields_of_new,
    fields_of_new_part,
    stored_job,
)
from omnirt_tasks.jobs.scripting import RANK_SPAN, Scripts
from omnirt_tasks.jobs.values import (
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
    ServiceTime,
    StoredJob,
    Succeeded,
    WakeUp,
)

OVERDUE_LIMIT = 1_000
"""The most jobs of a queue that one round of reconciling looks at; the rest follows in the next."""

PAGE_SCAN_LIMIT = 1_000
"""The most jobs that are read for one page with a filter."""


class RedisJobStore:
    """JobStore in Redis; jobs are kept `job_ttl_s` after their end. The client answers in text (see `connect`)."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        prefix: str,
        job_ttl_s: float,
        deaths_max: int = DEATHS_MAX,
        promote_after_s: float = PROMOTE_AFTER_S,
    ) -> None:
        self._client: Any = client  # its types do not know that answers are text
        self._prefix = prefix
        self._promote_after_ms = round(promote_after_s * 1000)
        self._scripts = Scripts(client, prefix, job_ttl_ms=round(job_ttl_s * 1000), deaths_max=deaths_max)

    def create(self, job: NewJob, *, queue_limit: int | None = None) -> StoredJob:
        """See JobStore."""
        most, limit_ms, key = queues_max(job.queue), deadline_ms(job), job.idempotency
        parts = accepted_parts(job)
        records = (fields_of_new(job, len(parts)), *map(fields_of_new_part, parts))
        outcome, *told = self._scripts.run(
            "create", job.id, job.queue, job.owner, -1 if queue_limit is None else queue_limit,
            -1 if most is None else most,
            job.resolved.task, job.resolved.model, job.resolved.priority, compact({"queue": job.queue}),
            -1 if limit_ms is None else limit_ms,
            *((_digest(key.key), key.fingerprint, key.ttl_ms) if key else ("", "", 0)),
            len(parts), *(text for fields in records for text in _counted(fields)),
        )  # fmt: skip
        match outcome:
            case "full":
                raise queue_full(job.queue, queue_limit)
            case "too many queues":
                raise too_many_queues()
            case "mismatch" if key:
                raise idempotency_mismatch(key.key)
            case "exists":
                known_id, flat = told
                return self._with_parts(stored_job(known_id, fields_of(flat)))
        now_ms, position = told
        return StoredJob(
            accepted(job, now_ms),
            job.owner,
            job.queue,
            job.resolved,
            job.traceparent,
            last_seq=1,
            position=position,
            priority=job.resolved.priority,
            parts=part_ids(job.id, len(parts)),
        )

    def submitted(self, owner: str, idempotency: Idempotency) -> StoredJob | None:
        """See JobStore."""
        key = self._key("idempotency", owner, _digest(idempotency.key))
        with reaching_store():
            job_id, fingerprint = self._client.hmget(key, "job", "fingerprint")
        if job_id is None:
            return None
        try:
            job = self.get(job_id)
        except JobNotFound:  # its time was over before the key's was
            return None
        if fingerprint != idempotency.fingerprint:
            raise idempotency_mismatch(idempotency.key)
        return job

    def get(self, job_id: str) -> StoredJob:
        """See JobStore."""
        return self._with_parts(*self._whole_records([job_id]))

    def page(self, query: JobQuery) -> JobPage:
        """See JobStore."""
        key = self._key("dead" if query.dead_letters else "owner", query.owner)
        found: list[StoredJob] = []
        below = f"({query.cursor}" if query.cursor and query.cursor.isascii() and query.cursor.isdigit() else "+inf"
        wanted = 100 if query.filtered else query.limit + 1  # one more than fits tells whether there is a next page
        for _ in range(0, PAGE_SCAN_LIMIT, wanted):
            with reaching_store():
                entries = self._client.zrevrangebyscore(key, below, "-inf", 0, wanted, withscores=True)
                records = self._records([job_id for job_id, _ in entries])
            for (job_id, serial), fields in zip(entries, records, strict=True):
                if fields is None:  # Redis dropped the record before the sweeper came
                    with reaching_store():
                        self._client.zrem(key, job_id)
                elif query.matches(job := stored_job(job_id, fields)):
                    if len(found) == query.limit:
                        return JobPage(found, below.removeprefix("("))
                    found.append(job)
                below = f"({serial:.0f}"
            if len(entries) < wanted:
                return JobPage(found, None)
        return JobPage(found, below.removeprefix("("))

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
        token = secrets.token_hex(16) if token is None else token
        answer = self._scripts.run(
            "claim", job_id, token, lease_ttl_ms, worker_id, json.dumps(worker_id), execution_mode or "", int(alone),
            "*" if queues is None else "", *(queues or ()),
        )  # fmt: skip
        if answer is None:
            return None
        if answer in ("must run alone", "awaited"):
            return MustRunAlone(awaited=answer == "awaited")
        job = stored_job(job_id, fields_of(answer))
        return Claim(Lease(job_id, job.record.attempt, token), job, remaining_ms(job.record))

    def renew(self, lease: Lease, *, lease_ttl_ms: int) -> Renewal:
        """See JobStore."""
        answer = self._scripts.run("renew", lease.job_id, lease.token, lease_ttl_ms)
        return Renewal(held=answer != "lost", cancel_requested=answer == "cancel")

    def append(self, lease: Lease, drafts: Sequence[EventDraft], *, call: str | None = None) -> bool:
        """See JobStore."""
        args: list[str | int] = []
        for draft in drafts:
            moved = progress_of(draft)
            data = without_progress(draft.data) if moved else draft.data
            args += (draft.event, json.dumps(draft.stage), compact(data), phase_of(draft) or "")
            args += (moved.step, moved.total) if moved else ("", "")
        return bool(self._scripts.run("append", lease.job_id, lease.token, *args, call=call) == "done")

    def commit(self, lease: Lease, outcome: Outcome) -> bool:
        """See JobStore."""
        names: Sequence[str] = ()
        match outcome:
            case Succeeded(result):
                brings, names = result.model_dump_json(), [output.name for output in result.outputs]
            case Failed(error):
                brings = compact(error.model_dump(mode="json"))
            case _:
                brings = ""
        end = ending(outcome)
        answer = self._scripts.run(
            "commit", lease.job_id, lease.token, end.state, end.execution_mode or "", brings, json.dumps(names)
        )
        return bool(answer == "done")

    def checkpoint(self, lease: Lease, *, name: str, step: int) -> bool:
        """See JobStore."""
        return bool(self._scripts.run("checkpoint", lease.job_id, lease.token, name, step) == "done")

    def give_back(self, lease: Lease, requeue: Requeue) -> bool:
        """See JobStore."""
        answer = self._scripts.run(
            "give_back",
            lease.job_id,
            lease.token,
            json.dumps(requeue.reason),
            int(requeue.died),
            int(requeue.alone),
            int(requeue.retry),
            requeue.delay_ms,
            requeue.avoid_ms,
        )
        return bool(answer == "done")

    def cancel(self, job_id: str) -> CancelOutcome:
        """See JobStore."""
        answer = self._scripts.run("cancel", job_id)
        if answer is None:
            raise unknown_job(job_id)
        return CancelOutcome(answer)

    def forget_dead_letter(self, job_id: str) -> None:
        """See JobStore."""
        if self._scripts.run("forget_dead_letter", job_id) is None:
            raise unknown_job(job_id)

    def purge(self, job_id: str) -> None:
        """See JobStore."""
        self._scripts.run("purge", job_id)

    def reconcile(self, *, unclaimed_after_ms: int, spare_leases: bool = False) -> Reconciled:
        """See JobStore."""
        resend: dict[str, WakeUp] = {}  # what was promoted after all is named as that alone
        expired: list[str] = []
        overdue: list[str] = []
        with reaching_store():
            queues = self._client.smembers(self._key("queues"))
        for queue in sorted(queues):
            lapsed, late = self._scripts.run("overdue", "", queue, OVERDUE_LIMIT, int(spare_leases))
            for job_ids, found in ((lapsed, expired), (late, overdue)):
                for job_id in job_ids:
                    became, _, priority = (self._scripts.run("expire", job_id) or "").partition(" ")
                    if became:
                        found.append(job_id)
                    if became == JobState.QUEUED:
                        resend[job_id] = WakeUp(job_id, queue, Priority(priority))
            due = fields_of(
                self._scripts.run("due", "", queue, unclaimed_after_ms, self._promote_after_ms, OVERDUE_LIMIT)
            )
            resend |= {job_id: WakeUp(job_id, queue, Priority(priority)) for job_id, priority in due.items()}
        return Reconciled(list(resend.values()), expired, overdue)

    def expired(self, limit: int = 100, *, skip: int = 0) -> Sequence[StoredJob]:
        """See JobStore."""
        with reaching_store():
            now_ms = self._now_ms()
            ids = self._client.zrange(self._key("finished"), "-inf", now_ms, byscore=True, offset=skip, num=limit)
            records = self._records(ids)
        for job_id, fields in zip(ids, records, strict=True):
            if fields is None:  # Redis dropped the record before the sweeper came
                self.purge(job_id)
        return [stored_job(job_id, fields) for job_id, fields in zip(ids, records, strict=True) if fields is not None]

    def events(self, job_id: str, *, after: int = 0) -> Sequence[Event]:
        """See JobStore."""
        with reaching_store():
            entries = self._client.xrange(self._key("log", job_id), min=f"({max(0, after)}-0")
            if not entries:
                state, part_of = self._client.hmget(self._key("job", job_id), "state", "part_of")
                if state is None or part_of is not None:
                    raise unknown_job(job_id)
        return [Event.model_validate_json(entry["event"]) for _, entry in entries]

    def depth(self, queue: str) -> QueueDepth:
        """See JobStore."""
        with reaching_store():
            pipeline = self._client.pipeline(transaction=False).zcard(self._key("running", queue))
            for rank in RANKS.values():
                pipeline.zcount(self._key("waiting", queue), rank * RANK_SPAN, f"({(rank + 1) * RANK_SPAN}")
            running, *waiting = pipeline.execute()
        by_priority = {priority: count for priority, count in zip(RANKS, waiting, strict=True) if count}
        return QueueDepth(sum(waiting), running, by_priority)

    def position(self, job_id: str) -> int | None:
        """See JobStore."""
        rank = self._scripts.run("position", job_id)
        if rank is None:
            raise unknown_job(job_id)
        return rank or None

    def service_times(self, queue: str) -> Sequence[ServiceTime]:
        """See JobStore."""
        with reaching_store():
            entries = self._client.lrange(self._key("times", queue), 0, -1)
        pairs = (entry.split(" ", 1) for entry in entries)
        return [ServiceTime(kind, int(duration_ms)) for duration_ms, kind in pairs]

    def queues(self) -> Sequence[str]:
        """See JobStore."""
        with reaching_store():
            names = sorted(self._client.smembers(self._key("queues")))
        depths = {name: self.depth(name) for name in names}
        return [name for name in names if depths[name] != QueueDepth(0, 0)]

    def state_counts(self) -> Mapping[tuple[str, str, str, str], int]:
        """See JobStore."""
        with reaching_store():
            counts = self._client.hgetall(self._key("states"))
        return {
            (task, model, mode, state): int(n)
            for key, n in counts.items()
            for task, model, mode, state in [key.split("|")]
        }

    def ping(self) -> None:
        """See JobStore."""
        with reaching_store():
            self._client.ping()

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _now_ms(self) -> int:
        seconds, micros = self._client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _whole_records(self, job_ids: Sequence[str]) -> list[StoredJob]:
        """The jobs with these ids. Raises JobNotFound where one is gone."""
        pipeline = self._client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hgetall(self._key("job", job_id))
        with reaching_store():
            records = pipeline.execute()
        for job_id, fields in zip(job_ids, records, strict=True):
            if not fields:
                raise unknown_job(job_id)
        return [stored_job(job_id, fields) for job_id, fields in zip(job_ids, records, strict=True)]

    def _with_parts(self, job: StoredJob) -> StoredJob:
        """The job, with what its parts have made, where it is split and has succeeded."""
        if not job.parts or job.record.state is not JobState.SUCCEEDED:
            return job
        return joined(job, self._whole_records(job.parts))

    def _records(self, job_ids: Sequence[str]) -> list[dict[str, str] | None]:
        """The records' fields, results left out; None for those that are gone."""
        if not job_ids:
            return []
        pipeline = self._client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hmget(self._key("job", job_id), FIELDS_OF_PAGE)
        named = (zip(FIELDS_OF_PAGE, values, strict=True) for values in pipeline.execute())
        records = [{name: value for name, value in fields if value is not None} for fields in named]
        return [fields or None for fields in records]


def _counted(fields: Mapping[str, str | int]) -> Sequence[str | int]:
    """Names and values in turn, after the number of these."""
    return (2 * len(fields), *(text for field in fields.items() for text in field))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
