"""A job that was split: its parts run as jobs of their own, and to everybody else it is one."""

from collections.abc import Sequence

import pytest

from omnirt_tasks.contract import Event, EventName, JobState, Phase
from omnirt_tasks.contract.job import PartCounts, Progress
from omnirt_tasks.errors import QueueFull
from omnirt_tasks.jobs.values import (
    Checkpoint,
    EventDraft,
    JobQuery,
    Origin,
    PartOf,
    QueueDepth,
    Requeue,
    WakeUp,
    part_id,
)
from tests.support.jobs import (
    LONG_MS,
    PICTURES_PER_PART,
    Rig,
    claimed,
    idempotency,
    new_job,
    step,
    succeeded,
)
from tests.support.split_jobs import QUEUE, claim_parts, done, nothing_waits_or_runs, split_job, told

# ---------------------------------------------------------------- accepted


def test_a_split_job_is_one_job_to_its_caller_and_several_to_its_queue(rig: Rig) -> None:
    before = rig.store.create(new_job()).record.id
    given = new_job(parts=3)

    job = rig.store.create(given)

    assert job == rig.store.get(given.id)
    assert job.record.parts == PartCounts(total=3, queued=3, running=0, succeeded=0)
    assert job.parts == tuple(f"{given.id}.{number}" for number in range(3))
    assert job.wake_ups == tuple(WakeUp(each, QUEUE) for each in job.parts)
    assert rig.store.depth(QUEUE) == QueueDepth(4, 0)
    assert job.position in {2, None}  # told where it costs nothing
    assert rig.store.position(given.id) == 2
    assert [each.record.id for each in rig.store.page(JobQuery("alice")).jobs] == [given.id, before]
    assert rig.store.state_counts()["text2image", "shapes", "unknown", "queued"] == 2
    assert told(rig.store, given.id) == [(EventName.JOB_ENQUEUED, {"queue": QUEUE})]


def test_a_part_knows_what_it_runs_and_what_it_is_a_part_of(rig: Rig) -> None:
    given = new_job(parts=2, deadline_s=60)
    whole = rig.store.create(given)
    part = rig.store.get(part_id(given.id, 1))
    assert part.part == PartOf(given.id, 1, 2, PICTURES_PER_PART)
    assert part.resolved == given.parts[1].resolved
    assert (part.owner, part.queue, part.traceparent) == (whole.owner, whole.queue, whole.traceparent)
    assert (part.record.deadline_at_ms, part.record.trace_id) == (whole.record.deadline_at_ms, "trace")
    assert (part.record.request, part.parts, part.record.parts) == ({}, (), None)
    assert (whole.resolved, whole.record.request) == (given.resolved, given.request)


def test_waiting_parts_fill_a_queue_as_jobs_do(rig: Rig) -> None:
    rig.store.create(new_job(parts=3), queue_limit=1)
    with pytest.raises(QueueFull):
        rig.store.create(new_job(), queue_limit=3)
    rig.store.create(new_job(), queue_limit=4)


def test_a_split_job_that_is_submitted_again_is_there_once(rig: Rig) -> None:
    given = new_job(parts=2, idempotency=idempotency())
    first = rig.store.create(given)
    assert rig.store.create(given) == first
    assert rig.store.create(new_job(parts=3, idempotency=idempotency())) == first
    assert rig.store.submitted("alice", idempotency()) == first
    assert rig.store.depth(QUEUE).waiting == 2


def test_a_split_job_waits_where_the_first_of_its_waiting_parts_does(rig: Rig) -> None:
    job_id = split_job(rig)
    other = rig.store.create(new_job()).record.id
    assert (rig.store.position(job_id), rig.store.position(other)) == (1, 4)
    leases = claim_parts(rig, job_id, 0, 1)
    assert (rig.store.position(job_id), rig.store.position(other)) == (1, 2)
    claim_parts(rig, job_id, 2)
    assert (rig.store.position(job_id), rig.store.position(other)) == (None, 1)
    rig.store.give_back(leases[1], Requeue("left"))
    assert (rig.store.position(job_id), rig.store.position(other)) == (1, 2)


# ---------------------------------------------------------------- while it runs


