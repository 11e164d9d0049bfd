"""What a job gives back."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from omnirt_tasks.contract.base import Answer, JsonObject
from omnirt_tasks.contract.events import Event
from omnirt_tasks.contract.request import Task

SCHEMA_VERSION = "1.0.0"


class ArtifactKind(StrEnum):
    """What an output is."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
    TEXT = "text"


class ExecutionMode(StrEnum):
    """How a model was run."""

    MODULAR = "modular"
    LEGACY_CALL = "legacy_call"
    SUBPROCESS = "subprocess"
    PERSISTENT_WORKER = "persistent_worker"
    REMOTE = "remote"


class Artifact(Answer):
    """One output; `path` is a URL path over HTTP and a local path in Python.

    `index` is its place in the result from 0, `seed` the one that gives this picture alone; sizes in pixels and bytes.
    """

    kind: ArtifactKind
    name: str
    index: int
    path: str
    url: str | None = None
    mime: str
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    transport: Literal["path"] = "path"
    data_b64: str | None = None
    seed: int | None = None
    size_bytes: int
    sha256: str


class TimelineEntry(Answer):
    """A stretch of one run on one backend; times in Unix milliseconds."""

    backend: str
    stage: str
    started_at_ms: int
    ended_at_ms: int


class RunReport(Answer):
    """How one attempt of a job ran.

    `timings` is stage → milliseconds, `memory` has `peak_mb`, `stream_events` the stage events without previews
    (at most 256), `attempts` how often the job was begun. `batch_size` is the most jobs (or parts of jobs) that shared
    one of its denoising passes, itself included, `batch_size_mean` the mean over them, and `batch_group_id` names the
    group: jobs that ever shared one have it in common.
    """

    run_id: str
    task: Task
    model: str
    backend: str
    job_id: str
    trace_id: str | None = None
    worker_id: str | None = None
    enqueued_at_ms: int | None = None
    queue_wait_ms: int | None = None
    execution_mode: ExecutionMode
    timings: dict[str, float] = Field(default_factory=dict)
    memory: dict[str, float] = Field(default_factory=dict)
    backend_timeline: tuple[TimelineEntry, ...] = ()
    config_resolved: JsonObject = Field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    error: str | None = None
    latent_stats: JsonObject | None = None
    cache_hits: tuple[str, ...] = ()
    device_placement: dict[str, str] = Field(default_factory=dict)
    batch_size: int = 1
    batch_size_mean: float = 1.0
    batch_group_id: str | None = None
    stream_events: tuple[Event, ...] = ()
    schema_version: str = SCHEMA_VERSION
    attempts: int = 1
    warnings: tuple[str, ...] = ()


class GenerateResult(Answer):
    """The outputs in order, and the report of the run that made them."""

    outputs: tuple[Artifact, ...]
    metadata: RunReport
