"""Jobs that share their device calls, on a real host with the stub: they join and leave, a bad one harms nobody."""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import EventName
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.registry import discover
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Recorder, stub_bench
from tests.support.outcomes import failed, succeeded
from tests.support.waiting import eventually
from workers.backends import driver
from workers.host import InterruptReason, RunFacts, RunInterrupted, RunOrder, RunOutcome
from workers.thread_host import ThreadHost

STEP_MS = 20
STEPS = 30
HOUR_MS = 3_600_000


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A host that has measured that its calls take the same time whatever their size."""
    made = stub_bench(tmp_path)
    measure(made)
    yield made
    made.host.close()


def measure(bench: Bench) -> None:
    """Have the host learn that sharing pays, up to eight pictures in a call and beyond."""
    for pictures in (1, 2, 4, 8):
        succeeded(bench.run(num_images_per_prompt=pictures, num_inference_steps=4, step_ms=STEP_MS))


class Job:
    """A job that was submitted, with what it tells."""

    def __init__(self, bench: Bench, order: RunOrder, recorder: Recorder | None = None) -> None:
        self.order = order
        self.recorder = recorder or Recorder()
        self.future: Future[RunOutcome] = bench.host.submit(order, self.recorder)

    @property
    def steps(self) -> int:
        """How many steps it has told of."""
        return len(self.recorder.progress)

    @property
    def outcome(self) -> RunOutcome:
        return self.future.result(RUN_TIMEOUT_S)

    @property
    def facts(self) -> RunFacts:
        return succeeded(self.outcome).facts


def start(bench: Bench, **wishes: Any) -> Job:
    """Submit a job of some steps that take a little each."""
    return Job(bench, bench.order(**{"num_inference_steps": STEPS, "step_ms": STEP_MS, **wishes}))


def test_eight_jobs_share_their_forwards_and_know_of_it(bench: Bench) -> None:
    jobs = [start(bench, num_inference_steps=STEPS + number) for number in range(8)]
    facts = [job.facts for job in jobs]
    assert [job.steps for job in jobs] == [STEPS + number for number in range(8)]
    assert {fact.batch_size for fact in facts} == {8}
    assert all(4 < fact.batch_size_mean < 8 for fact in facts[1:]), "not before all were there, nor once some were done"
    assert len({fact.batch_group_id for fact in facts}) == 1
    assert facts[0].batch_group_id is not None


def test_a_job_joins_those_in_flight_at_their_next_step_and_leaves_when_it_is_done(bench: Bench) -> None:
    long = start(bench, num_inference_steps=60)
    eventually(lambda: long.steps > 3)
    short = start(bench, num_inference_steps=4)
    assert short.facts.batch_size == 2
    assert not long.future.done(), "a job of few steps is not held by one of many"
    assert long.facts.batch_size == 2
    assert 1 < long.facts.batch_size_mean < short.facts.batch_size_mean
    assert long.facts.batch_group_id == short.facts.batch_group_id


def test_jobs_of_unequal_sizes_share_nothing_and_take_turns(bench: Bench) -> None:
    small, large = start(bench, width=64), start(bench, width=128)
    for facts in (small.facts, large.facts):
        assert (facts.batch_size, facts.batch_size_mean, facts.batch_group_id) == (1, 1.0, None)


def test_one_that_is_cancelled_leaves_the_others_to_go_on(bench: Bench) -> None:
    jobs = [start(bench, job_id=f"job-{number}") for number in range(4)]
    eventually(lambda: jobs[1].steps > 5)
    bench.host.interrupt("job-1", InterruptReason.CANCEL)
    assert jobs[1].outcome == RunInterrupted(InterruptReason.CANCEL)
    assert jobs[1].steps < STEPS
    for job in (jobs[0], jobs[2], jobs[3]):
        assert job.facts.batch_size == 4
        assert job.steps == STEPS


def test_one_that_raises_fails_alone(bench: Bench) -> None:
    jobs = [start(bench, fail_at_step=STEPS // 2 if number == 1 else None) for number in range(4)]
    assert failed(jobs[1].outcome).error.message == "The model's code raised RuntimeError."
    assert jobs[1].steps == STEPS // 2 - 1
    for job in (jobs[0], jobs[2], jobs[3]):
        assert job.facts.batch_size == 4
        assert [step for step, _ in job.recorder.progress] == list(range(1, STEPS + 1)), "each step once"


def test_one_whose_picture_is_not_finite_fails_alone(bench: Bench) -> None:
    jobs = [start(bench, non_finite=number == 1) for number in range(3)]
    assert failed(jobs[1].outcome).error.code == "non_finite_output"
    assert [jobs[place].facts.batch_size for place in (0, 2)] == [3, 3]


def test_one_that_stalls_holds_up_nobody(bench: Bench) -> None:
    stalling, *others = [
        start(bench, stall_at_step=STEPS // 2 if number == 0 else None, stall_ms=HOUR_MS, job_id=f"job-{number}")
        for number in range(4)
    ]
    for job in others:
        assert job.facts.batch_size == 4
        assert job.steps == STEPS
    assert stalling.steps == STEPS // 2 - 1
    assert not stalling.future.done()


def test_a_chunk_that_does_not_fit_is_made_smaller_and_the_limit_learns(bench: Bench) -> None:
    jobs = [start(bench, oom_above_chunk=2 if number == 1 else None) for number in range(4)]
    facts = [job.facts for job in jobs]
    assert facts[1].batch_size == 2
    assert all(job.steps == STEPS for job in jobs)
    assert all(1 < fact.batch_size_mean <= 2 for fact in facts)
    later = start(bench), start(bench), start(bench)
    assert all(job.facts.batch_size <= 2 for job in later)


def test_one_that_does_not_fit_by_itself_fails_alone_and_says_what_to_change(bench: Bench) -> None:
    jobs = [start(bench, oom_above_chunk=0 if number == 1 else None) for number in range(4)]
    error = failed(jobs[1].outcome).error
    assert error.code == "out_of_memory"
    assert "a call of its denoise with one sample of 64x64" in error.message
    assert error.hint == "Ask for fewer or smaller pictures, or for the preset low-vram."
    for job in (jobs[0], jobs[2], jobs[3]):
        succeeded(job.outcome)
        assert job.steps == STEPS
    succeeded(bench.run())


def test_an_order_that_is_alone_shares_with_nobody(bench: Bench) -> None:
    alone = Job(bench, dataclasses.replace(bench.order(num_inference_steps=STEPS, step_ms=STEP_MS), alone=True))
    others = [start(bench) for _ in range(2)]
    assert (alone.facts.batch_size, alone.facts.batch_group_id) == (1, None)
    assert [job.facts.batch_size for job in others] == [2, 2]


def test_a_job_says_that_it_waits_for_memory_and_begins_to_load_once_it_has_it(tmp_path: Path) -> None:
    stub = discover().find("stub")
    host = ThreadHost(
        backend=driver("cpu-stub"),
        models=[stub, dataclasses.replace(stub, id="other")],
        folders={},
        cache_size=1,
        concurrency=8,
    )
    bench = Bench(host, stub.id, tmp_path)
    first = start(bench)
    eventually(lambda: first.steps > 0)
    order = bench.order()
    recorder = Recorder()
    other = Job(
        bench, dataclasses.replace(order, request=order.request.model_copy(update={"model": "other"})), recorder
    )
    eventually(lambda: recorder.stages)
    assert recorder.stages == ["waiting"]
    assert first.facts.stages[0][0] == "load"
    assert list(other.facts.timings_ms) == ["waiting", "load", "encode_prompt", "denoise", "decode", "export"]
    assert "waiting" not in first.recorder.stages
    host.close()


# What bounds it


@pytest.mark.parametrize(
    ("of_host", "of_spec", "largest"), [(1, None, 1), (2, None, 2), (None, 2, 2), (2, 4, 2), (4, 1, 1)]
)
def test_no_more_jobs_share_a_forward_than_host_and_model_allow(
    tmp_path: Path, of_host: int | None, of_spec: int | None, largest: int
) -> None:
    bench = stub_bench(tmp_path, spec={"max_batch_size": of_spec}, max_batch_size=of_host)
    measure(bench)
    jobs = [start(bench, num_inference_steps=10) for _ in range(5)]
    assert {job.facts.batch_size for job in jobs} == {largest}
    bench.host.close()


def test_where_sharing_does_not_pay_it_stays_off(tmp_path: Path) -> None:
    bench = stub_bench(tmp_path)
    jobs = [start(bench, num_inference_steps=10, step_ms=0, item_ms=5) for _ in range(4)]
    assert max(job.facts.batch_size_mean for job in jobs) < 2
    (measured,) = chunks(bench)
    assert measured.limit == 1
    bench.host.close()


@pytest.mark.parametrize(("of_host_ms", "of_spec_ms"), [(HOUR_MS, None), (0.0, HOUR_MS)])
def test_a_job_waits_as_long_as_its_window_for_others_to_share_its_first_forward(
    tmp_path: Path, of_host_ms: float, of_spec_ms: float | None
) -> None:
    bench = stub_bench(tmp_path, spec={"batch_window_ms": of_spec_ms, "max_batch_size": 2}, batch_window_ms=of_host_ms)
    for pictures in (1, 2):  # an order that is alone waits for nobody, and measures what two in one call take
        order = bench.order(num_images_per_prompt=pictures, num_inference_steps=4, step_ms=STEP_MS)
        succeeded(bench.run(dataclasses.replace(order, alone=True)))
    first = start(bench, num_inference_steps=1)
    second = start(bench, num_inference_steps=1)
    assert [first.facts.batch_size, second.facts.batch_size] == [2, 2]
    bench.host.close()


def test_what_was_measured_is_kept_for_the_next_host(tmp_path: Path) -> None:
    table = tmp_path / "chunks.json"
    bench = stub_bench(tmp_path, chunk_table=table)
    measure(bench)
    before = chunks(bench)
    bench.host.close()
    again = stub_bench(tmp_path / "again", chunk_table=table)
    assert [each.step_ms for each in chunks(again)] == [each.step_ms for each in before]
    assert before[0].limit >= 8
    again.host.close()


def chunks(bench: Bench) -> tuple[ChunkMeasure, ...]:
    return bench.host.capability().abilities["stub"].chunks


def test_the_capability_tells_what_shares(bench: Bench) -> None:
    ability = bench.host.capability().abilities["stub"]
    assert ability.unchunked is None
    assert ability.chunk_classes
    assert [(each.module, each.shape) for each in ability.chunks] == [("denoise", "64x64")]


def test_events_of_members_are_their_own(bench: Bench) -> None:
    met = threading.Barrier(2)
    jobs = [
        Job(
            bench,
            bench.order(num_inference_steps=5, step_ms=STEP_MS),
            Recorder().on(EventName.STAGE_START, lambda: met.wait(RUN_TIMEOUT_S)),
        )
        for _ in range(2)
    ]
    for job in jobs:
        assert job.facts.timings_ms.keys() == {"load", "encode_prompt", "denoise", "decode", "export"}
        assert job.recorder.progress == [(step, 5) for step in range(1, 6)]
