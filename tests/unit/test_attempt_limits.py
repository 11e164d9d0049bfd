"""Attempts that last too long, do not listen, or are given back: on a device that does what the test says."""

from collections.abc import Callable

import pytest

from omnirt_tasks.contract import JobState
from tests.support.attempts import Bench
from tests.support.waiting import eventually


def test_a_job_that_is_given_back_waits_for_its_next_attempt(bench: Bench) -> None:
    job_id = bench.begun()

    bench.runner.give_back_all()

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    other = bench.queue("job-2")
    late = bench.runner.run(other)  # its message was taken just before
    assert late is not None
    assert late.to_send
    assert other not in bench.host.orders
    assert job_id in bench.host.orders


def test_a_run_past_its_limit_fails_with_timeout(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.begun()

    ended = bench.end()

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "timeout"
    assert not bench.stuck


def test_a_run_that_does_not_stop_at_its_limit_is_settled_without_it_and_told(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.host.deaf = True
    job_id = bench.begun()

    ended = bench.end()

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "timeout"
    assert len(bench.stuck) == 1
    assert job_id in bench.stuck[0]


def test_a_run_that_does_not_stop_is_given_back_without_it_when_the_worker_leaves(bench: Bench) -> None:
    bench.host.deaf = True
    bench.host.stuck_for_s = 60.0
    bench.begun()

    bench.runner.give_back_all()

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    assert bench.stuck


def test_a_model_that_still_loads_when_the_worker_leaves_is_given_back_and_no_fault_of_the_device(bench: Bench) -> None:
    bench.host.deaf = True  # a loader takes no interrupts, and makes no device calls
    bench.begun()

    bench.runner.give_back_all()

    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.QUEUED
    assert not bench.stuck


def test_a_host_that_can_be_forced_is_and_the_worker_goes_on(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.host.deaf = bench.host.can_be_forced = True
    job_id = bench.begun()

    ended = bench.end()

    assert ended is not None
    assert ended.record.error is not None
    assert ended.record.error.code == "timeout", "its own time was over"
    assert [job_id in why for why in bench.host.forced] == [True]
    assert not bench.stuck


def cancel_what_runs(bench: Bench) -> str:
    """Begin a job, and cancel it; it has ended as cancelled, whatever its run does."""
    job_id = bench.begun()
    bench.store.cancel(job_id)
    bench.runner.cancel(job_id)
    ended = bench.end()
    assert ended is not None
    assert ended.record.state is JobState.CANCELLED
    return job_id


@pytest.mark.parametrize(("stuck_for_s", "forced"), [(60.0, 1), (None, 0)])
def test_a_cancelled_run_ends_by_force_only_where_it_holds_the_device(
    make_bench: Callable[..., Bench], stuck_for_s: float | None, forced: int
) -> None:
    bench = make_bench(stop_patience_s=0.1)
    bench.host.deaf = bench.host.can_be_forced = True
    bench.host.stuck_for_s = stuck_for_s

    cancel_what_runs(bench)

    assert len(bench.host.forced) == forced, "a model that loads harms nobody"


def test_a_cancelled_load_that_never_ends_is_told_once_no_run_may_last_so_long(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(job_timeout_s=0.5, stop_patience_s=0.05)
    bench.host.deaf = True

    job_id = cancel_what_runs(bench)

    eventually(lambda: bench.stuck)
    assert job_id in bench.stuck[0]


def test_a_jobs_own_deadline_ends_its_run_and_says_so(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_timeout_s=30.0)
    bench.begun(deadline_s=0.2)

    error = bench.error()

    assert error.code == "timeout"
    assert "0.2 s after it was accepted" in error.message


def test_a_limit_shorter_than_what_the_deadline_leaves_is_the_one_told(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(job_timeout_s=0.1)
    bench.begun(deadline_s=600.0)

    assert "limit of 0.1 s" in bench.error().message


def test_a_job_whose_deadline_passed_before_its_message_came_is_told_to_have_failed(bench: Bench) -> None:
    job_id = bench.queue(deadline_s=5.0)
    bench.store.ahead_ms = 6_000

    bench.begin(job_id)

    assert bench.error().code == "timeout"
    assert not bench.host.orders
