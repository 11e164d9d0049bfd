"""DeviceHost: how the Celery process, or OmniEngine, speaks to what owns a device.

    submit(order) ─► events… ─► Future[RunOutcome]
    interrupt(job) lands at the job's next device call; capability and health answer at any time

Placement `thread` lives in the caller's process (`workers.thread_host`), placement `process` in a child that may die
(`workers.process_host`). Whatever the placement, a host knows nothing of Celery, Redis or HTTP: it gets an order, tells
what happens, and leaves files in the order's folder.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from omnirt_tasks.contract import ArtifactKind, ErrorInfo, EventName, ExecutionMode, ModelAbility, ResolvedRequest
from omnirt_tasks.contract.base import JsonObject


@dataclass(frozen=True)
class HostConfig:
    """What a host is made from, wherever it lives: plain values, so that they cross a process boundary.

    `models` are the ids that it serves and can run, `folders` where their weights lie (by id; some have none).
    `cache_size` is the most models kept loaded, `memory_budget_bytes` the most memory that models and runs may take
    together (None: nine tenths of the device's), `concurrency` the most runs it is to be given at once. `warm_up` are
    models that are loaded before the host is ready.

    `max_batch_size` is the most runs that share a device call (None: as many as pays, as measured; 1: none do), and
    `batch_window_ms` how long the first of them waits for others. What was measured is kept in `chunk_table`, a file.
    """

    backend: str
    device: str
    models: tuple[str, ...]
    folders: dict[str, Path]
    cache_size: int
    concurrency: int
    torch_threads: int | None = None
    memory_budget_bytes: int | None = None
    warm_up: tuple[str, ...] = ()
    max_batch_size: int | None = None
    batch_window_ms: float = 0.0
    chunk_table: Path | None = None


@dataclass(frozen=True)
class RunOrder:
    """One attempt of one job, ready to run.

    Outputs are written into `output_dir` (exists, empty, the attempt's own). `files` maps an input ("image", "mask",
    "audio") to its local file. A preview is made every `preview_every_steps` steps; 0 is never.

    A model that keeps checkpoints writes them into `checkpoint_dir` (exists; None: it keeps none) and tells of each
    whole file by a CHECKPOINT event {step, file}; the file is the reader's from then on. With `resume_from`, such a
    file of an earlier attempt, the run goes on after its step; one that does not fit is no reason to fail.

    An order that is `alone` shares its device calls with no other. `first_output` is the place of its first output in
    the result of the job that it is a part of: outputs are named and numbered from there.
    """

    job_id: str
    attempt: int
    request: ResolvedRequest
    output_dir: Path
    files: dict[str, Path] = field(default_factory=dict)
    preview_every_steps: int = 0
    checkpoint_dir: Path | None = None
    resume_from: Path | None = None
    alone: bool = False
    first_output: int = 0


@dataclass(frozen=True)
class HostEvent:
    """Something that happened in a run."""

    event: EventName
    stage: str
    data: JsonObject = field(default_factory=dict)


class InterruptReason(StrEnum):
    """Why a run is to stop at its next device call."""

    CANCEL = "cancel"  # the caller no longer wants it
    TIMEOUT = "timeout"  # its time limit has passed
    GIVE_BACK = "give_back"  # the worker is leaving; another attempt will run
    NO_ROOM = "no_room"  # it would wait here behind another one that does; another attempt will run
    LEASE_LOST = "lease_lost"  # another attempt holds the job


@dataclass(frozen=True)
class OutputFile:
    """A file that a run left in its output folder; sizes in pixels, `seed` the one that gives this output alone."""

    name: str
    index: int
    kind: ArtifactKind
    mime: str
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """What the device side knows of a run for its report; `timings_ms` by stage, `peak_memory_bytes` when known."""

    execution_mode: ExecutionMode
    timings_ms: dict[str, float]
    stages: tuple[tuple[str, int, int], ...]  # (stage, started_at_ms, ended_at_ms), in order
    device_placement: dict[str, str]
    config_used: JsonObject = field(default_factory=dict)  # options that only the device could settle ("device")
    cache_hits: tuple[str, ...] = ()
    peak_memory_bytes: int | None = None
    batch_size: int = 1
    batch_size_mean: float = 1.0
    batch_group_id: str | None = None
    latent_stats: JsonObject | None = None


@dataclass(frozen=True)
class RunSucceeded:
    """The run left its outputs, in order."""

    outputs: tuple[OutputFile, ...]
    facts: RunFacts


@dataclass(frozen=True)
class RunFailed:
    """The run ended with an error; the host goes on."""

    error: ErrorInfo


@dataclass(frozen=True)
class RunInterrupted:
    """The run stopped because it was asked to."""

    reason: InterruptReason


@dataclass(frozen=True)
class RunLost:
    """What ran it is gone (`detail` says how), through no fault of the run that is known; it is to run again."""

    detail: str


RunOutcome = RunSucceeded | RunFailed | RunInterrupted | RunLost


@dataclass(frozen=True)
class DeviceCapability:
    """What the device and its models can do; `memory_bytes` is None where it cannot be told.

    `memory_budget_bytes` is what models and runs may take together, `features` what the backend can do beside its
    dtypes ("compile"), `ranks_max` the most ranks of a group on it, `abilities` what each model can do.
    """

    backend: str
    device: str
    device_name: str
    memory_bytes: int | None
    dtypes: tuple[str, ...]
    models: tuple[str, ...]
    loaded: tuple[str, ...]
    concurrency: int
    memory_budget_bytes: int | None = None
    features: tuple[str, ...] = ()
    ranks_max: int = 1
    abilities: Mapping[str, ModelAbility] = field(default_factory=dict)


@dataclass(frozen=True)
class HostHealth:
    """Whether the host can run jobs; `stuck_for_s` tells how long the device call in hand has lasted (None: idle)."""

    ok: bool
    detail: str = ""
    stuck_for_s: float | None = None


OnEvent = Callable[[HostEvent], None]


class DeviceHost(Protocol):
    """What owns a device. Safe to share between threads."""

    def submit(self, order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        """Start the run, and return at once.

        `on_event` is called from one thread at a time, in order, and must not block. The future always gets a
        RunOutcome, never an exception.
        """
        ...

    def interrupt(self, job_id: str, reason: InterruptReason) -> bool:
        """Stop the job's run at its next device call; false if it does not run here. The first reason stays."""
        ...

    def end_by_force(self, why: str) -> bool:
        """End whatever runs, though it does not listen: every run is lost, and the host goes on.

        False where that cannot be done, as in the caller's own process.
        """
        ...

    def capability(self) -> DeviceCapability:
        """What the device and its models can do, as of now."""
        ...

    def health(self) -> HostHealth:
        """Whether the host can run jobs, as of now."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Interrupt what runs (give_back), wait for it at most `timeout_s`, and let go of the device."""
        ...
