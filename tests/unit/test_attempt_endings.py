"""How attempts end other than well: what is tried again, whom a death is blamed on, and who runs alone."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import ErrorInfo, EventName, JobState
from omnirt_tasks.errors import StorageError
from omnirt_tasks.jobs.values import Requeue
from tests.support.attempts import Bench
from tests.support.waiting import eventually
from workers.attempts.orders import Orders
from workers.host import InterruptReason, RunFailed, RunInterrupted, RunLost

LOST = RunLost("its process was killed")
OOM = RunFailed(ErrorInfo(code="out_of_memory", message="too large"))
SOON_S = 0.02


def waits_to_be_alone(bench: Bench) -> tuple[str, str]:
    """A job whose device died, which waits for another that is on the device now."""
    victim = bench.begun("victim")
    bench.host.end(victim, LOST)
    bench.end(victim)
    busy = bench.begun("busy")
    bench.begin(victim)
    eventually(lambda: bench.crowded)
    return victim, busy


def test_a_run_that_is_lost_goes_back_to_its_queue_at_once(bench: Bench) -> None:
    job_id = bench.begun()

    bench.host.end(job_id, LOST)

    ended = bench.end_told()
    assert ended is not None
    assert (ended.job.record.state, ended.to_send) == (JobState.QUEUED, True)
    (told,) = bench.events(EventName.JOB_REQUEUED)
    assert told.data == {"attempt": 1, "reason": "device_lost"}


def test_a_device_that_lets_go_by_itself_is_lost_so_that_its_job_does_not_come_back_for_ever(bench: Bench) -> None:
    let_go = RunInterrupted(InterruptReason.GIVE_BACK)
    job_id = bench.begun()
    bench.host.end(job_id, let_go)
    for _ in range(3):
        bench.end()
        bench.again()
        assert bench.host.orders[job_id].alone
        bench.host.end(job_id, let_go)

    assert bench.error().code == "worker_lost"


def test_those_whose_device_died_run_one_after_another_in_the_order_in_which_they_came_back(bench: Bench) -> None:
    jobs = ["job-1", "job-2", "job-3"]
    for job_id in jobs:
        bench.begun(job_id)
    for job_id in jobs:
        bench.host.end(job_id, LOST)
        bench.end(job_id)

    bench.again("job-1")
    for job_id in ("job-2", "job-3", bench.queue("job-4")):
        bench.in_line(job_id)
    for job_id, next_id in (("job-1", "job-2"), ("job-2", "job-3")):
        assert [job for job in (*jobs, "job-4") if bench.state(job) is JobState.RUNNING] == [job_id]
        bench.host.succeed(job_id)
        bench.end(job_id)
        eventually(lambda job_id=next_id: bench.orders(job_id, 2))  # type: ignore[misc]
    bench.host.succeed("job-3")

    eventually(lambda: bench.orders("job-4", 1))
    bench.host.succeed("job-4")
    assert [bench.end(job_id).record.state for job_id in (*jobs, "job-4")] == [JobState.SUCCEEDED] * 4  # type: ignore[union-attr]
    assert not bench.crowded


def test_only_deaths_while_alone_count_and_at_the_last_of_them_the_job_has_failed(bench: Bench) -> None:
    job_id = bench.begun()
    bench.host.end(job_id, LOST)
    for _ in range(3):
        bench.end()
        bench.again()
        bench.host.end(job_id, LOST)

    ended = bench.end()

    assert ended is not None
    assert (ended.record.state, ended.record.dead_letter, ended.record.attempt) == (JobState.FAILED, True, 4)
    assert bench.error().code == "worker_lost"


def test_a_job_that_waits_to_be_alone_is_taken_by_whoever_can_first(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    idle = make_bench(beside=bench)
    victim, busy = waits_to_be_alone(bench)

    idle.again(victim)

    assert bench.end(victim) is None, "it is no longer its worker's business"
    assert not bench.crowded
    idle.host.succeed(victim)
    assert idle.end(victim).record.worker_id == "w2"  # type: ignore[union-attr]
    bench.host.succeed(busy)


def test_a_job_that_waits_to_be_alone_empties_one_device_and_no_other(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    other = make_bench(beside=bench)
    victim, busy = waits_to_be_alone(bench)
    also_busy = other.begun("also-busy")

    assert other.runner.run(victim) is None, "another worker waits for it already"

    assert not other.crowded
    bench.host.succeed(busy)
    eventually(lambda: bench.orders(victim, 2))
    for here, job_id in ((bench, victim), (other, also_busy)):
        here.host.succeed(job_id)
        assert here.end(job_id).record.state is JobState.SUCCEEDED  # type: ignore[union-attr]


def test_a_message_that_comes_twice_while_its_job_waits_to_be_alone_is_dropped(bench: Bench) -> None:
    victim, busy = waits_to_be_alone(bench)

    assert bench.runner.run(victim) is None

    bench.host.succeed(busy)
    eventually(lambda: bench.orders(victim, 2))
    bench.host.succeed(victim)


def test_a_worker_that_leaves_sends_back_what_waits_to_be_alone(bench: Bench) -> None:
    victim, _ = waits_to_be_alone(bench)

    bench.runner.give_back_all()

    ended = bench.end_told(victim)
    assert ended is not None
    assert ended.to_send
    assert bench.store.get(victim).record.attempt == 1


def test_a_run_that_was_left_on_the_device_is_still_beside_whoever_is_to_be_alone(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(stop_patience_s=SOON_S)
    victim = bench.begun("victim")
    bench.host.end(victim, LOST)
    bench.end(victim)
    bench.host.deaf = True
    loading = bench.begun("loading")
    bench.store.cancel(loading)
    bench.runner.cancel(loading)
    assert bench.end(loading).record.state is JobState.CANCELLED  # type: ignore[union-attr]

    bench.begin(victim)
    eventually(lambda: bench.crowded)
    assert bench.state(victim) is JobState.QUEUED

    bench.host.end(loading, LOST)
    eventually(lambda: bench.orders(victim, 2))
    bench.host.succeed(victim)


def test_too_little_memory_beside_others_is_tried_again_alone(bench: Bench) -> None:
    neighbour, job_id = bench.begun("neighbour"), bench.begun()
    bench.host.end(job_id, OOM)
    ended = bench.end_told()
    assert ended is not None
    assert ended.to_send
    assert bench.reasons() == ["out_of_memory"]
    bench.begin(job_id)
    eventually(lambda: bench.crowded)
    assert not bench.orders(job_id, 2)

    bench.host.succeed(neighbour)

    eventually(lambda: bench.orders(job_id, 2))
    bench.host.end(job_id, OOM)
    assert bench.error().code == "out_of_memory", "alone, nothing would come of another attempt"
    assert not bench.end().record.dead_letter  # type: ignore[union-attr]


def test_too_little_memory_alone_fails_at_once(bench: Bench) -> None:
    job_id = bench.begun()

    bench.host.end(job_id, OOM)

    assert bench.error().code == "out_of_memory"
    assert bench.reasons() == []


def test_an_error_that_another_attempt_may_not_meet_is_tried_again_when_its_time_has_come(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(retries_max=2, retry_backoff_s=10.0)
    publish = type(bench.artifacts).publish

    def refuse(*_: object) -> None:
        raise StorageError("The outputs could not be stored: it is away.")

    monkeypatch.setattr(bench.artifacts, "publish", refuse)
    bench.host.succeed(bench.begun())
    ended = bench.end_told()
    assert ended is not None
    assert (ended.job.record.state, ended.to_send) == (JobState.QUEUED, False), "the reconciler sends it, in time"
    assert ended.requeue == Requeue("storage_error", retry=True, delay_ms=10_000)
    assert bench.runner.run("job-1") is None, "a message that comes before its time"

    bench.store.ahead_ms = 10_000
    bench.host.succeed(bench.again())
    ended = bench.end_told()
    assert ended is not None
    assert ended.requeue == Requeue("storage_error", retry=True, delay_ms=40_000)

    monkeypatch.setattr(bench.artifacts, "publish", lambda *files: publish(bench.artifacts, *files))
    bench.store.ahead_ms = 50_000
    bench.host.succeed(bench.again())
    job = bench.end()
    assert job is not None
    assert (job.record.state, job.record.attempt) == (JobState.SUCCEEDED, 3)
    assert bench.stored() == ["3/0.png"]


def test_after_the_last_retry_the_job_fails_with_its_own_error_and_leaves_no_file(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(retries_max=0)
    publish = type(bench.artifacts).publish

    def break_off(job_id: str, attempt: int, files: list[Path]) -> None:
        publish(bench.artifacts, job_id, attempt, files)
        raise StorageError("The outputs could not be stored: it is away.")

    monkeypatch.setattr(bench.artifacts, "publish", break_off)

    bench.host.succeed(bench.begun())

    assert bench.error().code == "storage_error"
    assert bench.stored() == []


def test_a_retry_is_left_to_another_worker_where_one_could_do_it(make_bench: Callable[..., Bench]) -> None:
    asked: list[str] = []

    def elsewhere(job: Any) -> bool:
        asked.append(job.record.id)
        return True

    bench = make_bench(serves_elsewhere=elsewhere, retry_backoff_s=SOON_S)
    other = make_bench(beside=bench)
    job_id = bench.begun()
    bench.host.end(job_id, RunFailed(ErrorInfo(code="internal", message="something is wrong here")))
    bench.end()
    assert asked == [job_id]
    bench.store.ahead_ms = 1_000

    assert bench.runner.run(job_id) is None
    other.host.succeed(other.again())

    assert other.end().record.worker_id == "w2"  # type: ignore[union-attr]


def test_a_fault_of_ours_is_tried_again_and_tells_nothing_of_itself(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(retries_max=1, retry_backoff_s=SOON_S)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("/srv/secret/path")

    monkeypatch.setattr(bench.host, "submit", fail)
    bench.begin(bench.queue())
    bench.end()
    assert bench.reasons() == ["internal"]
    bench.store.ahead_ms = 1_000

    bench.begin("job-1")

    error = bench.error()
    assert error.code == "internal"
    assert "/srv" not in str(error)
    assert "/srv/secret/path" in caplog.text


def test_a_scratch_disk_that_is_full_is_the_storages_trouble(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(retries_max=0)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Orders, "make", refuse)
    bench.begin(bench.queue())

    assert bench.error().code == "storage_error"


@pytest.mark.parametrize(
    ("reason", "state"),
    [(InterruptReason.CANCEL, JobState.CANCELLED), (InterruptReason.GIVE_BACK, JobState.QUEUED)],
)
def test_a_run_that_was_to_stop_anyway_is_not_to_blame_for_the_death_it_shared(
    bench: Bench, reason: InterruptReason, state: JobState
) -> None:
    bench.host.deaf = True
    job_id = bench.begun()
    if reason is InterruptReason.CANCEL:
        bench.store.cancel(job_id)
        bench.runner.cancel(job_id)
    else:
        bench.runner.give_back_all()

    bench.host.end(job_id, LOST)

    ended = bench.end()
    assert ended is not None
    assert (ended.record.state, ended.runs_alone) == (state, False)
