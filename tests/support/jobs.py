"""Jobs, outcomes and drafts to test with, and a store with a clock that a test can move."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import redis

from omnirt_tasks.contract import (
    Artifact,
    ArtifactKind,
    ErrorInfo,
    EventName,
    ExecutionMode,
    GenerateResult,
    Inputs,
    ResolvedRequest,
    RunReport,
    Task,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.jobs.store import EventDraft, EventFeed, Failed, JobStore, NewJob, Succeeded

LONG_MS = 600_000
"""A lease that does not run out within a test."""


@dataclass(frozen=True)
class Rig:
    """A store, its feed, and `pass_time(ms)`, after which the store's clock has gone on by that much at least."""

    store: JobStore
    feed: EventFeed
    pass_time: Callable[[int], None]


class ManualClock:
    """A clock in Unix milliseconds that goes on only when told."""

    def __init__(self) -> None:
        self._now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self._now_ms

    def pass_time(self, ms: int) -> None:
        self._now_ms += ms


def pass_redis_time(client: redis.Redis, ms: int) -> None:
    """Return once the clock of Redis, which scripts read, is `ms` further."""

    def now_ms() -> int:
        seconds, micros = client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    until_ms = now_ms() + ms
    while now_ms() <= until_ms:
        time.sleep(0.0005)


def new_job(
    job_id: str | None = None,
    *,
    owner: str = "alice",
    queue: str = "cpu-shapes",
    prompt: str = "a red circle",
    model: str = "shapes",
    task: Task = Task.TEXT2IMAGE,
    config: JsonObject | None = None,
) -> NewJob:
    """A job as the gateway would hand it to the store."""
    resolved = ResolvedRequest(
        task=task,
        model=model,
        backend="cpu",
        inputs=Inputs(prompt=prompt),
        config=config or {"num_inference_steps": 4, "seed": 7},
        metadata={"who": "test"},
    )
    request: JsonObject = {"task": task.value, "model": model, "inputs": {"prompt": prompt}}
    return NewJob(
        job_id or str(uuid.uuid4()), owner, queue, request, resolved, trace_id="trace", traceparent="00-parent"
    )


def succeeded(job_id: str, *, mode: ExecutionMode = ExecutionMode.MODULAR) -> Succeeded:
    """An outcome with one picture."""
    picture = Artifact(
        kind=ArtifactKind.IMAGE, name="0.png", index=0, path="0.png", mime="image/png", size_bytes=3, sha256="00"
    )
    report = RunReport(
        run_id="run", task=Task.TEXT2IMAGE, model="shapes", backend="cpu", job_id=job_id, execution_mode=mode
    )
    return Succeeded(GenerateResult(outputs=(picture,), metadata=report))


def failed() -> Failed:
    """An outcome with an error."""
    return Failed(ErrorInfo(code="model_failed", message="The model failed.", hint="Look at the log."))


def step(number: int, total: int = 4) -> EventDraft:
    """A step of denoising."""
    return EventDraft(EventName.STAGE_PROGRESS, "denoise", {"step": number, "total": total})
