"""A job that was split: its parts run as jobs of their own, and to everybody else it is one."""

from collections.abc import Callable, Sequence

import pytest

from omnirt_tasks.contract import CancelOutcome, Event, EventName, JobState, Phase, Priority
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.job import PartCounts, Progress
from omnirt_tasks.errors import JobNotFound, QueueFull
from omnirt_tasks.jobs.store import (
    Cancelled,
    Checkpoint,
    EventDraft,
    JobQuery,
    JobStore,
    Lease,
    Origin,
    Outcome,
    PartOf,
    QueueDepth,
    Requeue,
    StoredJob,
    WakeUp,
    part_id,
)
from tests.support.jobs import (
    DEATHS_MAX,
    LONG_MS,
    PICTURES_PER_PART,
    Rig,
    claimed,
    failed,
    idempotency,
    new_job,
    step,
    succeeded,
)
from tests.support.waiting import eventually

QUEUE = "cpu-shapes"
ENDS_OF_JOBS = {EventName.JOB_FINISHED, EventName.JOB_FAILED, EventName.JOB_CANCELLED}


def _split(rig: Rig, parts: int = 3, *, deadline_s: float | None = None) -> str:
    return rig.store.create(new_job(parts=parts, deadline_s=deadline_s)).record.id


def _claim(rig: Rig, job_id: str, *numbers: int, worker_id: str = "w1") -> list[Lease]:
    return [claimed(rig.store, part_id(job_id, number), worker_id=worker_id, alone=False) for number in numbers]


def _done(number: int, *, worker_id: str = "w1") -> Outcome:
    return succeeded("part", first=number * PICTURES_PER_PART, count=PICTURES_PER_PART, worker_id=worker_id)


def _told(store: JobStore, job_id: str) -> list[tuple[EventName, JsonObject]]:
    return [(event.event, event.data) for event in store.events(job_id)]


def _names(store: JobStore, job_id: str) -> list[EventName]:
    return [event.event for event in store.events(job_id)]


def _state_of_parts(rig: Rig, job_id: str) -> list[JobState]:
    return [rig.store.get(each).record.state for each in rig.store.get(job_id).parts]


def _nothing_waits_or_runs(rig: Rig, job_id: str) -> None:
    assert rig.store.depth(QUEUE) == QueueDepth(0, 0)
    for part in rig.store.get(job_id).parts:
        assert rig.store.claim(part, worker_id="late", lease_ttl_ms=LONG_MS, alone=True) is None
    assert not rig.store.reconcile(unclaimed_after_ms=0).resend


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
    assert _told(rig.store, given.id) == [(EventName.JOB_ENQUEUED, {"queue": QUEUE})]


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
    job_id = _split(rig)
    other = rig.store.create(new_job()).record.id
    assert (rig.store.position(job_id), rig.store.position(other)) == (1, 4)
    leases = _claim(rig, job_id, 0, 1)
    assert (rig.store.position(job_id), rig.store.position(other)) == (1, 2)
    _claim(rig, job_id, 2)
    assert (rig.store.position(job_id), rig.store.position(other)) == (None, 1)
    rig.store.give_back(leases[1], Requeue("left"))
    assert (rig.store.position(job_id), rig.store.position(other)) == (1, 2)


# ---------------------------------------------------------------- while it runs


def test_a_split_job_runs_with_the_first_part_that_does_and_tells_of_each(rig: Rig) -> None:
    job_id = _split(rig)
    assert rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS, alone=True) is None

    (first,) = _claim(rig, job_id, 1, worker_id="w1")
    job = rig.store.get(job_id)
    assert (job.record.state, job.record.phase, job.record.worker_id) == (JobState.RUNNING, Phase.WAITING, "w1")
    assert job.record.parts == PartCounts(total=3, queued=2, running=1, succeeded=0)
    started_at_ms = job.record.started_at_ms
    rig.pass_time(5)
    _claim(rig, job_id, 0, worker_id="w2")

    job = rig.store.get(job_id)
    assert (job.record.attempt, job.record.started_at_ms, job.record.worker_id) == (1, started_at_ms, None)
    assert (job.last_seq, rig.store.get(first.job_id).last_seq) == (4, 3)
    assert _told(rig.store, job_id)[1:] == [
        (EventName.JOB_STARTED, {"attempt": 1, "worker_id": "w1"}),
        (EventName.PART_STARTED, {"part": 1, "attempt": 1, "worker_id": "w1"}),
        (EventName.PART_STARTED, {"part": 0, "attempt": 1, "worker_id": "w2"}),
    ]
    assert rig.store.state_counts()["text2image", "shapes", "unknown", "running"] == 1


