"""What becomes of a job whose attempt ends without an outcome: blame, dead letters, retries, deadlines, checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from omnirt_tasks.contract import CancelOutcome, Event, EventName, JobState
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.effects import AWAITED_MS
from omnirt_tasks.jobs.values import (
    Checkpoint,
    Claim,
    JobPage,
    JobQuery,
    Lease,
    MustRunAlone,
    Reconciled,
    Requeue,
    StoredJob,
    WakeUp,
)
from tests.support.jobs import DEATHS_MAX, LONG_MS, Rig, claimed, failed, new_job, succeeded, won

DEADLINE_MS = 20
EXPIRED: Requeue | None = None
"""An attempt that ends because its lease did."""


def _end(rig: Rig, lease: Lease, how: Requeue | None) -> Reconciled:
    """End the attempt; its lease expires where nothing is given back."""
    if how is not None:
        assert rig.store.give_back(lease, how)
        return Reconciled()
    assert rig.store.renew(lease, lease_ttl_ms=1).held
    rig.pass_time(2)
    return rig.store.reconcile(unclaimed_after_ms=LONG_MS)


# ---------------------------------------------------------------- how an attempt ends: the truth table


@dataclass(frozen=True)
class Ending:
    """What is left of a job whose first attempt ended without an outcome."""

    state: JobState = JobState.QUEUED
    runs_alone: bool = False
    deaths: int = 0
    retries: int = 0
    dead_letter: bool = False
    error: str | None = None
    told: EventName = EventName.JOB_REQUEUED


WAITS = Ending()
CANCELLED = Ending(JobState.CANCELLED, told=EventName.JOB_CANCELLED)
TIMED_OUT = Ending(JobState.FAILED, error="timeout", told=EventName.JOB_FAILED)

ENDINGS: Mapping[str, tuple[Requeue | None, bool, Ending]] = {
    # (how it ends, whether it ran alone, what is left)
    "left": (Requeue("leaving"), False, WAITS),
    "left, alone": (Requeue("leaving"), True, WAITS),
    "died": (Requeue("died", died=True), False, Ending(runs_alone=True)),
    "died, alone": (Requeue("died", died=True), True, Ending(runs_alone=True, deaths=1)),
    "expired": (EXPIRED, False, Ending(runs_alone=True)),
    "expired, alone": (EXPIRED, True, Ending(runs_alone=True, deaths=1)),
    "needs room": (Requeue("out of memory", alone=True), False, Ending(runs_alone=True)),
    "retried": (Requeue("error", retry=True), False, Ending(retries=1)),
    "retried, alone": (Requeue("error", retry=True), True, Ending(retries=1)),
}


def _left(job: StoredJob, told: Event) -> Ending:
    error = job.record.error.code if job.record.error else None
    return Ending(job.record.state, job.runs_alone, job.deaths, job.retries, job.record.dead_letter, error, told.event)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_attempt_that_ends_without_an_outcome_leaves_the_job_so(rig: Rig, ending: str) -> None:
    how, alone, expected = ENDINGS[ending]
    job_id = rig.store.create(new_job()).record.id
    found = _end(rig, claimed(rig.store, job_id, alone=alone), how)
    assert _left(rig.store.get(job_id), rig.store.events(job_id)[-1]) == expected
    if how is EXPIRED:
        assert (list(found.expired), list(found.resend)) == ([job_id], [WakeUp(job_id, "cpu-shapes")])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_job_whose_cancel_was_asked_for_is_cancelled_however_its_attempt_ends(rig: Rig, ending: str) -> None:
    how, alone, _ = ENDINGS[ending]
    job_id = rig.store.create(new_job(deadline_s=DEADLINE_MS / 1000)).record.id
    lease = claimed(rig.store, job_id, alone=alone)
    assert rig.store.cancel(job_id) is CancelOutcome.REQUESTED
    rig.pass_time(DEADLINE_MS)
    found = _end(rig, lease, how)
    job = rig.store.get(job_id)
    assert (job.record.state, job.record.error) == (JobState.CANCELLED, None)
    assert not found.resend


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_job_whose_deadline_has_passed_fails_however_its_attempt_ends(rig: Rig, ending: str) -> None:
    how, alone, _ = ENDINGS[ending]
    job_id = rig.store.create(new_job(deadline_s=DEADLINE_MS / 1000)).record.id
    lease = claimed(rig.store, job_id, alone=alone)
    rig.pass_time(DEADLINE_MS)
    found = _end(rig, lease, how)
    job = rig.store.get(job_id)
    assert job.record.error is not None
    assert (job.record.state, job.record.error.code, job.record.dead_letter) == (JobState.FAILED, "timeout", False)
    assert not found.resend


def test_a_time_has_come_in_its_very_millisecond_and_not_before(rig: Rig) -> None:
    lapsing = rig.store.create(new_job()).record.id
    late = rig.store.create(new_job(deadline_s=0.01)).record.id
    claimed(rig.store, lapsing, lease_ttl_ms=10)
    rig.pass_time(9)
    assert rig.store.reconcile(unclaimed_after_ms=LONG_MS) == Reconciled([], [], [])
    rig.pass_time(1)
    found = rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    assert (list(found.expired), list(found.overdue)) == ([lapsing], [late])


# ---------------------------------------------------------------- blame


def test_a_job_that_runs_alone_is_claimed_only_by_who_gives_it_a_device(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id, alone=False), Requeue("died", died=True))
    log = rig.store.events(job_id)

    for worker_id in ("w1", "w2"):
        assert isinstance(rig.store.claim(job_id, worker_id=worker_id, lease_ttl_ms=LONG_MS), MustRunAlone)
    assert rig.store.events(job_id) == log  # it is there for whoever comes first
    claim = won(rig.store.claim(job_id, worker_id="w2", lease_ttl_ms=LONG_MS, alone=True))

    assert claim.job.runs_alone
    assert rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS) is None


def test_one_worker_at_a_time_waits_to_give_a_job_its_device(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id, alone=False), Requeue("died", died=True))

    def ask(worker_id: str) -> Claim | MustRunAlone | None:
        return rig.store.claim(job_id, worker_id=worker_id, lease_ttl_ms=LONG_MS)

    assert ask("w1") == MustRunAlone(awaited=False)
    assert ask("w2") == MustRunAlone(awaited=True)
    rig.pass_time(AWAITED_MS - 1)
    assert ask("w1") == MustRunAlone(awaited=False), "who asks again goes on waiting"
    rig.pass_time(AWAITED_MS - 1)
    assert ask("w2") == MustRunAlone(awaited=True)
    rig.pass_time(1)
    assert ask("w2") == MustRunAlone(awaited=False), "who asks no more waits no more"
    rig.store.give_back(claimed(rig.store, job_id), Requeue("leaving"))
    assert ask("w1") == MustRunAlone(awaited=False), "of an attempt that is over nothing is left"


def test_deaths_in_company_count_for_nothing(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id, alone=False), Requeue("died", died=True))
    for _ in range(DEATHS_MAX + 1):  # whoever claims it alone and only leaves adds nothing either
        rig.store.give_back(claimed(rig.store, job_id), Requeue("leaving"))
    rig.store.commit(claimed(rig.store, job_id), succeeded(job_id))
    job = rig.store.get(job_id)
    assert (job.record.state, job.deaths) == (JobState.SUCCEEDED, 0)


def test_a_death_in_company_counts_for_nothing_after_an_attempt_alone(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id, alone=True), Requeue("leaving"))
    rig.store.give_back(claimed(rig.store, job_id, alone=False), Requeue("died", died=True))
    assert rig.store.get(job_id).deaths == 0


@pytest.mark.parametrize("last", [Requeue("died", died=True), EXPIRED], ids=["given back", "expired"])
def test_a_job_that_died_alone_too_often_is_a_dead_letter(rig: Rig, last: Requeue | None) -> None:
    job_id = rig.store.create(new_job()).record.id
    for _ in range(DEATHS_MAX - 1):
        rig.store.give_back(claimed(rig.store, job_id), Requeue("died", died=True))
    found = _end(rig, claimed(rig.store, job_id), last)
    assert not found.resend
    assert list(found.expired) == ([job_id] if last is EXPIRED else [])

    job, told = rig.store.get(job_id), rig.store.events(job_id)[-1]
    assert (job.record.state, job.record.dead_letter, job.deaths) == (JobState.FAILED, True, DEATHS_MAX)
    assert job.record.error is not None
    assert job.record.error.code == "worker_lost"
    assert job.record.error.retryable
    assert f"died {DEATHS_MAX} times" in job.record.error.message
    assert (told.event, told.data) == (EventName.JOB_FAILED, {"error": job.record.error.model_dump(mode="json")})
    assert job.record.finished_at_ms is not None
    assert job.record.expires_at_ms == job.record.finished_at_ms + 50
    assert rig.store.claim(job_id, worker_id="w2", lease_ttl_ms=LONG_MS, alone=True) is None


# ---------------------------------------------------------------- dead letters


def _dead_letter(rig: Rig, owner: str = "alice") -> str:
    job_id = rig.store.create(new_job(owner=owner)).record.id
    for _ in range(DEATHS_MAX):
        rig.store.give_back(claimed(rig.store, job_id), Requeue("died", died=True))
    assert rig.store.get(job_id).record.dead_letter
    return job_id


def _ids(page: JobPage) -> list[str]:
    return [job.record.id for job in page.jobs]


def test_dead_letters_are_listed_apart_newest_first_for_their_owner_alone(rig: Rig) -> None:
    first, second, third = (_dead_letter(rig) for _ in range(3))
    other = rig.store.create(new_job()).record.id
    rig.store.commit(claimed(rig.store, other), failed())
    _dead_letter(rig, owner="bob")

    page = rig.store.page(JobQuery("alice", limit=2, dead_letters=True))
    assert _ids(page) == [third, second]
    assert all(job.record.dead_letter for job in page.jobs)
    last = rig.store.page(JobQuery("alice", limit=2, cursor=page.next_cursor, dead_letters=True))
    assert (_ids(last), last.next_cursor) == ([first], None)
    assert _ids(rig.store.page(JobQuery("alice"))) == [other, third, second, first]
    assert not rig.store.page(JobQuery("alice", model="sdxl", dead_letters=True)).jobs


@pytest.mark.parametrize("times", [1, 2])
def test_a_dead_letter_that_somebody_looked_at_is_a_failed_job_as_any_other(rig: Rig, times: int) -> None:
    job_id = _dead_letter(rig)
    for _ in range(times):
        rig.store.forget_dead_letter(job_id)
    assert not rig.store.page(JobQuery("alice", dead_letters=True)).jobs
    record = rig.store.get(job_id).record
    assert (record.state, record.dead_letter) == (JobState.FAILED, False)
    assert _ids(rig.store.page(JobQuery("alice"))) == [job_id]


def test_a_purged_dead_letter_is_listed_no_more(rig: Rig) -> None:
    rig.store.purge(_dead_letter(rig))
    assert not rig.store.page(JobQuery("alice", dead_letters=True)).jobs


def test_a_dead_letter_that_never_was_is_an_unknown_job(rig: Rig) -> None:
    with pytest.raises(JobNotFound, match="nobody"):
        rig.store.forget_dead_letter("nobody")


# ---------------------------------------------------------------- retries


def test_a_job_waits_for_its_retry_and_is_then_named_once(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    later = rig.store.create(new_job()).record.id
    delay_ms = 20
    rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, delay_ms=delay_ms))

    assert rig.store.claim(job_id, worker_id="w2", lease_ttl_ms=LONG_MS, alone=True) is None
    assert (rig.store.position(job_id), rig.store.position(later)) == (1, 2)  # it keeps its place
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend
    rig.pass_time(delay_ms)
    assert list(rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend) == [WakeUp(job_id, "cpu-shapes")]
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend
    rig.pass_time(5)
    assert WakeUp(job_id, "cpu-shapes") in rig.store.reconcile(unclaimed_after_ms=5).resend  # that message was lost too
    claim = won(rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS))
    assert (claim.job.retries, claim.job.record.attempt) == (1, 2)


def test_a_job_that_waits_for_its_retry_is_not_unclaimed(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, delay_ms=LONG_MS))
    rig.pass_time(3)
    assert not rig.store.reconcile(unclaimed_after_ms=1).resend


def test_a_retry_that_is_due_is_claimed_before_a_round_has_seen_it(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, delay_ms=2))
    rig.pass_time(3)
    claimed(rig.store, job_id)
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend


@pytest.mark.parametrize("delay_ms", [0, 20])
def test_the_worker_that_failed_leaves_the_retry_to_another_for_a_while(rig: Rig, delay_ms: int) -> None:
    job_id = rig.store.create(new_job()).record.id
    avoid_ms = 50
    requeue = Requeue("error", retry=True, delay_ms=delay_ms, avoid_ms=avoid_ms)
    rig.store.give_back(claimed(rig.store, job_id, worker_id="w1"), requeue)
    rig.pass_time(delay_ms)
    rig.store.reconcile(unclaimed_after_ms=LONG_MS)

    assert rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS) is None
    # Its message went with that claim, so the next round sends it again.
    assert list(rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend) == [WakeUp(job_id, "cpu-shapes")]
    lease = claimed(rig.store, job_id, worker_id="w2")
    rig.store.give_back(lease, Requeue("leaving"))
    claimed(rig.store, job_id, worker_id="w1")  # it has run elsewhere: nothing is avoided any more


def test_a_worker_leaves_its_retry_to_another_from_when_it_is_due(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, delay_ms=20, avoid_ms=10))
    rig.pass_time(29)
    assert rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS) is None
    rig.pass_time(1)
    claimed(rig.store, job_id, worker_id="w1")


def test_a_worker_takes_its_own_retry_when_no_other_did(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, avoid_ms=20))
    assert rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS) is None
    rig.pass_time(20)
    claimed(rig.store, job_id, worker_id="w1")


def test_a_job_that_waits_for_its_retry_can_be_cancelled_or_purged(rig: Rig) -> None:
    for end in (rig.store.cancel, rig.store.purge):
        job_id = rig.store.create(new_job()).record.id
        rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, delay_ms=1))
        end(job_id)
        rig.pass_time(2)
        assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend


# ---------------------------------------------------------------- deadlines


def _timed_out(job: StoredJob) -> bool:
    return job.record.state is JobState.FAILED and job.record.error is not None and job.record.error.code == "timeout"


def test_a_deadline_counts_from_the_acceptance_and_is_told(rig: Rig) -> None:
    job = rig.store.create(new_job(deadline_s=1.5))
    assert job.record.deadline_at_ms == job.record.enqueued_at_ms + 1_500
    assert rig.store.get(job.record.id) == job
    rig.pass_time(10)
    claim = won(rig.store.claim(job.record.id, worker_id="w", lease_ttl_ms=LONG_MS))
    assert claim.remaining_ms == 1_490
    assert claim.job.record.deadline_at_ms == job.record.deadline_at_ms


def test_a_job_without_a_deadline_has_no_end_of_time(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    claim = won(rig.store.claim(job_id, worker_id="w", lease_ttl_ms=LONG_MS))
    assert (claim.remaining_ms, claim.job.record.deadline_at_ms) == (None, None)


def test_a_job_that_waits_past_its_deadline_fails_in_the_next_round(rig: Rig) -> None:
    first = rig.store.create(new_job(deadline_s=DEADLINE_MS / 1000)).record.id
    other = rig.store.create(new_job(deadline_s=3_600)).record.id
    rig.pass_time(DEADLINE_MS)
    found = rig.store.reconcile(unclaimed_after_ms=1)
    assert (list(found.overdue), list(found.expired)) == ([first], [])
    assert list(found.resend) == [WakeUp(other, "cpu-shapes")]
    assert _timed_out(rig.store.get(first))
    assert rig.store.events(first)[-1].event is EventName.JOB_FAILED
    assert rig.store.get(other).record.state is JobState.QUEUED
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).overdue


def test_a_job_that_waits_for_a_retry_past_its_deadline_fails(rig: Rig) -> None:
    job_id = rig.store.create(new_job(deadline_s=DEADLINE_MS / 1000)).record.id
    rig.store.give_back(claimed(rig.store, job_id), Requeue("error", retry=True, delay_ms=LONG_MS))
    rig.pass_time(DEADLINE_MS)
    found = rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    assert (list(found.overdue), list(found.resend)) == ([job_id], [])
    assert _timed_out(rig.store.get(job_id))


def test_a_claim_past_the_deadline_fails_the_job(rig: Rig) -> None:
    job_id = rig.store.create(new_job(deadline_s=DEADLINE_MS / 1000)).record.id
    rig.pass_time(DEADLINE_MS)
    assert rig.store.claim(job_id, worker_id="w", lease_ttl_ms=LONG_MS) is None
    assert _timed_out(rig.store.get(job_id))


def test_a_job_that_runs_past_its_deadline_is_its_holders_to_end(rig: Rig) -> None:
    job_id = rig.store.create(new_job(deadline_s=DEADLINE_MS / 1000)).record.id
    lease = claimed(rig.store, job_id)
    rig.pass_time(DEADLINE_MS)
    found = rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    assert found == Reconciled([], [], [])
    assert rig.store.commit(lease, succeeded(job_id))  # it was done all the same
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).overdue


# ---------------------------------------------------------------- sparing


def test_a_round_that_spares_leases_lets_none_expire_and_does_the_rest(rig: Rig) -> None:
    lapsed = rig.store.create(new_job()).record.id
    lease = claimed(rig.store, lapsed, lease_ttl_ms=1)
    late = rig.store.create(new_job(deadline_s=0.001)).record.id
    unclaimed = rig.store.create(new_job()).record.id
    rig.pass_time(2)

    found = rig.store.reconcile(unclaimed_after_ms=1, spare_leases=True)

    assert (list(found.expired), list(found.overdue)) == ([], [late])
    assert list(found.resend) == [WakeUp(unclaimed, "cpu-shapes")]
    assert rig.store.renew(lease, lease_ttl_ms=1).held
    rig.pass_time(2)
    assert list(rig.store.reconcile(unclaimed_after_ms=LONG_MS).expired) == [lapsed]


# ---------------------------------------------------------------- checkpoints


def test_the_next_attempt_is_told_where_it_can_go_on(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    first = claimed(rig.store, job_id)
    assert rig.store.get(job_id).checkpoint is None
    for number in (5, 10):
        assert rig.store.checkpoint(first, name=f"{number}.safetensors", step=number)
    told = rig.store.events(job_id)[-1]
    assert (told.event, told.data) == (EventName.CHECKPOINT, {"step": 10})
    rig.store.give_back(first, Requeue("died", died=True))

    claim = won(rig.store.claim(job_id, worker_id="w2", lease_ttl_ms=LONG_MS, alone=True))

    assert claim.job.checkpoint == Checkpoint(attempt=1, name="10.safetensors", step=10)
    assert rig.store.checkpoint(claim.lease, name="15.safetensors", step=15)
    assert rig.store.get(job_id).checkpoint == Checkpoint(attempt=2, name="15.safetensors", step=15)
    assert not rig.store.checkpoint(first, name="late.safetensors", step=20)
    assert rig.store.get(job_id).checkpoint == Checkpoint(attempt=2, name="15.safetensors", step=15)
