"""What a run came to: the result that its job record keeps."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from omnirt_tasks.contract import Artifact, Backend, Event, EventName, GenerateResult, RunReport, TimelineEntry
from omnirt_tasks.jobs.parts import STREAM_EVENTS_MAX
from omnirt_tasks.jobs.values import Lease, StoredJob
from workers.host import OutputFile, RunFacts

BYTES_PER_MB = 1024 * 1024
# What is done on the host's processor, whatever the device: pixels to files.
STAGES_OF_THE_HOST = frozenset({"export"})


def describe_outputs(
    outputs: Sequence[OutputFile], folder: Path, address: Callable[[str], tuple[str, str | None]]
) -> tuple[Artifact, ...]:
    """The outputs with what only the files themselves can tell; `address` gives the path and URL of a name."""
    return tuple(_describe(output, folder / output.name, *address(output.name)) for output in outputs)


def _describe(output: OutputFile, file: Path, path: str, url: str | None) -> Artifact:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Artifact(
        kind=output.kind,
        name=output.name,
        index=output.index,
        path=path,
        url=url,
        mime=output.mime,
        width=output.width,
        height=output.height,
        num_frames=output.num_frames,
        seed=output.seed,
        size_bytes=file.stat().st_size,
        sha256=digest,
    )


def make_result(
    lease: Lease,
    job: StoredJob,
    facts: RunFacts,
    artifacts: tuple[Artifact, ...],
    events: Sequence[Event],
    worker_id: str,
) -> GenerateResult:
    """The result of a run that made its outputs; `events` are the run's own, since it began."""
    record = job.record
    started_at_ms = record.started_at_ms
    peak = facts.peak_memory_bytes
    report = RunReport(
        run_id=f"{lease.job_id}.{lease.attempt}",
        task=job.resolved.task,
        model=job.resolved.model,
        backend=job.resolved.backend,
        job_id=lease.job_id,
        trace_id=record.trace_id,
        worker_id=worker_id,
        enqueued_at_ms=record.enqueued_at_ms,
        queue_wait_ms=None if started_at_ms is None else max(started_at_ms - record.enqueued_at_ms, 0),
        execution_mode=facts.execution_mode,
        timings=facts.timings_ms,
        memory={} if peak is None else {"peak_mb": round(peak / BYTES_PER_MB, 3)},
        backend_timeline=tuple(
            TimelineEntry(
                backend=Backend.CPU if stage in STAGES_OF_THE_HOST else job.resolved.backend,
                stage=stage,
                started_at_ms=begun,
                ended_at_ms=ended,
            )
            for stage, begun, ended in facts.stages
        ),
        config_resolved={**job.resolved.config, **facts.config_used},
        artifacts=artifacts,
        latent_stats=facts.latent_stats,
        cache_hits=facts.cache_hits,
        device_placement=facts.device_placement,
        batch_size=facts.batch_size,
        batch_size_mean=facts.batch_size_mean,
        batch_group_id=facts.batch_group_id,
        stream_events=_told(events),
        attempts=lease.attempt,
        warnings=job.resolved.warnings,
    )
    return GenerateResult(outputs=artifacts, metadata=report)


def own_events(job: StoredJob, events: Sequence[Event]) -> Sequence[Event]:
    """Those of the events that are the job's own; a part's are in the log of the whole, among those of the others."""
    if job.part is None:
        return events
    return [event for event in events if event.data.get("part") == job.part.number]


def _told(events: Sequence[Event]) -> tuple[Event, ...]:
    told = [event for event in events if event.stage != "job" and event.event is not EventName.PREVIEW]
    return tuple(told[-STREAM_EVENTS_MAX:])