def test_the_steps_of_all_parts_are_those_of_one_job(rig: Rig) -> None:
    job_id = _split(rig)
    leases = _claim(rig, job_id, 0, 1)
    rig.store.append(leases[0], [step(1), step(2)])
    rig.store.append(leases[1], [step(1)])
    rig.store.append(leases[0], [step(3), step(4)])
    rig.store.commit(leases[0], _done(0))
    leases += _claim(rig, job_id, 2)
    rig.store.append(leases[2], [step(number) for number in (1, 2, 3, 4)])
    rig.store.append(leases[1], [step(number) for number in (2, 3, 4)])

    told = [data for event, data in _told(rig.store, job_id) if event is EventName.STAGE_PROGRESS]

    assert [(data["step"], data["total"]) for data in told] == [(number, 12) for number in range(1, 13)]
    assert [data["part"] for data in told] == [0, 0, 1, 0, 0, 2, 2, 2, 2, 1, 1, 1]
    assert rig.store.get(job_id).record.progress == Progress(step=12, total=12, fraction=1.0)
    assert rig.store.get(leases[0].job_id).record.progress == Progress(step=4, total=4, fraction=1.0)


def test_a_part_that_goes_back_gives_up_its_steps_and_a_silent_one_that_is_done_has_made_all(rig: Rig) -> None:
    job_id = _split(rig)
    silent, talking = _claim(rig, job_id, 0, 1)
    rig.store.commit(silent, _done(0))
    assert rig.store.get(job_id).record.progress is None
    rig.store.append(talking, [step(3)])
    assert rig.store.get(job_id).record.progress == Progress(step=7, total=12, fraction=7 / 12)
    rig.store.give_back(talking, Requeue("left"))
    assert rig.store.get(job_id).record.progress is None


def test_what_a_part_tells_stands_in_the_log_of_its_job_with_its_number(rig: Rig) -> None:
    job_id = _split(rig, 2)
    (lease,) = _claim(rig, job_id, 1)
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
    job_id = _split(rig, 2)
    watch = rig.feed.subscribe(job_id)
    leases = _claim(rig, job_id, 0, 1)
    rig.store.append(leases[1], [step(1)])
    for number, lease in enumerate(leases):
        rig.store.commit(lease, _done(number))

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
    job_id = _split(rig)
    leases = _claim(rig, job_id, 0, 1, 2)
    for number in order:
        assert rig.store.get(job_id).record.state is JobState.RUNNING
        assert rig.store.commit(leases[number], _done(number))

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
    ends = _told(rig.store, job_id)[-3:]
    assert ends == [
        *(
            (EventName.PART_FINISHED, {"part": number, "outputs": names[2 * number : 2 * number + 2]})
            for number in order[:-1]
        ),
        (EventName.JOB_FINISHED, {"outputs": names}),
    ]
    _nothing_waits_or_runs(rig, job_id)
    assert rig.store.state_counts()["text2image", "shapes", "modular", "succeeded"] == 1


def test_the_report_of_a_split_job_is_that_of_its_parts_together(rig: Rig) -> None:
    job_id = _split(rig, 2)
    rig.pass_time(10)
    first, second = _claim(rig, job_id, 0, 1)
    rig.store.give_back(second, Requeue("left"))
    (again,) = _claim(rig, job_id, 1, worker_id="w2")
    rig.store.commit(again, _done(1, worker_id="w2"))
    rig.store.commit(first, _done(0))

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
    job_id = _split(rig, 2)
    for number, lease in enumerate(_claim(rig, job_id, 0, 1)):
        rig.store.commit(lease, _done(number))
    (listed,) = rig.store.page(JobQuery("alice", state=JobState.SUCCEEDED)).jobs
    assert (listed.record.id, listed.record.result) == (job_id, None)
    assert listed.record.parts == PartCounts(total=2, queued=0, running=0, succeeded=2)
    assert listed.parts == rig.store.get(job_id).parts


# ---------------------------------------------------------------- when a part fails


def _fail(rig: Rig, lease: Lease) -> None:
    assert rig.store.commit(lease, failed())


def _die_too_often(rig: Rig, lease: Lease) -> None:
    for _ in range(DEATHS_MAX + 1):  # the first time it was beside others
        assert rig.store.give_back(lease, Requeue("died", died=True))
        if rig.store.get(lease.job_id).record.state is JobState.QUEUED:
            lease = claimed(rig.store, lease.job_id)


def _lapse_late(rig: Rig, lease: Lease) -> None:
    rig.pass_time(50)
    assert rig.store.give_back(lease, Requeue("left"))


