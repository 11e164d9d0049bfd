"""A real gateway process, and a worker that does what a test tells it: claims, tells of steps, commits."""

import hashlib
import io
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.broker_lists import lists_of
from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.contract import (
    Artifact,
    ArtifactKind,
    ErrorInfo,
    EventName,
    ExecutionMode,
    GenerateResult,
    RunReport,
    WorkerCapability,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.jobs.connection import connect as connect_redis
from omnirt_tasks.jobs.fleet import RedisFleet
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.values import Cancelled, Claim, EventDraft, Failed, Lease, Origin, Outcome, Succeeded
from omnirt_tasks.settings import Settings, load_settings
from tests.support.processes import Processes
from workers.attempts import gateway_address

REQUEST: dict[str, Any] = {"task": "text2image", "model": "stub", "inputs": {"prompt": "a red circle"}}
QUEUE = "cpu-stub-stub"
LEASE_MS = 60_000


def png(width: int = 8, height: int = 8) -> bytes:
    """A real picture."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


class ScriptedWorker:
    """Does with the store and the storage what a worker does, one call at a time. No torch, no Celery."""

    def __init__(self, settings: Settings) -> None:
        self.redis: Any = connect_redis(settings.redis_url)
        self.store = RedisJobStore(self.redis, prefix=settings.key_prefix, job_ttl_s=settings.job_ttl_s)
        self.fleet = RedisFleet(self.redis, prefix=settings.key_prefix)
        self.artifacts = ArtifactStorage(settings.storage_url)

    def announce(self, worker_id: str = "scripted", queues: tuple[str, ...] = (QUEUE,)) -> None:
        """Say that a worker serves the stub's queues."""
        told = WorkerCapability(
            worker_id=worker_id, backend="cpu-stub", device="cpu:0", queues=queues, models=("stub",)
        )
        self.fleet.publish(told, ttl_ms=LEASE_MS)

    def claim(self, job_id: str, *, lease_ms: int = LEASE_MS) -> Lease:
        """Begin the job."""
        claim = self.store.claim(job_id, worker_id="scripted", lease_ttl_ms=lease_ms)
        assert isinstance(claim, Claim), f"{job_id} cannot be claimed"
        return claim.lease

    def tell(self, lease: Lease, event: EventName, stage: str = "denoise", **data: Any) -> None:
        """Append one event."""
        assert self.store.append(lease, [EventDraft(event, stage, data)])

    def steps(self, lease: Lease, first: int, last: int, total: int) -> None:
        """Append a progress event for each step."""
        for step in range(first, last + 1):
            self.tell(lease, EventName.STAGE_PROGRESS, step=step, total=total)

    def succeed(self, lease: Lease, files: dict[str, bytes] | None = None, mime: str = "image/png") -> None:
        """Publish the files and commit."""
        made = {"0.png": png()} if files is None else files
        with TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in made]
            for path in paths:
                path.write_bytes(made[path.name])
            self.artifacts.publish(lease.job_id, lease.attempt, paths)
        part, origin = self.store.get(lease.job_id).part, Origin(lease.job_id, lease.attempt)
        addresses = {name: gateway_address(part.job_id if part else lease.job_id, origin, name) for name in made}
        outputs = tuple(
            Artifact(
                kind=ArtifactKind.IMAGE,
                name=name,
                index=index,
                path=addresses[name][0],
                url=addresses[name][1],
                mime=mime,
                width=8,
                height=8,
                seed=index,
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
            for index, (name, content) in enumerate(made.items())
        )
        self._commit(lease, Succeeded(GenerateResult(outputs=outputs, metadata=self._report(lease, outputs))))

    def fail(self, lease: Lease, code: str = "model_failed") -> None:
        """End the job with an error."""
        self._commit(lease, Failed(ErrorInfo(code=code, message="It did not work.")))

    def give_in(self, lease: Lease) -> None:
        """End the job as cancelled."""
        self._commit(lease, Cancelled())

    def run(self, job_id: str, steps: int = 3) -> None:
        """A whole job, from claim to result."""
        lease = self.claim(job_id)
        self.tell(lease, EventName.STAGE_START)
        self.steps(lease, 1, steps, steps)
        self.tell(lease, EventName.STAGE_END, elapsed_ms=1)
        self.succeed(lease)

    def close(self) -> None:
        """Let go of the connections."""
        self.redis.close()

    def _commit(self, lease: Lease, outcome: Outcome) -> None:
        assert self.store.commit(lease, outcome)

    def _report(self, lease: Lease, outputs: tuple[Artifact, ...]) -> RunReport:
        job = self.store.get(lease.job_id)
        return RunReport(
            run_id=f"{lease.job_id}-{lease.attempt}",
            task=job.resolved.task,
            model=job.resolved.model,
            backend=job.record.backend,
            job_id=lease.job_id,
            execution_mode=ExecutionMode.LEGACY_CALL,
            artifacts=outputs,
            config_resolved=job.resolved.config,
        )


@dataclass(frozen=True)
class Told:
    """One server-sent event as it came; a comment has no id."""

    id: str | None
    name: str | None
    data: JsonObject = field(default_factory=dict)


class Watching:
    """A stream of server-sent events that is open."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def events(self) -> Iterator[Told]:
        """The events as they come, comments left out, until the server ends the stream."""
        fields: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield Told(fields.get("id"), fields.get("event"), json.loads(fields["data"]))
                fields = {}

    def comment(self) -> str:
        """The next comment, whatever else comes before it."""
        return next(line for line in self._lines if line.startswith(":"))


class Gateway:
    """A gateway process with a client of it, and the worker that serves its jobs."""

    def __init__(
        self, url: str, settings: Settings, key: str | None = None, process: ChildProcess | None = None
    ) -> None:
        self.url = url
        self.process = process
        self.settings = settings
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=20.0)
        self.worker = ScriptedWorker(settings)

    def submit(self, **changes: Any) -> str:
        """A job for the stub; its id."""
        answer = self.http.post("/v1/jobs", json=REQUEST | changes)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def messages(self) -> list[str]:
        """The raw messages that wait in the broker, those of a higher priority first."""
        lists = lists_of(QUEUE, prefix=broker_prefix(self.settings))
        return [str(message) for name in lists for message in self.worker.redis.lrange(name, 0, -1)]

    def finished(self, **changes: Any) -> str:
        """A job that has succeeded; its id."""
        job_id = self.submit(**changes)
        self.worker.run(job_id)
        return job_id

    @contextmanager
    def watch(self, job_id: str, headers: dict[str, str] | None = None, **query: Any) -> Iterator[Watching]:
        """The job's event stream."""
        with self.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers, params=query) as response:
            yield Watching(response)

    def socket(self, job_id: str, query: str = "", **options: Any) -> ClientConnection:
        """A WebSocket to the job; use it in a `with` block."""
        address = f"{self.url.replace('http', 'ws', 1)}/v1/jobs/{job_id}/stream{query}"
        connection: ClientConnection = connect(address, **options)
        return connection

    def stop(self) -> None:
        """Ask the process to stop, and wait until it has."""
        assert self.process is not None
        self.process.stop()

    def close(self) -> None:
        """Let go of every connection."""
        self.http.close()
        self.worker.close()


@contextmanager
def running_gateway(settings: Settings, key: str | None = None) -> Iterator[Gateway]:
    """A gateway process with these settings, for a block."""
    processes = Processes()
    try:
        process, url = processes.gateway(settings)
        gateway = Gateway(url, settings, key, process)
        try:
            yield gateway
        finally:
            gateway.close()
    finally:
        processes.stop_all()


def code_of(answer: httpx.Response) -> str:
    """The code in an error's envelope, which must be whole."""
    error = answer.json()["error"]
    assert {"code", "message", "type", "param", "details", "job_id"} <= error.keys()
    assert error["message"]
    code: str = error["code"]
    return code


def gateway_settings(redis_url: str, folder: Path, **changes: Any) -> Settings:
    """Settings for a gateway that several tests share, as the `settings` of one test."""
    given: dict[str, Any] = {
        "redis_url": redis_url,
        "key_prefix": f"t{uuid.uuid4().hex[:12]}",
        "data_dir": folder / "data",
        "run_dir": folder / "run",
        "allow_stub": True,
        "reconcile_every_s": 0.2,
        "sync_timeout_s": 20.0,
        "sse_keepalive_s": 0.5,
    }
    return load_settings(**(given | changes))
