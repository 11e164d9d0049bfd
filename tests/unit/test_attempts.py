"""One attempt of a job, on a store in memory and a device that does what the test says."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from omnirt_tasks.contract import ErrorInfo, EventName, JobState
from tests.support.attempts import Bench
from tests.support.waiting import eventually
from workers.host import HostEvent, InterruptReason, OnEvent, RunFailed, RunOrder, RunOutcome


def test_an_unknown_job_is_dropped(bench: Bench) -> None:
    assert bench.runner.run("unknown") is None


def test_a_job_in_hand_is_not_begun_twice(bench: Bench) -> None:
    job_id = bench.begun()

    assert bench.runner.run(job_id) is None

    bench.host.succeed(job_id)
    ended = bench.end()
    assert ended is not None
    assert (ended.record.state, ended.record.attempt) == (JobState.SUCCEEDED, 1)
    assert bench.runner.run(job_id) is None


def test_the_files_are_published_under_the_attempt_and_the_scratch_is_gone(bench: Bench) -> None:
    job_id = bench.begun()
    bench.host.succeed(job_id, b"picture")

    ended = bench.end()

    assert ended is not None
    assert ended.record.result is not None
    (output,) = ended.record.result.outputs
    assert output.path == output.url == f"/v1/jobs/{job_id}/artifacts/0.png"
    assert output.size_bytes == 7
    assert len(output.sha256) == 64
    assert bench.artifacts.stat(job_id, 1, "0.png") == 7
    assert list((bench.folder / "scratch").iterdir()) == []


def test_events_are_logged_in_the_order_in_which_they_were_told(bench: Bench) -> None:
    job_id = bench.begun()
    for step in range(1, 201):
        event = HostEvent(EventName.STAGE_PROGRESS, "denoise", {"step": step, "total": 200})
        bench.host.tell[job_id](event)
    bench.host.succeed(job_id)
    bench.end()

    log = bench.store.events(job_id)

    assert [event.data["step"] for event in log if event.event is EventName.STAGE_PROGRESS] == list(range(1, 201))
    assert log[-1].event is EventName.JOB_FINISHED


def test_while_the_store_is_away_nothing_blocks_and_what_matters_is_told_later(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.away = True
    tell = bench.host.tell[job_id]

    tell(HostEvent(EventName.STAGE_START, "denoise"))
    for step in range(1, 2001):
        tell(HostEvent(EventName.STAGE_PROGRESS, "denoise", {"step": step, "total": 2000}))
        tell(HostEvent(EventName.PREVIEW, "denoise", {"step": step}))
    tell(HostEvent(EventName.STAGE_END, "denoise", {"elapsed_ms": 1.0}))
    bench.host.succeed(job_id)
    bench.store.away = False
    bench.end()

    log = bench.store.events(job_id)
    names = [event.event for event in log]
    assert names[-1] is EventName.JOB_FINISHED
    assert names.count(EventName.STAGE_START) == names.count(EventName.STAGE_END) == 1
    assert names.count(EventName.PREVIEW) <= 2, "a newer preview takes the place of one that was not sent"
    steps = [event.data["step"] for event in log if event.event is EventName.STAGE_PROGRESS]
    assert steps == sorted(steps, key=lambda step: int(str(step)))
    assert steps[-1] == 2000, "the newest progress is kept"
    assert len(steps) <= 700


def test_a_cancel_before_the_device_has_the_job_is_not_lost(bench: Bench) -> None:
    job_id = bench.queue()
    submit = bench.host.submit

    def cancel_meanwhile(order: RunOrder, on_event: OnEvent) -> "Future[RunOutcome]":
        bench.runner.cancel(job_id)  # the host does not know the job yet
        return submit(order, on_event)

    bench.host.submit = cancel_meanwhile  # type: ignore[method-assign]
    bench.begin(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED


def test_a_cancel_between_the_claim_and_what_follows_is_not_lost(bench: Bench) -> None:
    job_id = bench.queue()
    claim = bench.store.claim

    def cancelled_at_once(job: str, **wishes: Any) -> Any:
        won = claim(job, **wishes)
        bench.runner.cancel(job)  # the claim is won, and nobody here knows of a run yet
        return won

    bench.store.claim = cancelled_at_once  # type: ignore[method-assign, assignment]
    bench.begin(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED


def test_a_cancel_that_only_the_record_tells_of_is_seen_with_the_next_renewal(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(lease_ttl_s=0.3)
    job_id = bench.begun()

    bench.store.cancel(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED
    assert bench.host.interrupts == [(job_id, InterruptReason.CANCEL)]


def test_a_lease_is_held_as_long_as_the_job_runs(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(lease_ttl_s=0.3)
    job_id = bench.begun()
    begun_until = bench.store.get(job_id).lease_expires_at_ms
    assert begun_until is not None

    eventually(lambda: (bench.store.get(job_id).lease_expires_at_ms or 0) > begun_until + 500)

    assert list(bench.store.reconcile(unclaimed_after_ms=5_000).resend) == []
    bench.host.succeed(job_id)
    assert bench.state() or bench.end()


def test_who_lost_the_lease_stops_and_publishes_nothing(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(lease_ttl_s=0.3)
    job_id = bench.begun()
    bench.store.purge(job_id)

    assert bench.end() is None

    assert bench.host.interrupts == [(job_id, InterruptReason.LEASE_LOST)]
    assert not (bench.folder / "data" / "jobs" / job_id).exists()


def test_a_result_that_comes_after_the_lease_was_lost_is_removed(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.purge(job_id)

    bench.host.succeed(job_id)

    assert bench.end() is None
    assert not (bench.folder / "data" / "jobs" / job_id / "1").exists()


def test_a_commit_whose_answer_was_lost_is_no_reason_to_remove_the_result(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.lose_answers = 2

    bench.host.succeed(job_id)

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.SUCCEEDED
    assert bench.artifacts.stat(job_id, 1, "0.png") == 7
    assert [event.event for event in bench.store.events(job_id)].count(EventName.JOB_FINISHED) == 1


def test_a_claim_whose_answer_was_lost_is_ours_all_the_same(bench: Bench) -> None:
    bench.store.lose_answers = 2
    job_id = bench.begun()
    bench.host.succeed(job_id)

    ended = bench.end()

    assert ended is not None
    assert (ended.record.state, ended.record.attempt) == (JobState.SUCCEEDED, 1)


def test_events_whose_answer_was_lost_are_told_once(bench: Bench) -> None:
    job_id = bench.begun()
    bench.store.lose_answers = 2
    for step in (1, 2):
        bench.host.tell[job_id](HostEvent(EventName.STAGE_PROGRESS, "denoise", {"step": step, "total": 2}))
    eventually(lambda: not bench.store.lose_answers)
    bench.host.succeed(job_id)
    bench.end()

    assert [event.data["step"] for event in bench.events(EventName.STAGE_PROGRESS)] == [1, 2]


def test_a_failed_run_fails_its_job_with_the_runs_own_error(bench: Bench) -> None:
    job_id = bench.begun()

    bench.host.end(job_id, RunFailed(ErrorInfo(code="out_of_memory", message="too large")))

    ended = bench.end()
    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "out_of_memory"


def test_an_input_that_is_gone_fails_the_job_before_the_device_hears_of_it(bench: Bench) -> None:
    job_id = bench.queue(image="upload:0123456789abcdef0123456789abcdef")

    bench.begin(job_id)

    assert bench.error().code == "upload_not_found"
    assert not bench.host.orders


def test_an_earlier_output_is_an_input(bench: Bench) -> None:
    first = bench.begun("first")
    bench.host.succeed(first, b"the first picture")
    bench.end(first)

    second = bench.begun("second", image=f"artifact:{first}/0.png")

    assert bench.host.orders[second].files["image"].read_bytes() == b"the first picture"
    bench.host.succeed(second)
    bench.end(second)
