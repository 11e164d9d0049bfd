"""How Redis holds a job: a hash of texts, parsed once."""

import json
from collections.abc import Mapping, Sequence

from omnirt_tasks.contract import (
    ErrorInfo,
    ExecutionMode,
    GenerateResult,
    JobRecord,
    JobState,
    Phase,
    Priority,
    QueueStatus,
    ResolvedRequest,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.job import PartCounts
from omnirt_tasks.jobs.effects import progress, service_kind
from omnirt_tasks.jobs.parts import AcceptedPart, origins_of, part_ids
from omnirt_tasks.jobs.values import Checkpoint, NewJob, PartOf, StoredJob

# A listing shows no results, and they are the largest part of a record.
FIELDS_OF_PAGE = (
    "owner", "queue", "request", "resolved", "trace_id", "traceparent", "state", "phase", "step", "total", "attempt",
    "cancel_requested", "lease_expires_at_ms", "worker_id", "execution_mode", "error", "enqueued_at_ms",
    "started_at_ms", "finished_at_ms", "expires_at_ms", "deadline_at_ms", "dead_letter", "runs_alone", "deaths",
    "retries", "checkpoint_attempt", "checkpoint_name", "checkpoint_step", "seq", "priority", "parts", "parts_queued",
    "parts_running", "parts_succeeded",
)  # fmt: skip


def compact(value: JsonObject) -> str:
    """The JSON of data as Redis holds it, without spaces. Raises ValueError for what is none."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def fields_of_new(job: NewJob, parts: int) -> dict[str, str | int]:
    """What a new job brings beside the fields that the scripts read or write; `parts` is their number, 0 for none."""
    return _shared_fields(job) | ({"parts": parts} if parts else {"kind": service_kind(job.resolved)})


def fields_of_new_part(part: AcceptedPart) -> dict[str, str | int]:
    """What a part of a new job brings."""
    return _shared_fields(part.job) | {
        "kind": service_kind(part.job.resolved),
        "part_of": part.of.job_id,
        "part": part.of.number,
        "part_total": part.of.total,
        "first_output": part.of.first_output,
        "told_as": part.told_as,
        "seq": 1,  # that of the whole job's first event
    }


def _shared_fields(job: NewJob) -> dict[str, str | int]:
    fields = {
        "request": compact(job.request),
        "resolved": job.resolved.model_dump_json(),
        "trace_id": job.trace_id,
        "traceparent": job.traceparent,
    }
    return {name: value for name, value in fields.items() if value is not None}


def fields_of(flat: Sequence[str]) -> dict[str, str]:
    """The hash that a script answered as names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def stored_job(job_id: str, fields: Mapping[str, str]) -> StoredJob:
    """The job that the fields tell of; a split one without its result, which its parts have."""
    resolved = ResolvedRequest.model_validate_json(fields["resolved"])
    state = JobState(fields["state"])

    def number(name: str) -> int | None:
        return int(fields[name]) if name in fields else None

    step, total = number("step"), number("total")
    record = JobRecord(
        id=job_id,
        job_id=job_id,
        state=state,
        phase=Phase(fields["phase"]) if "phase" in fields else None,
        progress=progress(step, total) if step is not None and total is not None else None,
        queue=QueueStatus(name=fields["queue"], workers=0) if state is JobState.QUEUED else None,
        priority=resolved.priority,
        attempt=int(fields["attempt"]),
        cancel_requested="cancel_requested" in fields,
        backend=resolved.backend,
        request=json.loads(fields["request"]),
        metadata=resolved.metadata,
        error=ErrorInfo.model_validate_json(fields["error"]) if "error" in fields else None,
        trace_id=fields.get("trace_id"),
        worker_id=fields.get("worker_id"),
        execution_mode=ExecutionMode(fields["execution_mode"]) if "execution_mode" in fields else None,
        enqueued_at_ms=int(fields["enqueued_at_ms"]),
        started_at_ms=number("started_at_ms"),
        finished_at_ms=number("finished_at_ms"),
        expires_at_ms=number("expires_at_ms"),
        deadline_at_ms=number("deadline_at_ms"),
        dead_letter="dead_letter" in fields,
        parts=_part_counts(fields),
        result=GenerateResult.model_validate_json(fields["result"]) if "result" in fields else None,
    )
    return StoredJob(
        record,
        owner=fields["owner"],
        queue=fields["queue"],
        resolved=resolved,
        traceparent=fields.get("traceparent"),
        lease_expires_at_ms=number("lease_expires_at_ms"),
        last_seq=int(fields["seq"]),
        runs_alone="runs_alone" in fields,
        deaths=number("deaths") or 0,
        retries=number("retries") or 0,
        checkpoint=_checkpoint(fields),
        priority=Priority(fields.get("priority", resolved.priority)),
        parts=part_ids(job_id, number("parts") or 0),
        part=_part_of(fields),
        origins=origins_of(job_id, record.attempt, record.result),
    )


def _checkpoint(fields: Mapping[str, str]) -> Checkpoint | None:
    if "checkpoint_name" not in fields:
        return None
    return Checkpoint(int(fields["checkpoint_attempt"]), fields["checkpoint_name"], int(fields["checkpoint_step"]))


def _part_counts(fields: Mapping[str, str]) -> PartCounts | None:
    if "parts" not in fields:
        return None
    total = int(fields["parts"])
    queued, running, succeeded = (
        int(fields.get(name, default))
        for name, default in (("parts_queued", total), ("parts_running", 0), ("parts_succeeded", 0))
    )
    return PartCounts(total=total, queued=queued, running=running, succeeded=succeeded)


def _part_of(fields: Mapping[str, str]) -> PartOf | None:
    if "part_of" not in fields:
        return None
    number, total, first_output = (int(fields[name]) for name in ("part", "part_total", "first_output"))
    return PartOf(fields["part_of"], number, total, first_output)