def test_a_split_job_runs_with_the_first_part_that_does_and_tells_of_each(rig: Rig) -> None:
    job_id = split_job(rig)
    assert rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS, alone=True) is None

    (first,) = claim_parts(rig, job_id, 1, worker_id="w1")
    job = rig.store.get(job_id)
    assert (job.record.state, job.record.phase, job.record.worker_id) == (JobState.RUNNING, Phase.WAITING, "w1")
    assert job.record.parts == PartCounts(total=3, queued=2, running=1, succeeded=0)
    started_at_ms = job.record.started_at_ms
    rig.pass_time(5)
    claim_parts(rig, job_id, 0, worker_id="w2")

    job = rig.store.get(job_id)
    assert (job.record.attempt, job.record.started_at_ms, job.record.worker_id) == (1, started_at_ms, None)
    assert (job.last_seq, rig.store.get(first.job_id).last_seq) == (4, 3)
    assert told(rig.store, job_id)[1:] == [
        (EventName.JOB_STARTED, {"attempt": 1, "worker_id": "w1"}),
        (EventName.PART_STARTED, {"part": 1, "attempt": 1, "worker_id": "w1"}),
        (EventName.PART_STARTED, {"part": 0, "attempt": 1, "worker_id": "w2"}),
    ]
    assert rig.store.state_counts()["text2image", "shapes", "unknown", "running"] == 1


def test_the_steps_of_all_parts_are_those_of_one_job(rig: Rig) -> None:
    job_id = split_job(rig)
    leases = claim_parts(rig, job_id, 0, 1)
    rig.store.append(leases[0], [step(1), step(2)])
    rig.store.append(leases[1], [step(1)])
    rig.store.append(leases[0], [step(3), step(4)])
    rig.store.commit(leases[0], done(0))
    leases += claim_parts(rig, job_id, 2)
    rig.store.append(leases[2], [step(number) for number in (1, 2, 3, 4)])
    rig.store.append(leases[1], [step(number) for number in (2, 3, 4)])

    steps = [data for event, data in told(rig.store, job_id) if event is EventName.STAGE_PROGRESS]

    assert [(data["step"], data["total"]) for data in steps] == [(number, 12) for number in range(1, 13)]
    assert [data["part"] for data in steps] == [0, 0, 1, 0, 0, 2, 2, 2, 2, 1, 1, 1]
    assert rig.store.get(job_id).record.progress == Progress(step=12, total=12, fraction=1.0)
    assert rig.store.get(leases[0].job_id).record.progress == Progress(step=4, total=4, fraction=1.0)


def test_a_part_that_goes_back_gives_up_its_steps_and_a_silent_one_that_is_done_has_made_all(rig: Rig) -> None:
    job_id = split_job(rig)
    silent, talking = claim_parts(rig, job_id, 0, 1)
    rig.store.commit(silent, done(0))
    assert rig.store.get(job_id).record.progress is None
    rig.store.append(talking, [step(3)])
    assert rig.store.get(job_id).record.progress == Progress(step=7, total=12, fraction=7 / 12)
    rig.store.give_back(talking, Requeue("left"))
    assert rig.store.get(job_id).record.progress is None


