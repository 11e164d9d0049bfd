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
    QueueStatus,
    ResolvedRequest,
)
from omnirt_tasks.jobs.effects import progress
from omnirt_tasks.jobs.store import Checkpoint, StoredJob

# A listing shows no results, and they are the largest part of a record.
FIELDS_OF_PAGE = (
    "owner", "queue", "request", "resolved", "trace_id", "traceparent", "state", "phase", "step", "total", "attempt",
    "cancel_requested", "lease_expires_at_ms", "worker_id", "execution_mode", "error", "enqueued_at_ms",
    "started_at_ms", "finished_at_ms", "expires_at_ms", "deadline_at_ms", "dead_letter", "runs_alone", "deaths",
    "retries", "checkpoint_attempt", "checkpoint_name", "checkpoint_step", "seq",
)  # fmt: skip


def fields_of(flat: Sequence[str]) -> dict[str, str]:
    """The hash that a script answered as names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def stored_job(job_id: str, fields: Mapping[str, str]) -> StoredJob:
    """The job that the fields tell of."""
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
    )


def _checkpoint(fields: Mapping[str, str]) -> Checkpoint | None:
    if "checkpoint_name" not in fields:
        return None
    return Checkpoint(int(fields["checkpoint_attempt"]), fields["checkpoint_name"], int(fields["checkpoint_step"]))