def _wait_too_long(rig: Rig, lease: Lease) -> None:
    rig.store.give_back(lease, Requeue("left"))
    rig.pass_time(50)
    assert rig.store.reconcile(unclaimed_after_ms=LONG_MS).overdue


FAILURES: dict[str, tuple[Callable[[Rig, Lease], None], str, str]] = {
    "committed": (_fail, "model_failed", "The model failed."),
    "a dead letter": (_die_too_often, "worker_lost", f"What ran the job died {DEATHS_MAX} times"),
    "given back late": (_lapse_late, "timeout", "The job's deadline"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_part_that_fails_for_good_fails_its_job_which_says_which_part(rig: Rig, how: str) -> None:
    fail, code, message = FAILURES[how]
    job_id = _split(rig, 4, deadline_s=0.05 if how == "given back late" else None)
    done, failing, running = _claim(rig, job_id, 0, 1, 2)
    rig.store.commit(done, _done(0))
    stopped: list[str] = []
    rig.feed.on_cancel(stopped.append)

    fail(rig, failing)

    job = rig.store.get(job_id)
    assert job.record.state is JobState.FAILED
    assert job.record.error is not None
    assert job.record.error.code == code
    assert job.record.error.message.startswith(f"Part 2 of 4, pictures 2 to 3: {message}")
    told = _told(rig.store, job_id)
    assert told[-1] == (EventName.JOB_FAILED, {"error": job.record.error.model_dump(mode="json")})
    assert _state_of_parts(rig, job_id) == [
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.RUNNING,
        JobState.CANCELLED,
    ]
    own = rig.store.get(failing.job_id).record.error
    assert own is not None
    assert own.message.startswith(message)
    eventually(lambda: stopped == [running.job_id])
    assert rig.store.renew(running, lease_ttl_ms=LONG_MS).cancel_requested
    assert rig.store.depth(QUEUE) == QueueDepth(0, 1)
    assert job.record.dead_letter == (how == "a dead letter")
    dead = rig.store.page(JobQuery("alice", dead_letters=True)).jobs
    assert [each.record.id for each in dead] == [job_id] * job.record.dead_letter


def test_a_part_that_waits_past_the_deadline_fails_its_job(rig: Rig) -> None:
    job_id = _split(rig, 2, deadline_s=0.02)
    other = rig.store.create(new_job()).record.id
    rig.pass_time(20)
    found = rig.store.reconcile(unclaimed_after_ms=0)
    assert len(found.overdue) == 1
    assert list(found.resend) == [WakeUp(other, QUEUE)]
    error = rig.store.get(job_id).record.error
    assert error is not None
    assert (error.code, error.message[:30]) == ("timeout", "Part 1 of 2, pictures 0 to 1: ")
    rig.store.purge(other)
    _nothing_waits_or_runs(rig, job_id)


@pytest.mark.parametrize("outcome", [_done(1), failed(), Cancelled(), Requeue("left"), Requeue("died", died=True)])
def test_what_runs_on_when_the_job_is_over_changes_it_no_more(rig: Rig, outcome: Outcome | Requeue) -> None:
    job_id = _split(rig)
    failing, running = _claim(rig, job_id, 0, 1)
    _fail(rig, failing)
    before, log = rig.store.get(job_id), rig.store.events(job_id)

    assert rig.store.append(running, [step(1), EventDraft(EventName.STAGE_START, "decode")])
    assert rig.store.checkpoint(running, name="a", step=1)
    if isinstance(outcome, Requeue):
        assert rig.store.give_back(running, outcome)
    else:
        assert rig.store.commit(running, outcome)

    after = rig.store.get(job_id)
    assert rig.store.events(job_id) == log
    assert (after.record.state, after.record.error) == (before.record.state, before.record.error)
    assert (after.record.progress, after.record.phase) == (before.record.progress, before.record.phase)
    assert after.record.expires_at_ms == before.record.expires_at_ms
    assert rig.store.get(running.job_id).record.finished
    _nothing_waits_or_runs(rig, job_id)


# ---------------------------------------------------------------- a part is tried again by itself


def test_a_part_is_given_back_blamed_and_tried_again_without_the_others(rig: Rig) -> None:
    job_id = _split(rig, 2)
    lost, other = _claim(rig, job_id, 0, 1)

    assert rig.store.give_back(lost, Requeue("device_lost", died=True, retry=True))

    part, job = rig.store.get(lost.job_id), rig.store.get(job_id)
    assert (part.record.state, part.runs_alone, part.retries) == (JobState.QUEUED, True, 1)
    assert (job.record.state, job.record.worker_id) == (JobState.RUNNING, "w1")
    assert job.record.parts == PartCounts(total=2, queued=1, running=1, succeeded=0)
    assert _told(rig.store, job_id)[-1] == (
        EventName.PART_REQUEUED,
        {"part": 0, "attempt": 1, "reason": "device_lost"},
    )
    assert not rig.store.get(other.job_id).runs_alone
    assert rig.store.renew(other, lease_ttl_ms=LONG_MS).held
    claimed(rig.store, lost.job_id, worker_id="w2")
    assert rig.store.get(job_id).record.attempt == 2
    assert _names(rig.store, job_id).count(EventName.JOB_STARTED) == 1


def test_the_lease_of_a_part_expires_for_itself_and_it_is_sent_again(rig: Rig) -> None:
    job_id = _split(rig, 2)
    claimed(rig.store, part_id(job_id, 1), lease_ttl_ms=1)
    _claim(rig, job_id, 0)
    rig.pass_time(2)
    found = rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    assert list(found.expired) == [part_id(job_id, 1)]
    assert list(found.resend) == [WakeUp(part_id(job_id, 1), QUEUE)]
    assert rig.store.get(job_id).record.state is JobState.RUNNING


def test_parts_whose_messages_are_lost_are_named_one_by_one(rig: Rig) -> None:
    job_id = _split(rig)
    _claim(rig, job_id, 1)
    rig.pass_time(10)
    found = rig.store.reconcile(unclaimed_after_ms=10)
    assert sorted(wake_up.job_id for wake_up in found.resend) == [part_id(job_id, 0), part_id(job_id, 2)]


# ---------------------------------------------------------------- cancelled


def test_a_split_job_of_which_nothing_runs_is_cancelled_at_once(rig: Rig) -> None:
    queued, begun = _split(rig), _split(rig)
    first, second = _claim(rig, begun, 0, 1)
    rig.store.commit(first, _done(0))
    rig.store.give_back(second, Requeue("left"))
    for job_id in (queued, begun):
        assert rig.store.cancel(job_id) is CancelOutcome.CANCELLED
        assert rig.store.cancel(job_id) is CancelOutcome.ALREADY_FINISHED
        assert rig.store.get(job_id).record.state is JobState.CANCELLED
        assert _names(rig.store, job_id)[-1] is EventName.JOB_CANCELLED
    _nothing_waits_or_runs(rig, queued)
    _nothing_waits_or_runs(rig, begun)


def test_a_split_job_that_runs_is_cancelled_once_the_last_of_its_parts_has_ended(rig: Rig) -> None:
    job_id = _split(rig)
    leases = _claim(rig, job_id, 0, 1)
    stopped: list[str] = []
    rig.feed.on_cancel(stopped.append)

    assert rig.store.cancel(job_id) is CancelOutcome.REQUESTED

    assert rig.store.depth(QUEUE) == QueueDepth(0, 2)
    eventually(lambda: sorted(stopped) == [lease.job_id for lease in leases])
    for lease in leases:
        job = rig.store.get(job_id)
        assert (job.record.state, job.record.cancel_requested) == (JobState.RUNNING, True)
        assert rig.store.renew(lease, lease_ttl_ms=LONG_MS).cancel_requested
        assert rig.store.commit(lease, Cancelled())
    assert rig.store.get(job_id).record.state is JobState.CANCELLED
    assert _names(rig.store, job_id)[-2:] == [EventName.PART_STARTED, EventName.JOB_CANCELLED]
    _nothing_waits_or_runs(rig, job_id)


def test_a_part_that_succeeds_after_the_cancel_saves_the_job_only_if_all_have(rig: Rig) -> None:
    lacking, complete = _split(rig, 2), _split(rig, 2)
    (first,) = _claim(rig, lacking, 0)
    leases = _claim(rig, complete, 0, 1)
    for job_id in (lacking, complete):
        assert rig.store.cancel(job_id) is CancelOutcome.REQUESTED
    rig.store.commit(first, _done(0))
    for number, lease in enumerate(leases):
        rig.store.commit(lease, _done(number))
    assert rig.store.get(lacking).record.state is JobState.CANCELLED
    assert rig.store.get(lacking).record.result is None
    assert rig.store.get(complete).record.state is JobState.SUCCEEDED


@pytest.mark.parametrize("requeue", [Requeue("left"), Requeue("died", died=True)])
def test_a_part_that_comes_back_after_the_cancel_does_not_wait_again(rig: Rig, requeue: Requeue) -> None:
    job_id = _split(rig, 2)
    leases = _claim(rig, job_id, 0, 1)
    rig.store.cancel(job_id)
    for lease in leases:
        assert rig.store.give_back(lease, requeue)
    assert rig.store.get(job_id).record.state is JobState.CANCELLED
    _nothing_waits_or_runs(rig, job_id)


def test_a_part_that_its_worker_cancels_takes_its_job_with_it(rig: Rig) -> None:
    job_id = _split(rig)
    first, second = _claim(rig, job_id, 0, 1)
    rig.store.commit(first, Cancelled())
    assert rig.store.get(job_id).record.cancel_requested
    assert rig.store.renew(second, lease_ttl_ms=LONG_MS).cancel_requested
    rig.store.commit(second, Cancelled())
    assert rig.store.get(job_id).record.state is JobState.CANCELLED


# ---------------------------------------------------------------- nobody sees a part by itself


@pytest.mark.parametrize(
    "call",
    [
        lambda store, part: store.cancel(part),
        lambda store, part: store.events(part),
        lambda store, part: store.events(part, after=10),
        lambda store, part: store.position(part),
        lambda store, part: store.forget_dead_letter(part),
    ],
)
def test_a_part_is_no_job_to_whoever_asks_for_it(rig: Rig, call: Callable[[JobStore, str], object]) -> None:
    job_id = _split(rig)
    with pytest.raises(JobNotFound):
        call(rig.store, part_id(job_id, 0))
    assert rig.store.get(job_id).record.parts == PartCounts(total=3, queued=3, running=0, succeeded=0)


# ---------------------------------------------------------------- removed


def _fail_beside_another(rig: Rig, job_id: str) -> None:
    _fail(rig, _claim(rig, job_id, 0, 1)[0])


def _succeed(rig: Rig, job_id: str) -> None:
    for number, lease in enumerate(_claim(rig, job_id, 0, 1, 2)):
        rig.store.commit(lease, _done(number))


PURGED: dict[str, Callable[[Rig, str], object]] = {
    "queued": lambda rig, job_id: None,
    "running": lambda rig, job_id: _claim(rig, job_id, 0, 1),
    "asked to stop": lambda rig, job_id: (_claim(rig, job_id, 0), rig.store.cancel(job_id)),
    "failed, while a part runs": _fail_beside_another,
    "succeeded": _succeed,
}


@pytest.mark.parametrize("state", PURGED)
def test_a_purge_removes_a_split_job_with_all_its_parts(rig: Rig, state: str) -> None:
    job = rig.store.create(new_job(parts=3, idempotency=idempotency()))
    PURGED[state](rig, job.record.id)
    running = [each for each in job.parts if rig.store.get(each).record.state is JobState.RUNNING]
    unfinished = not rig.store.get(job.record.id).record.finished
    stopped: list[str] = []
    rig.feed.on_cancel(stopped.append)
    watch = rig.feed.subscribe(job.record.id)

    rig.store.purge(part_id(job.record.id, 0))
    assert rig.store.get(part_id(job.record.id, 0)).part is not None
    rig.store.purge(job.record.id)
    rig.store.purge(job.record.id)

    for job_id in (job.record.id, *job.parts):
        with pytest.raises(JobNotFound):
            rig.store.get(job_id)
        assert rig.store.claim(job_id, worker_id="w", lease_ttl_ms=LONG_MS) is None
    assert rig.store.depth(QUEUE) == QueueDepth(0, 0)
    assert not rig.store.page(JobQuery("alice")).jobs
    assert rig.store.submitted("alice", idempotency()) is None
    eventually(lambda: set(running) <= set(stopped))
    if unfinished:
        event = watch.next(5)
        assert isinstance(event, Event)
        assert event.event is EventName.JOB_CANCELLED
    watch.close()


def test_a_split_job_expires_as_one(rig: Rig) -> None:
    job_id = _split(rig, 2)
    for number, lease in enumerate(_claim(rig, job_id, 0, 1)):
        rig.store.commit(lease, _done(number))
    rig.pass_time(100)
    (expired,) = rig.store.expired()
    assert (expired.record.id, expired.parts) == (job_id, (part_id(job_id, 0), part_id(job_id, 1)))


def test_the_priority_of_a_split_job_is_that_of_its_parts(rig: Rig) -> None:
    normal = rig.store.create(new_job()).record.id
    job: StoredJob = rig.store.create(new_job(parts=2, priority=Priority.HIGH))
    assert (job.priority, job.record.priority) == (Priority.HIGH, Priority.HIGH)
    assert rig.store.position(job.record.id) == 1
    assert job.wake_ups == tuple(WakeUp(each, QUEUE, Priority.HIGH) for each in job.parts)
    assert rig.store.position(normal) == 3
    assert rig.store.depth(QUEUE).by_priority == {Priority.HIGH: 2, Priority.NORMAL: 1}