def test_a_part_that_is_done_has_made_all_its_steps_whatever_it_told_last(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    finished, running = claim_parts(rig, job_id, 0, 1)
    rig.store.append(finished, [step(3)])
    rig.store.commit(finished, done(0))
    rig.store.append(running, [step(1)])
    assert rig.store.get(job_id).record.progress == Progress(step=5, total=8, fraction=5 / 8)


def test_what_a_part_tells_stands_in_the_log_of_its_job_with_its_number(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    (lease,) = claim_parts(rig, job_id, 1)
    drafts = [
        EventDraft(EventName.STAGE_START, "denoise"),
        EventDraft(EventName.STAGE_PROGRESS, "denoise", {"step": 1, "total": 4, "timestep": 999}),
        EventDraft(EventName.STAGE_PROGRESS, "load", {"step": 1, "total": 2}),
        EventDraft(EventName.PREVIEW, "denoise", {"step": 1, "mime": "image/png", "data_b64": ""}),
        EventDraft(EventName.STAGE_END, "denoise", {"elapsed_ms": 1.5, "nested": {"empty": [], "none": None}}),
    ]
    before = rig.store.get(lease.job_id).last_seq

    assert rig.store.append(lease, drafts, call="once")
    assert rig.store.append(lease, drafts, call="once")
    assert rig.store.checkpoint(lease, name="kept", step=1)

    events = rig.store.events(job_id, after=before)
    assert [(event.event, event.stage, event.data) for event in events] == [
        (EventName.STAGE_START, "denoise", {"part": 1}),
        (EventName.STAGE_PROGRESS, "denoise", {"part": 1, "step": 1, "total": 8, "timestep": 999}),
        (EventName.STAGE_PROGRESS, "load", {"part": 1, "step": 1, "total": 2}),
        (EventName.PREVIEW, "denoise", {"part": 1, "step": 1, "mime": "image/png", "data_b64": ""}),
        (EventName.STAGE_END, "denoise", {"part": 1, "elapsed_ms": 1.5, "nested": {"empty": [], "none": None}}),
        (EventName.CHECKPOINT, "job", {"part": 1, "step": 1}),
    ]
    assert [event.seq for event in events] == list(range(before + 1, before + 7))
    whole, part = rig.store.get(job_id), rig.store.get(lease.job_id)
    assert (whole.record.phase, part.record.phase) == (Phase.DECODE, Phase.DECODE)
    assert (whole.checkpoint, part.checkpoint) == (None, Checkpoint(1, "kept", 1))
    assert whole.last_seq == part.last_seq


def test_whoever_watches_a_split_job_sees_the_events_of_its_parts_live(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    watch = rig.feed.subscribe(job_id)
    leases = claim_parts(rig, job_id, 0, 1)
    rig.store.append(leases[1], [step(1)])
    for number, lease in enumerate(leases):
        rig.store.commit(lease, done(number))

    live: list[Event] = []
    while not live or not live[-1].terminal:
        event = watch.next(5)
        assert isinstance(event, Event)
        live.append(event)
    watch.close()

    assert live == list(rig.store.events(job_id, after=1))


# ---------------------------------------------------------------- when it succeeds


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_the_outputs_are_in_the_order_of_the_request_whatever_part_is_done_first(
    rig: Rig, order: Sequence[int]
) -> None:
    job_id = split_job(rig)
    leases = claim_parts(rig, job_id, 0, 1, 2)
    for number in order:
        assert rig.store.get(job_id).record.state is JobState.RUNNING
        assert rig.store.commit(leases[number], done(number))

    job = rig.store.get(job_id)
    names = [f"{index}.png" for index in range(6)]
    assert (job.record.state, job.record.parts) == (
        JobState.SUCCEEDED,
        PartCounts(total=3, queued=0, running=0, succeeded=3),
    )
    assert job.record.result is not None
    assert [output.name for output in job.record.result.outputs] == names
    assert [output.index for output in job.record.result.outputs] == list(range(6))
    assert job.record.result.metadata.artifacts == job.record.result.outputs
    assert job.origins == {
        name: Origin(part_id(job_id, index // PICTURES_PER_PART), 1) for index, name in enumerate(names)
    }
    ends = told(rig.store, job_id)[-3:]
    assert ends == [
        *(
            (EventName.PART_FINISHED, {"part": number, "outputs": names[2 * number : 2 * number + 2]})
            for number in order[:-1]
        ),
        (EventName.JOB_FINISHED, {"outputs": names}),
    ]
    nothing_waits_or_runs(rig, job_id)
    assert rig.store.state_counts()["text2image", "shapes", "modular", "succeeded"] == 1


def test_the_report_of_a_split_job_is_that_of_its_parts_together(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    rig.pass_time(10)
    first, second = claim_parts(rig, job_id, 0, 1)
    rig.store.give_back(second, Requeue("left"))
    (again,) = claim_parts(rig, job_id, 1, worker_id="w2")
    rig.store.commit(again, done(1, worker_id="w2"))
    rig.store.commit(first, done(0))

    job = rig.store.get(job_id)
    assert job.record.result is not None
    report = job.record.result.metadata
    assert (report.run_id, report.job_id, report.worker_id) == (job_id, job_id, None)
    assert (report.queue_wait_ms, report.enqueued_at_ms) == (10, job.record.enqueued_at_ms)
    assert job.origins["3.png"] == Origin(part_id(job_id, 1), 2)
    assert job.record.attempt == 2


def test_an_output_of_a_job_that_is_not_split_has_its_origin_too(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id), Requeue("left"))
    assert rig.store.get(job_id).origins == {}
    rig.store.commit(claimed(rig.store, job_id), succeeded(job_id))
    assert rig.store.get(job_id).origins == {"0.png": Origin(job_id, 2)}


def test_a_list_of_jobs_shows_a_split_one_once_and_without_its_result(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    for number, lease in enumerate(claim_parts(rig, job_id, 0, 1)):
        rig.store.commit(lease, done(number))
    (listed,) = rig.store.page(JobQuery("alice", state=JobState.SUCCEEDED)).jobs
    assert (listed.record.id, listed.record.result) == (job_id, None)
    assert listed.record.parts == PartCounts(total=2, queued=0, running=0, succeeded=2)
    assert listed.parts == rig.store.get(job_id).parts
