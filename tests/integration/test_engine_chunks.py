"""OmniEngine: jobs that share forward passes, jobs that run in parts, and which goes first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks import requests
from omnirt_tasks.contract import CancelOutcome, EventName, GenerateResult, JobRecord, JobState, Priority
from omnirt_tasks.errors import ConfigurationError
from tests.support.waiting import eventually
from workers.engine import OmniEngine

WAIT_S = 30.0


@pytest.fixture
def engine() -> Iterator[OmniEngine]:
    with OmniEngine(max_concurrency=4, backend="cpu-stub") as engine:
        yield engine


def submit(engine: OmniEngine, prompt: Any = "a red circle", **options: Any) -> JobRecord:
    return engine.submit(requests.text2image(model="stub", prompt=prompt, **options))


def result_of(engine: OmniEngine, job: JobRecord) -> GenerateResult:
    over = engine.wait(job.id, timeout_s=WAIT_S)
    assert over.state is JobState.SUCCEEDED, over.error
    assert over.result is not None
    return over.result


def files_of(result: GenerateResult) -> list[bytes]:
    return [Path(output.path).read_bytes() for output in result.outputs]


def test_jobs_that_run_at_once_share_forward_passes(engine: OmniEngine) -> None:
    jobs = [submit(engine, f"picture {number}", num_inference_steps=50, step_ms=5) for number in range(4)]

    reports = [result_of(engine, job).metadata for job in jobs]

    assert max(report.batch_size for report in reports) > 1
    assert all(1 <= report.batch_size_mean <= report.batch_size <= 4 for report in reports)
    merged = {report.batch_group_id for report in reports if report.batch_size > 1}
    assert len(merged) == 1
    assert None not in merged


@pytest.mark.parametrize(("largest", "shared"), [(1, 1), (2, 2)])
def test_no_more_jobs_share_a_forward_pass_than_allowed(largest: int, shared: int) -> None:
    with OmniEngine(max_concurrency=4, max_batch_size=largest, backend="cpu-stub") as engine:
        jobs = [submit(engine, num_inference_steps=50, step_ms=5) for _ in range(4)]
        assert max(result_of(engine, job).metadata.batch_size for job in jobs) == shared


def test_a_first_forward_pass_waits_for_others_as_long_as_it_is_told() -> None:
    window_s = 60.0
    with OmniEngine(batch_window_ms=window_s * 1_000, max_batch_size=2, backend="cpu-stub") as engine:
        warm_up(engine)
        first = submit(engine, num_inference_steps=3)
        eventually(lambda: engine.job(first.id).state is JobState.RUNNING)
        second = submit(engine, num_inference_steps=3)
        sizes = [result_of(engine, job).metadata.batch_size for job in (first, second)]

    assert sizes == [2, 2]


def test_a_large_job_runs_in_parts_and_is_one_job_all_the_same(engine: OmniEngine) -> None:
    job = submit(engine, num_images_per_prompt=10, num_inference_steps=4, seed=40)
    assert job.parts is not None
    assert job.parts.total == 3

    result = result_of(engine, job)

    assert [output.seed for output in result.outputs] == list(range(40, 50))
    assert [output.index for output in result.outputs] == list(range(10))
    assert len(set(files_of(result))) == 10
    events = list(engine.events(job.id, timeout_s=WAIT_S))
    assert [event.event for event in events if event.terminal] == [EventName.JOB_FINISHED]
    steps = [event.data["step"] for event in events if event.event is EventName.STAGE_PROGRESS]
    assert steps == list(range(1, 13)), "one progress, of all parts"


def test_a_picture_is_the_one_that_its_seed_gives_alone_whatever_the_parts(engine: OmniEngine) -> None:
    prompts = [f"picture {number}" for number in range(5)]

    together = result_of(engine, submit(engine, prompts, num_images_per_prompt=2, seed=7))

    alone = [
        result_of(engine, submit(engine, prompt, num_images_per_prompt=2, seed=7 + 2 * number))
        for number, prompt in enumerate(prompts)
    ]
    assert files_of(together) == [file for result in alone for file in files_of(result)]


def test_parts_become_as_large_as_what_was_measured_to_pay(engine: OmniEngine) -> None:
    many = {"num_images_per_prompt": 16, "num_inference_steps": 100, "step_ms": 2}
    first = submit(engine, **many)
    assert first.parts is not None
    result_of(engine, first)

    second = submit(engine, **many)

    assert first.parts.total == 4, "nothing is measured yet"
    assert second.parts is None or second.parts.total < 4, "a step of the stub takes as long for many as for one"
    engine.cancel(second.id)


def test_one_cancel_ends_all_parts(engine: OmniEngine) -> None:
    job = submit(engine, num_images_per_prompt=16, num_inference_steps=200, step_ms=20)
    eventually(lambda: engine.job(job.id).progress)

    assert engine.cancel(job.id) is CancelOutcome.REQUESTED

    assert engine.wait(job.id, timeout_s=WAIT_S).state is JobState.CANCELLED
    assert engine.cancel(job.id) is CancelOutcome.ALREADY_FINISHED


def test_a_part_that_fails_again_fails_the_job_which_says_which(engine: OmniEngine) -> None:
    job = submit(engine, num_images_per_prompt=8, fail_at_step=2)

    over = engine.wait(job.id, timeout_s=WAIT_S)

    assert over.state is JobState.FAILED
    assert over.error is not None
    assert over.error.message.startswith("Part ")


def test_a_higher_priority_goes_first_and_of_one_the_older() -> None:
    with OmniEngine(max_concurrency=1, backend="cpu-stub") as engine:
        running = submit(engine, num_inference_steps=200, step_ms=20)
        eventually(lambda: engine.job(running.id).progress)
        wishes = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.HIGH, Priority.LOW]
        jobs = [submit(engine, str(number), num_inference_steps=1, priority=wish) for number, wish in enumerate(wishes)]
        engine.cancel(running.id)
        over = [engine.wait(job.id, timeout_s=WAIT_S) for job in jobs]

    begun = sorted(range(len(jobs)), key=lambda number: (over[number].started_at_ms or 0, over[number].finished_at_ms))
    assert begun == [2, 3, 1, 0, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurrency": 0},
        {"max_batch_size": 0},
        {"max_batch_size": -1},
        {"pipeline_cache_size": 0},
        {"batch_window_ms": -1},
        {"batch_window_ms": float("nan")},
        {"batch_window_ms": float("inf")},
        {"batch_window_ms": 60_001},
    ],
    ids=str,
)
def test_a_bound_that_makes_no_sense_is_told_by_its_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong

    with pytest.raises(ConfigurationError, match=name):
        OmniEngine(backend="cpu-stub", **wrong)


def warm_up(engine: OmniEngine) -> None:
    """Let the engine measure what sharing brings: until then it takes one picture at a time."""
    jobs = [submit(engine, num_inference_steps=40, step_ms=2) for _ in range(2)]
    assert max(result_of(engine, job).metadata.batch_size for job in jobs) == 2
