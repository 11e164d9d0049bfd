"""What the parts of a split job make together, as values: no store."""

from dataclasses import replace

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import (
    Artifact,
    ArtifactKind,
    ErrorInfo,
    Event,
    EventName,
    ExecutionMode,
    GenerateResult,
    JobState,
    RunReport,
    Task,
    TimelineEntry,
)
from omnirt_tasks.jobs.effects import accepted
from omnirt_tasks.jobs.parts import STREAM_EVENTS_MAX, accepted_parts, error_of_part, joined, origins_of
from omnirt_tasks.jobs.values import NewJob, Origin, PartOf, StoredJob
from tests.support.jobs import idempotency, new_job


def _picture(name: str, index: int) -> Artifact:
    return Artifact(
        kind=ArtifactKind.IMAGE, name=name, index=index, path=name, mime="image/png", size_bytes=1, sha256="0"
    )


def _report(**fields: object) -> RunReport:
    known = {
        "run_id": "run",
        "task": Task.TEXT2IMAGE,
        "model": "shapes",
        "backend": "cpu",
        "job_id": "part",
        "execution_mode": ExecutionMode.LEGACY_CALL,
    }
    return RunReport.model_validate(known | fields)


def _stored(job: NewJob, *, attempt: int = 1, result: GenerateResult | None = None) -> StoredJob:
    record = accepted(job, unix_ms()).model_copy(
        update={"state": JobState.SUCCEEDED, "attempt": attempt, "result": result}
    )
    return StoredJob(record, job.owner, job.queue, job.resolved, origins=origins_of(job.id, attempt, result))


def _joined(*reports: RunReport, outputs: tuple[tuple[Artifact, ...], ...] = ()) -> StoredJob:
    given = new_job("job", parts=len(reports))
    whole = _stored(given)
    parts = [
        _stored(part.job, attempt=number + 1, result=GenerateResult(outputs=made, metadata=report))
        for number, (part, report, made) in enumerate(
            zip(accepted_parts(given), reports, outputs or ((),) * len(reports), strict=True)
        )
    ]
    started_at_ms = whole.record.enqueued_at_ms + 40
    record = whole.record.model_copy(update={"started_at_ms": started_at_ms})
    return joined(replace(whole, record=record, parts=tuple(part.record.id for part in parts)), parts)


def _metadata(*reports: RunReport) -> RunReport:
    result = _joined(*reports).record.result
    assert result is not None
    return result.metadata


# ---------------------------------------------------------------- as they begin


def test_the_parts_of_a_job_are_jobs_of_their_own_without_what_the_caller_wrote() -> None:
    given = new_job("job", parts=2, idempotency=idempotency())
    first, second = accepted_parts(given)
    assert (first.job.id, second.job.id) == ("job.0", "job.1")
    assert (second.of, second.job.resolved) == (PartOf("job", 1, 2, 2), given.parts[1].resolved)
    assert (second.job.request, second.job.idempotency, second.job.parts) == ({}, None, ())
    assert accepted_parts(new_job()) == ()


def test_the_error_of_a_job_says_which_part_and_which_pictures() -> None:
    error = ErrorInfo(code="model_failed", message="The model failed.", hint="Look.", retryable=True)
    _, second, _ = accepted_parts(new_job("job", parts=3))
    told = error_of_part(error, second.told_as)
    assert told == error.model_copy(update={"message": "Part 2 of 3, pictures 2 to 3: The model failed."})


def test_a_part_of_one_picture_says_so() -> None:
    given = new_job("job", parts=2)
    last = given.parts[1]
    config = {**last.resolved.config, "num_images_per_prompt": 1}
    single = replace(last, resolved=last.resolved.model_copy(update={"config": config}))
    _, part = accepted_parts(replace(given, parts=(given.parts[0], single)))
    assert part.told_as == "Part 2 of 2, picture 2: "


# ---------------------------------------------------------------- what they make


def test_outputs_are_numbered_through_in_the_order_of_the_parts() -> None:
    job = _joined(_report(), _report(), outputs=((_picture("0.png", 0), _picture("1.png", 1)), (_picture("2.png", 0),)))
    assert job.record.result is not None
    assert [(output.name, output.index) for output in job.record.result.outputs] == [
        ("0.png", 0),
        ("1.png", 1),
        ("2.png", 2),
    ]
    assert job.record.result.metadata.artifacts == job.record.result.outputs
    assert job.origins == {"0.png": Origin("job.0", 1), "1.png": Origin("job.0", 1), "2.png": Origin("job.1", 2)}


def test_times_are_summed_and_peaks_are_the_highest() -> None:
    report = _metadata(
        _report(timings={"load": 5.0, "denoise": 10.0}, memory={"peak_mb": 7.0}, attempts=1, batch_size=2),
        _report(timings={"denoise": 30.0}, memory={"peak_mb": 9.0}, attempts=3, batch_size=4, batch_size_mean=3.0),
    )
    assert report.timings == {"load": 5.0, "denoise": 40.0}
    assert report.memory == {"peak_mb": 9.0}
    assert (report.attempts, report.batch_size, report.batch_size_mean) == (3, 4, 2.0)
    assert report.queue_wait_ms == 40


def test_what_only_one_run_can_have_is_told_where_it_is_the_same_for_all() -> None:
    alike = _metadata(*(_report(worker_id="w1", batch_group_id="g") for _ in range(2)))
    apart = _metadata(_report(worker_id="w1", batch_group_id="g"), _report(worker_id="w2"))
    assert (alike.worker_id, alike.batch_group_id) == ("w1", "g")
    assert (apart.worker_id, apart.batch_group_id) == (None, None)
    assert (apart.run_id, apart.job_id, apart.execution_mode) == ("job", "job", ExecutionMode.LEGACY_CALL)


def test_the_config_is_what_was_used_for_all_pictures_together() -> None:
    used = {"num_images_per_prompt": 2, "dtype": "fp32"}
    report = _metadata(
        *(_report(config_resolved={**used, "seed": seed}, latent_stats={"mean": 0.1}) for seed in (7, 9))
    )
    assert report.config_resolved == {"num_images_per_prompt": 4, "dtype": "fp32", "seed": 7}
    assert report.latent_stats is None


def test_what_was_seen_in_order_is_told_in_order_and_nothing_twice() -> None:
    def entry(started_at_ms: int) -> TimelineEntry:
        return TimelineEntry(backend="cpu", stage="denoise", started_at_ms=started_at_ms, ended_at_ms=started_at_ms + 1)

    def events(*seqs: int) -> tuple[Event, ...]:
        return tuple(
            Event(seq=seq, event=EventName.STAGE_START, stage="denoise", timestamp_ms=0, data={}) for seq in seqs
        )

    report = _metadata(
        _report(
            backend_timeline=(entry(1), entry(3)),
            stream_events=events(*range(1, 400, 2)),
            cache_hits=("model",),
            warnings=("bent",),
            device_placement={"unet": "cuda:0"},
        ),
        _report(
            backend_timeline=(entry(2),),
            stream_events=events(*range(2, 401, 2)),
            cache_hits=("model", "prompt"),
            warnings=("bent",),
            device_placement={"vae": "cuda:1"},
        ),
    )
    assert [each.started_at_ms for each in report.backend_timeline] == [1, 2, 3]
    assert [event.seq for event in report.stream_events] == list(range(401 - STREAM_EVENTS_MAX, 401))
    assert (report.cache_hits, report.warnings) == (("model", "prompt"), ("bent",))
    assert report.device_placement == {"unet": "cuda:0", "vae": "cuda:1"}
