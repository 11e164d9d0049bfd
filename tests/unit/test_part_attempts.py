"""The attempts of a split job's parts: what each is told to run, how it is tried again, and what is left of it."""

import pytest

from omnirt_tasks.contract import ErrorInfo, EventName, JobState
from tests.support.attempts import Bench
from tests.support.waiting import eventually
from workers.attempts.endings import AttemptEnd
from workers.host import InterruptReason, RunFailed, RunInterrupted

BROKEN = RunFailed(ErrorInfo(code="model_failed", message="The model failed at step 3."))
STOPPED = RunInterrupted(InterruptReason.CANCEL)
JOB = "job-1"


def begun(bench: Bench, *parts: str) -> None:
    """Have the device begin these parts."""
    for part in parts:
        bench.begin(part)
        eventually(lambda part=part: part in bench.host.orders)  # type: ignore[misc]


def ended(bench: Bench, part: str) -> AttemptEnd:
    end = bench.end_told(part)
    assert end is not None
    return end


def test_a_part_is_run_as_its_share_and_its_outputs_are_those_of_the_job(bench: Bench) -> None:
    first, second = bench.queue_split()
    begun(bench, first, second)

    told = [
        (bench.host.orders[part].first_output, bench.host.orders[part].request.config["seed"])
        for part in (first, second)
    ]
    assert told == [(0, 1), (1, 2)]
    for part in (second, first):  # they end out of order
        bench.host.succeed(part)
        bench.end(part)

    record = bench.store.get(JOB).record
    assert record.state is JobState.SUCCEEDED
    assert record.result is not None
    assert [output.url for output in record.result.outputs] == [f"/v1/jobs/{JOB}/artifacts/{n}.png" for n in (0, 1)]
    assert record.result.metadata.job_id == JOB
    assert (bench.stored(first), bench.stored(second)) == (["1/0.png"], ["1/1.png"])


def test_the_end_of_the_last_part_tells_of_the_whole_job_and_no_other_does(bench: Bench) -> None:
    first, second = bench.queue_split()
    begun(bench, first, second)

    bench.host.succeed(first)
    assert ended(bench, first).whole is None
    bench.host.succeed(second)

    whole = ended(bench, second).whole
    assert whole is not None
    assert (whole.record.id, whole.record.state) == (JOB, JobState.SUCCEEDED)


def test_a_part_that_fails_is_tried_again_once_with_the_device_to_itself(bench: Bench) -> None:
    first, second = bench.queue_split()
    begun(bench, first, second)
    assert not bench.host.orders[first].alone

    bench.host.end(first, BROKEN)

    assert ended(bench, first).to_send
    assert bench.state(JOB) is JobState.RUNNING, "a part is tried again before the job fails with it"
    bench.host.succeed(second)
    bench.end(second)
    bench.again(first)
    assert bench.host.orders[first].alone
    bench.host.succeed(first)
    bench.end(first)
    assert bench.state(JOB) is JobState.SUCCEEDED
    assert [event.data["part"] for event in bench.events(EventName.PART_REQUEUED)] == [0]


def test_a_part_that_fails_alone_too_fails_the_job_and_nothing_is_left_of_the_others(bench: Bench) -> None:
    bad, done, running = bench.queue_split(pictures=3)
    begun(bench, done)
    bench.host.succeed(done)
    bench.end(done)
    assert bench.stored(done), "what a part has made stays while its job goes on"
    begun(bench, bad)
    bench.host.end(bad, BROKEN)
    bench.end(bad)
    bench.again(bad)

    bench.host.end(bad, BROKEN)

    whole = ended(bench, bad).whole
    assert whole is not None
    assert whole.record.state is JobState.FAILED
    assert whole.record.error is not None
    assert whole.record.error.message == "Part 1 of 3, picture 0: The model failed at step 3."
    assert bench.stored(done) == []
    late = bench.runner.run(running)
    assert late is not None, "its message came when the job was over: Celery is told"
    assert late.job.record.state is JobState.CANCELLED
    assert late.whole is not None
    assert running not in bench.host.orders


@pytest.mark.parametrize("outcome", ["succeeds", "fails", "stops"])
def test_a_part_that_ends_after_its_job_was_cancelled_is_quiet_and_leaves_no_file(
    bench: Bench, caplog: pytest.LogCaptureFixture, outcome: str
) -> None:
    done, stops, late = bench.queue_split(pictures=3)
    begun(bench, done, stops, late)
    bench.host.succeed(done)
    bench.end(done)
    bench.host.deaf = True
    bench.store.cancel(JOB)
    for part in (stops, late):
        bench.runner.cancel(part)
    bench.host.end(stops, STOPPED)
    bench.end(stops)

    match outcome:
        case "succeeds":
            bench.host.succeed(late)
        case "fails":
            bench.host.end(late, BROKEN)
        case _:
            bench.host.end(late, STOPPED)

    whole = ended(bench, late).whole
    assert whole is not None
    assert whole.record.state is JobState.CANCELLED
    assert [bench.stored(part) for part in (done, stops, late)] == [[], [], []]
    assert "tried again" not in caplog.text
    assert len(bench.events(EventName.JOB_CANCELLED)) == 1


def test_an_output_of_a_split_job_is_the_input_of_another(bench: Bench) -> None:
    parts = bench.queue_split()
    begun(bench, *parts)
    for number, part in enumerate(parts):
        bench.host.succeed(part, content=f"picture {number}".encode())
        bench.end(part)

    follower = bench.begun("follower", image=f"artifact:{JOB}/1.png")

    assert bench.host.orders[follower].files["image"].read_bytes() == b"picture 1"
    bench.host.succeed(follower)
    assert bench.end(follower).record.state is JobState.SUCCEEDED  # type: ignore[union-attr]
