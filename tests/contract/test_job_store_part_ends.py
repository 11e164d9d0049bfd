"""How a job ends that was split: with a part that fails, by its cancel, or removed; and how a part comes back."""

from collections.abc import Callable

import pytest

from omnirt_tasks.contract import CancelOutcome, Event, EventName, JobState, Priority
from omnirt_tasks.contract.job import PartCounts
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import (
    Cancelled,
    EventDraft,
    JobQuery,
    Lease,
    Outcome,
    QueueDepth,
    Requeue,
    StoredJob,
    WakeUp,
    part_id,
)
from tests.support.jobs import (
    DEATHS_MAX,
    LONG_MS,
    Rig,
    claimed,
    failed,
    idempotency,
    new_job,
    step,
)
from tests.support.split_jobs import (
    QUEUE,
    claim_parts,
    done,
    names_of_events,
    nothing_waits_or_runs,
    split_job,
    states_of_parts,
    told,
)
from tests.support.waiting import eventually

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


FAILURES: dict[str, tuple[Callable[[Rig, Lease], None], str, str]] = {
    "committed": (_fail, "model_failed", "The model failed."),
    "a dead letter": (_die_too_often, "worker_lost", f"What ran the job died {DEATHS_MAX} times"),
    "given back late": (_lapse_late, "timeout", "The job's deadline"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_part_that_fails_for_good_fails_its_job_which_says_which_part(rig: Rig, how: str) -> None:
    fail, code, message = FAILURES[how]
    job_id = split_job(rig, 4, deadline_s=0.05 if how == "given back late" else None)
    finished, failing, running = claim_parts(rig, job_id, 0, 1, 2)
    rig.store.commit(finished, done(0))
    stopped: list[str] = []
    rig.feed.on_cancel(stopped.append)

    fail(rig, failing)

    job = rig.store.get(job_id)
    assert job.record.state is JobState.FAILED
    assert job.record.error is not None
    assert job.record.error.code == code
    assert job.record.error.message.startswith(f"Part 2 of 4, pictures 2 to 3: {message}")
    assert told(rig.store, job_id)[-1] == (EventName.JOB_FAILED, {"error": job.record.error.model_dump(mode="json")})
    assert states_of_parts(rig, job_id) == [
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
    job_id = split_job(rig, 2, deadline_s=0.02)
    other = rig.store.create(new_job()).record.id
    rig.pass_time(20)
    found = rig.store.reconcile(unclaimed_after_ms=0)
    assert len(found.overdue) == 1
    assert list(found.resend) == [WakeUp(other, QUEUE)]
    error = rig.store.get(job_id).record.error
    assert error is not None
    assert (error.code, error.message[:30]) == ("timeout", "Part 1 of 2, pictures 0 to 1: ")
    rig.store.purge(other)
    nothing_waits_or_runs(rig, job_id)


@pytest.mark.parametrize("outcome", [done(1), failed(), Cancelled(), Requeue("left"), Requeue("died", died=True)])
def test_what_runs_on_when_the_job_is_over_changes_it_no_more(rig: Rig, outcome: Outcome | Requeue) -> None:
    job_id = split_job(rig)
    failing, running = claim_parts(rig, job_id, 0, 1)
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
    nothing_waits_or_runs(rig, job_id)


# ---------------------------------------------------------------- a part is tried again by itself


def test_a_part_is_given_back_blamed_and_tried_again_without_the_others(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    lost, other = claim_parts(rig, job_id, 0, 1)

    assert rig.store.give_back(lost, Requeue("device_lost", died=True, retry=True))

    part, job = rig.store.get(lost.job_id), rig.store.get(job_id)
    assert (part.record.state, part.runs_alone, part.retries) == (JobState.QUEUED, True, 1)
    assert (job.record.state, job.record.worker_id) == (JobState.RUNNING, "w1")
    assert job.record.parts == PartCounts(total=2, queued=1, running=1, succeeded=0)
    assert told(rig.store, job_id)[-1] == (
        EventName.PART_REQUEUED,
        {"part": 0, "attempt": 1, "reason": "device_lost"},
    )
    assert not rig.store.get(other.job_id).runs_alone
    assert rig.store.renew(other, lease_ttl_ms=LONG_MS).held
    claimed(rig.store, lost.job_id, worker_id="w2")
    assert rig.store.get(job_id).record.attempt == 2
    assert names_of_events(rig.store, job_id).count(EventName.JOB_STARTED) == 1


def test_the_lease_of_a_part_expires_for_itself_and_it_is_sent_again(rig: Rig) -> None:
    job_id = split_job(rig, 2)
    claimed(rig.store, part_id(job_id, 1), lease_ttl_ms=1)
    claim_parts(rig, job_id, 0)
    rig.pass_time(2)
    found = rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    assert list(found.expired) == [part_id(job_id, 1)]
    assert list(found.resend) == [WakeUp(part_id(job_id, 1), QUEUE)]
    assert rig.store.get(job_id).record.state is JobState.RUNNING


def test_parts_whose_messages_are_lost_are_named_one_by_one(rig: Rig) -> None:
    job_id = split_job(rig)
    claim_parts(rig, job_id, 1)
    rig.pass_time(10)
    found = rig.store.reconcile(unclaimed_after_ms=10)
    assert sorted(wake_up.job_id for wake_up in found.resend) == [part_id(job_id, 0), part_id(job_id, 2)]


# ---------------------------------------------------------------- cancelled


def test_a_split_job_of_which_nothing_runs_is_cancelled_at_once(rig: Rig) -> None:
    queued, begun = split_job(rig), split_job(rig)
    first, second = claim_parts(rig, begun, 0, 1)
    rig.store.commit(first, done(0))
    rig.store.give_back(second, Requeue("left"))
    for job_id in (queued, begun):
        assert rig.store.cancel(job_id) is CancelOutcome.CANCELLED
        assert rig.store.cancel(job_id) is CancelOutcome.ALREADY_FINISHED
        assert rig.store.get(job_id).record.state is JobState.CANCELLED
        assert names_of_events(rig.store, job_id)[-1] is EventName.JOB_CANCELLED
    nothing_waits_or_runs(rig, queued)
    nothing_waits_or_runs(rig, begun)


def test_a_split_job_that_runs_is_cancelled_once_the_last_of_its_parts_has_ended(rig: Rig) -> None:
    job_id = split_job(rig)
    leases = claim_parts(rig, job_id, 0, 1)
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
    assert names_of_events(rig.store, job_id)[-2:] == [EventName.PART_STARTED, EventName.JOB_CANCELLED]
    nothing_waits_or_runs(rig, job_id)


def test_a_part_that_succeeds_after_the_cancel_saves_the_job_only_if_all_have(rig: Rig) -> None:
    lacking, complete = split_job(rig, 2), split_job(rig, 2)
    (first,) = claim_parts(rig, lacking, 0)
    leases = claim_parts(rig, complete, 0, 1)
    for job_id in (lacking, complete):
        assert rig.store.cancel(job_id) is CancelOutcome.REQUESTED
    rig.store.commit(first, done(0))
    for number, lease in enumerate(leases):
        rig.store.commit(lease, done(number))
    assert rig.store.get(lacking).record.state is JobState.CANCELLED
    assert rig.store.get(lacking).record.result is None
    assert rig.store.get(complete).record.state is JobState.SUCCEEDED


@pytest.mark.parametrize("requeue", [Requeue("left"), Requeue("died", died=True)])
def test_a_part_that_comes_back_after_the_cancel_does_not_wait_again(rig: Rig, requeue: Requeue) -> None:
    job_id = split_job(rig, 2)
    leases = claim_parts(rig, job_id, 0, 1)
    rig.store.cancel(job_id)
    for lease in leases:
        assert rig.store.give_back(lease, requeue)
    assert rig.store.get(job_id).record.state is JobState.CANCELLED
    nothing_waits_or_runs(rig, job_id)


def test_a_part_that_its_worker_cancels_takes_its_job_with_it(rig: Rig) -> None:
    job_id = split_job(rig)
    first, second = claim_parts(rig, job_id, 0, 1)
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
    job_id = split_job(rig)
    with pytest.raises(JobNotFound):
        call(rig.store, part_id(job_id, 0))
    assert rig.store.get(job_id).record.parts == PartCounts(total=3, queued=3, running=0, succeeded=0)


# ---------------------------------------------------------------- removed


def _fail_beside_another(rig: Rig, job_id: str) -> None:
    _fail(rig, claim_parts(rig, job_id, 0, 1)[0])


def _succeed(rig: Rig, job_id: str) -> None:
    for number, lease in enumerate(claim_parts(rig, job_id, 0, 1, 2)):
        rig.store.commit(lease, done(number))


PURGED: dict[str, Callable[[Rig, str], object]] = {
    "queued": lambda rig, job_id: None,
    "running": lambda rig, job_id: claim_parts(rig, job_id, 0, 1),
    "asked to stop": lambda rig, job_id: (claim_parts(rig, job_id, 0), rig.store.cancel(job_id)),
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
    job_id = split_job(rig, 2)
    for number, lease in enumerate(claim_parts(rig, job_id, 0, 1)):
        rig.store.commit(lease, done(number))
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
