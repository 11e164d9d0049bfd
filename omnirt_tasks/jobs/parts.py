"""A job that was split: its parts as jobs of their own, and what they make together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from omnirt_tasks.contract import Artifact, ErrorInfo, Event, GenerateResult, RunReport
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.request import ResolvedRequest
from omnirt_tasks.jobs.values import NewJob, Origin, PartOf, StoredJob, part_id
from omnirt_tasks.registry.options import COUNT_OPTION
from omnirt_tasks.registry.work import count_pictures

STREAM_EVENTS_MAX = 256
"""How many stage events a report tells; the newest."""


@dataclass(frozen=True)
class AcceptedPart:
    """A part as it begins: a job of its own, whose errors are told of the whole job after `told_as`.

    The request that the caller wrote stays with the whole job.
    """

    job: NewJob
    of: PartOf
    told_as: str


def accepted_parts(job: NewJob) -> tuple[AcceptedPart, ...]:
    """The parts of a job that is accepted, in order; none where it is not split."""
    total = len(job.parts)
    return tuple(
        AcceptedPart(
            replace(job, id=part_id(job.id, number), request={}, resolved=part.resolved, idempotency=None, parts=()),
            PartOf(job.id, number, total, part.first_output),
            _told_as(number, total, part.first_output, count_pictures(part.resolved)),
        )
        for number, part in enumerate(job.parts)
    )


def part_ids(job_id: str, total: int) -> tuple[str, ...]:
    """The ids of a job's parts, in order."""
    return tuple(part_id(job_id, number) for number in range(total))


def error_of_part(error: ErrorInfo, told_as: str) -> ErrorInfo:
    """The error of a job, one part of which has failed with `error`."""
    return error.model_copy(update={"message": told_as + error.message})


def joined(whole: StoredJob, parts: Sequence[StoredJob]) -> StoredJob:
    """A split job that succeeded, with the result and the origins that its parts, in order, bring."""
    results = [part.record.result for part in parts if part.record.result is not None]
    assert len(results) == len(whole.parts), "a job has succeeded when all of its parts have"
    origins = dict(chain.from_iterable(part.origins.items() for part in parts))
    return replace(
        whole, record=whole.record.model_copy(update={"result": _joined_result(whole, results)}), origins=origins
    )


def origins_of(job_id: str, attempt: int, result: GenerateResult | None) -> dict[str, Origin]:
    """Where the outputs lie that an attempt has made."""
    return {} if result is None else {output.name: Origin(job_id, attempt) for output in result.outputs}


def _told_as(number: int, total: int, first: int, count: int) -> str:
    pictures = f"picture {first}" if count == 1 else f"pictures {first} to {first + count - 1}"
    return f"Part {number + 1} of {total}, {pictures}: "


def _joined_result(whole: StoredJob, results: Sequence[GenerateResult]) -> GenerateResult:
    outputs = tuple(
        output.model_copy(update={"index": index})
        for index, output in enumerate(chain.from_iterable(result.outputs for result in results))
    )
    return GenerateResult(outputs=outputs, metadata=_joined_report(whole, [each.metadata for each in results], outputs))


def _joined_report(whole: StoredJob, reports: Sequence[RunReport], artifacts: tuple[Artifact, ...]) -> RunReport:
    """The report of a job, from those of its parts.

    Times in stages are sums, peaks of memory and attempts the highest, timeline and stage events those of all in their
    order; what only one run can have (its worker, its group) is null where it is not the same for all, and the
    statistics of latents are. `batch_size` is the largest, `batch_size_mean` the mean of theirs.
    """
    record, first = whole.record, reports[0]
    started_at_ms = record.started_at_ms
    timings: dict[str, float] = {}
    memory: dict[str, float] = {}
    for report in reports:
        for stage, elapsed_ms in report.timings.items():
            timings[stage] = timings.get(stage, 0.0) + elapsed_ms
        for name, peak in report.memory.items():
            memory[name] = max(memory.get(name, peak), peak)
    return RunReport(
        run_id=record.id,
        task=whole.resolved.task,
        model=whole.resolved.model,
        backend=whole.resolved.backend,
        job_id=record.id,
        trace_id=record.trace_id,
        worker_id=_common(report.worker_id for report in reports),
        enqueued_at_ms=record.enqueued_at_ms,
        queue_wait_ms=None if started_at_ms is None else max(started_at_ms - record.enqueued_at_ms, 0),
        execution_mode=first.execution_mode,
        timings=timings,
        memory=memory,
        backend_timeline=tuple(
            sorted(
                chain.from_iterable(report.backend_timeline for report in reports),
                key=lambda entry: (entry.started_at_ms, entry.ended_at_ms),
            )
        ),
        config_resolved=_config_of_whole(whole.resolved, first.config_resolved),
        artifacts=artifacts,
        cache_hits=_distinct(chain.from_iterable(report.cache_hits for report in reports)),
        device_placement={part: device for report in reports for part, device in report.device_placement.items()},
        batch_size=max(report.batch_size for report in reports),
        batch_size_mean=sum(report.batch_size_mean for report in reports) / len(reports),
        batch_group_id=_common(report.batch_group_id for report in reports),
        stream_events=_newest(chain.from_iterable(report.stream_events for report in reports)),
        attempts=max(report.attempts for report in reports),
        warnings=_distinct(chain.from_iterable(report.warnings for report in reports)),
    )


def _config_of_whole(resolved: ResolvedRequest, used: JsonObject) -> JsonObject:
    """What was used, with the options that a split changes as they were asked for."""
    asked = {name: resolved.config[name] for name in ("seed", COUNT_OPTION) if name in resolved.config}
    return {**used, **asked}


def _common(values: Iterable[str | None]) -> str | None:
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _newest(events: Iterable[Event]) -> tuple[Event, ...]:
    return tuple(sorted(events, key=lambda event: event.seq)[-STREAM_EVENTS_MAX:])
