"""How values become JSON answers, and how jobs look to their owner over HTTP."""

import json
from collections.abc import Mapping
from typing import Any

from flask import Response
from pydantic import BaseModel

from omnirt_tasks.contract import JobRecord
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.jobs.effects import unknown_job
from omnirt_tasks.jobs.values import StoredJob
from web.services import services

JSON = "application/json"


def json_answer(
    value: BaseModel | JsonObject | Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A value as a JSON answer, in UTF-8."""
    if isinstance(value, BaseModel):
        body = value.model_dump_json()
    else:
        body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, mimetype=JSON)


def job_url(job_id: str) -> str:
    """Where a job's record is."""
    return f"/v1/jobs/{job_id}"


def own_job(job_id: str, owner: str) -> StoredJob:
    """The owner's job. Raises JobNotFound, for another owner's and for a part of one too, in the same words."""
    job = services().store.get(job_id)
    if job.owner != owner or job.part is not None:
        raise unknown_job(job_id)
    return job


def record_of(job: StoredJob) -> JobRecord:
    """The record as its owner sees it, with where it waits."""
    record = job.record
    return record if record.queue is None else record.model_copy(update={"queue": services().queue_status(job)})
