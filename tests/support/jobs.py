"""Jobs, outcomes and drafts to test with, and a store with a clock that a test can move."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import redis

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import (
    Artifact,
    ArtifactKind,
    CancelOutcome,
    ErrorInfo,
    EventName,
    ExecutionMode,
    GenerateResult,
    Inputs,
    Priority,
    ResolvedRequest,
    RunReport,
    Task,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.subscription import EventFeed
from omnirt_tasks.jobs.values import (
    Claim,
    EventDraft,
    Failed,
    Idempotency,
    Lease,
    MustRunAlone,
    NewJob,
    NewPart,
    Reconciled,
    Succeeded,
)

LONG_MS = 600_000
"""A lease that does not run out within a test."""


CLOCK_OF_REDIS = "local time = redis.call('TIME')"

PICTURES_PER_PART = 2
"""How many pictures a part of a job makes."""

PROMOTE_AFTER_MS = 1_000
"""How long a job waits in a rig until it moves up."""

DEATHS_MAX = 2
"""How many deaths while alone a job may come to in a rig."""


@dataclass(frozen=True)
class Rig:
    """A store, its feed, and `pass_time(ms)`, which is all that the store's clock goes on by."""

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


class ScriptClock:
    """A clock that the scripts of a Redis store read in place of that of Redis; it goes on only when told."""

    def __init__(self, store: RedisJobStore, client: redis.Redis, *, prefix: str) -> None:
        told = f"local ms = tonumber(redis.call('GET', '{prefix}:clock'))"
        for name, script in store._scripts._scripts.items():
            text = str(script.script)
            assert CLOCK_OF_REDIS in text
            clock = f"{told} local time = {{ math.floor(ms / 1000), ms % 1000 * 1000 }}"
            store._scripts._scripts[name] = client.register_script(text.replace(CLOCK_OF_REDIS, clock))
        self._client = client
        self._key = f"{prefix}:clock"
        client.set(self._key, unix_ms())  # keys get their end by it, so it must not lie in the past

    def pass_time(self, ms: int) -> None:
        self._client.incrby(self._key, ms)


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
    deadline_s: float | None = None,
    idempotency: Idempotency | None = None,
    priority: Priority = Priority.NORMAL,
    parts: int = 0,
) -> NewJob:
    """A job as the gateway would hand it to the store; in `parts` of PICTURES_PER_PART each where it is split."""
    resolved = ResolvedRequest(
        task=task,
        model=model,
        backend="cpu",
        inputs=Inputs(prompt=prompt),
        config=config or {"num_inference_steps": 4, "seed": 7},
        priority=priority,
        metadata={"who": "test"},
        deadline_s=deadline_s,
    )
    request: JsonObject = {"task": task.value, "model": model, "inputs": {"prompt": prompt}}
    return NewJob(
        job_id or str(uuid.uuid4()),
        owner,
        queue,
        request,
        _of_pictures(resolved, parts * PICTURES_PER_PART) if parts else resolved,
        trace_id="trace",
        traceparent="00-parent",
        idempotency=idempotency,
        parts=tuple(
            NewPart(_of_pictures(resolved, PICTURES_PER_PART, first), first)
            for first in range(0, parts * PICTURES_PER_PART, PICTURES_PER_PART)
        ),
    )


def _of_pictures(resolved: ResolvedRequest, count: int, first: int = 0) -> ResolvedRequest:
    config = {**resolved.config, "num_images_per_prompt": count, "seed": 7 + first}
    return resolved.model_copy(update={"config": config})


def idempotency(key: str = "key", *, body: str = "body", ttl_ms: int = LONG_MS) -> Idempotency:
    """A caller's own name for a submit."""
    return Idempotency(key, fingerprint=body, ttl_ms=ttl_ms)


def won(claim: Claim | MustRunAlone | None) -> Claim:
    """The claim, which the test relies on to have been won."""
    assert isinstance(claim, Claim), f"not claimed: {claim}"
    return claim


def claimed(
    store: JobStore, job_id: str, *, worker_id: str = "w1", lease_ttl_ms: int = LONG_MS, alone: bool = True
) -> Lease:
    """The lease of an attempt that begins now; alone, since that way any waiting job is claimed."""
    return won(store.claim(job_id, worker_id=worker_id, lease_ttl_ms=lease_ttl_ms, alone=alone)).lease


def succeeded(
    job_id: str, *, mode: ExecutionMode = ExecutionMode.MODULAR, first: int = 0, count: int = 1, worker_id: str = "w1"
) -> Succeeded:
    """An outcome with `count` pictures, the first of which is picture `first` of its job."""
    pictures = tuple(
        Artifact(
            kind=ArtifactKind.IMAGE,
            name=f"{index}.png",
            index=index,
            path=f"{index}.png",
            mime="image/png",
            seed=7 + index,
            size_bytes=3,
            sha256="00",
        )
        for index in range(first, first + count)
    )
    report = RunReport(
        run_id="run",
        task=Task.TEXT2IMAGE,
        model="shapes",
        backend="cpu",
        job_id=job_id,
        worker_id=worker_id,
        execution_mode=mode,
    )
    return Succeeded(GenerateResult(outputs=pictures, metadata=report))


def failed() -> Failed:
    """An outcome with an error."""
    return Failed(ErrorInfo(code="model_failed", message="The model failed.", hint="Look at the log."))


def step(number: int, total: int = 4) -> EventDraft:
    """A step of denoising."""
    return EventDraft(EventName.STAGE_PROGRESS, "denoise", {"step": number, "total": total})


def told(answer: object) -> str:
    """What a store answered, in a word or two, as the tables have it."""
    match answer:
        case Claim():
            return "won"
        case MustRunAlone():
            return "must run alone"
        case CancelOutcome():
            return answer.value
        case Reconciled(resend, expired, overdue):
            named = {"resend": resend, "expired": expired, "overdue": overdue}
            return " ".join(name for name, jobs in named.items() if jobs) or "-"
        case bool():
            return "held" if answer else "lost"
        case _:
            return "-"
