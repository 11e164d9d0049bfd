"""The truth tables of a job's life: each call from each state, what it answers and what the job is after it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Cancelled, JobQuery, Lease, NewJob, QueueDepth, Requeue, StoredJob
from tests.support.jobs import DEATHS_MAX, LONG_MS, Rig, claimed, failed, new_job, step, succeeded, told

# ---------------------------------------------------------------- the states


def _created(rig: Rig, job: NewJob | None = None) -> str:
    return rig.store.create(job or new_job()).record.id


def _given_back(rig: Rig, how: Requeue, times: int = 1, deadline_s: float | None = None) -> Lease:
    job_id = _created(rig, new_job(deadline_s=deadline_s))
    leases = []
    for _ in range(times):
        leases.append(claimed(rig.store, job_id, worker_id="w1"))
        rig.store.give_back(leases[-1], how)
    return leases[-1]


def _running(rig: Rig, *, alone: bool = False, lease_ttl_ms: int = LONG_MS, deadline_s: float | None = None) -> Lease:
    job_id = _created(rig, new_job(deadline_s=deadline_s))
    return claimed(rig.store, job_id, worker_id="w1", alone=alone, lease_ttl_ms=lease_ttl_ms)


def _after(rig: Rig, ms: int, lease: Lease) -> Lease:
    rig.pass_time(ms)
    return lease


def _then(lease: Lease, call: Callable[[Lease], object]) -> Lease:
    call(lease)
    return lease


def _on_its_last_life(rig: Rig, lease_ttl_ms: int = LONG_MS) -> Lease:
    job_id = _given_back(rig, DIED, DEATHS_MAX - 1).job_id
    return claimed(rig.store, job_id, worker_id="w1", lease_ttl_ms=lease_ttl_ms)


LEFT, DIED = Requeue("left"), Requeue("died", died=True)

STATES: dict[str, Callable[[Rig], Lease]] = {
    # Each with the newest lease that was given for the job, to a worker named w1.
    "queued": lambda rig: _given_back(rig, LEFT),
    "queued, late": lambda rig: _after(rig, 20, _given_back(rig, LEFT, deadline_s=0.02)),
    "waits for a retry": lambda rig: _given_back(rig, Requeue("error", retry=True, delay_ms=20)),
    "left to another": lambda rig: _given_back(rig, Requeue("error", retry=True, avoid_ms=20)),
    "runs alone": lambda rig: _given_back(rig, Requeue("no memory", alone=True)),
    "running": _running,
    "running, late": lambda rig: _after(rig, 20, _running(rig, deadline_s=0.02)),
    "running alone": lambda rig: _running(rig, alone=True),
    "on its last life": _on_its_last_life,
    "asked to stop": lambda rig: _then(_running(rig), lambda lease: rig.store.cancel(lease.job_id)),
    "lapsed": lambda rig: _after(rig, 1, _running(rig, lease_ttl_ms=1)),
    "lapsed, last life": lambda rig: _after(rig, 1, _on_its_last_life(rig, lease_ttl_ms=1)),
    "succeeded": lambda rig: _then(_running(rig), lambda lease: rig.store.commit(lease, succeeded(lease.job_id))),
    "failed": lambda rig: _then(_running(rig), lambda lease: rig.store.commit(lease, failed())),
    "cancelled": lambda rig: _then(_running(rig), lambda lease: rig.store.commit(lease, Cancelled())),
    "dead letter": lambda rig: _given_back(rig, DIED, DEATHS_MAX),
}

# ---------------------------------------------------------------- the calls


def _claim(worker_id: str, *, alone: bool) -> Callable[[JobStore, Lease], object]:
    return lambda store, lease: store.claim(lease.job_id, worker_id=worker_id, lease_ttl_ms=LONG_MS, alone=alone)


def _reconcile(*, spare_leases: bool) -> Callable[[JobStore, Lease], object]:
    return lambda store, _: store.reconcile(unclaimed_after_ms=LONG_MS, spare_leases=spare_leases)


CALLS: dict[str, Callable[[JobStore, Lease], object]] = {
    "claim by w1": _claim("w1", alone=False),
    "claim by w1, alone": _claim("w1", alone=True),
    "claim by w2, alone": _claim("w2", alone=True),
    "renew": lambda store, lease: store.renew(lease, lease_ttl_ms=LONG_MS).held,
    "append": lambda store, lease: store.append(lease, [step(1)]),
    "checkpoint": lambda store, lease: store.checkpoint(lease, name="a", step=1),
    "succeed": lambda store, lease: store.commit(lease, succeeded(lease.job_id)),
    "fail": lambda store, lease: store.commit(lease, failed()),
    "give back: left": lambda store, lease: store.give_back(lease, LEFT),
    "give back: died": lambda store, lease: store.give_back(lease, DIED),
    "cancel": lambda store, lease: store.cancel(lease.job_id),
    "reconcile": _reconcile(spare_leases=False),
    "reconcile, sparing": _reconcile(spare_leases=True),
    "forget dead letter": lambda store, lease: store.forget_dead_letter(lease.job_id),
}


NOTHING = {"-", "lost"}


def _shown(job: StoredJob) -> str:
    facts = [job.record.state.value]
    facts += [job.record.error.code] if job.record.error else []
    facts += ["to be cancelled"] if job.record.cancel_requested and not job.record.finished else []
    facts += ["alone"] if job.runs_alone and not job.record.finished else []
    facts += ["dead letter"] if job.record.dead_letter else []
    return ", ".join(facts)


def _rows(rig: Rig, call: str) -> Sequence[str]:
    rows = []
    for state, begin in STATES.items():
        lease = begin(rig)
        before, log = _shown(rig.store.get(lease.job_id)), rig.store.events(lease.job_id)
        answer = CALLS[call](rig.store, lease)
        after, more = _shown(rig.store.get(lease.job_id)), rig.store.events(lease.job_id)[len(log) :]
        events = " ".join(event.event.value for event in more)
        change = f" | {after}" if after != before else " |"
        if change != " |" or events or told(answer) not in NOTHING:
            rows.append(f"{state:17} | {told(answer):16}{change:37} | {events}".rstrip(" |"))
        rig.store.purge(lease.job_id)
    return rows


TABLES: dict[str, str] = {
    # From state | answer | what the job is then, if it changed | events. From the other states: nothing.
    "claim by w1": """
        queued            | won              | running                            | job_started
        queued, late      | -                | failed, timeout                    | job_failed
        runs alone        | must run alone
    """,
    "claim by w1, alone": """
        queued            | won              | running                            | job_started
        queued, late      | -                | failed, timeout                    | job_failed
        runs alone        | won              | running, alone                     | job_started
    """,
    "claim by w2, alone": """
        queued            | won              | running                            | job_started
        queued, late      | -                | failed, timeout                    | job_failed
        left to another   | won              | running                            | job_started
        runs alone        | won              | running, alone                     | job_started
    """,
    "renew": """
        running           | held
        running, late     | held
        running alone     | held
        on its last life  | held
        asked to stop     | held
        lapsed            | held
        lapsed, last life | held
    """,
    "append": """
        running           | held             |                                    | stage_progress
        running, late     | held             |                                    | stage_progress
        running alone     | held             |                                    | stage_progress
        on its last life  | held             |                                    | stage_progress
        asked to stop     | held             |                                    | stage_progress
        lapsed            | held             |                                    | stage_progress
        lapsed, last life | held             |                                    | stage_progress
    """,
    "checkpoint": """
        running           | held             |                                    | checkpoint
        running, late     | held             |                                    | checkpoint
        running alone     | held             |                                    | checkpoint
        on its last life  | held             |                                    | checkpoint
        asked to stop     | held             |                                    | checkpoint
        lapsed            | held             |                                    | checkpoint
        lapsed, last life | held             |                                    | checkpoint
    """,
    "succeed": """
        running           | held             | succeeded                          | job_finished
        running, late     | held             | succeeded                          | job_finished
        running alone     | held             | succeeded                          | job_finished
        on its last life  | held             | succeeded                          | job_finished
        asked to stop     | held             | succeeded                          | job_finished
        lapsed            | held             | succeeded                          | job_finished
        lapsed, last life | held             | succeeded                          | job_finished
    """,
    "fail": """
        running           | held             | failed, model_failed               | job_failed
        running, late     | held             | failed, model_failed               | job_failed
        running alone     | held             | failed, model_failed               | job_failed
        on its last life  | held             | failed, model_failed               | job_failed
        asked to stop     | held             | failed, model_failed               | job_failed
        lapsed            | held             | failed, model_failed               | job_failed
        lapsed, last life | held             | failed, model_failed               | job_failed
    """,
    "give back: left": """
        running           | held             | queued                             | job_requeued
        running, late     | held             | failed, timeout                    | job_failed
        running alone     | held             | queued                             | job_requeued
        on its last life  | held             | queued, alone                      | job_requeued
        asked to stop     | held             | cancelled                          | job_cancelled
        lapsed            | held             | queued                             | job_requeued
        lapsed, last life | held             | queued, alone                      | job_requeued
    """,
    "give back: died": """
        running           | held             | queued, alone                      | job_requeued
        running, late     | held             | failed, timeout                    | job_failed
        running alone     | held             | queued, alone                      | job_requeued
        on its last life  | held             | failed, worker_lost, dead letter   | job_failed
        asked to stop     | held             | cancelled                          | job_cancelled
        lapsed            | held             | queued, alone                      | job_requeued
        lapsed, last life | held             | failed, worker_lost, dead letter   | job_failed
    """,
    "cancel": """
        queued            | cancelled        | cancelled                          | job_cancelled
        queued, late      | cancelled        | cancelled                          | job_cancelled
        waits for a retry | cancelled        | cancelled                          | job_cancelled
        left to another   | cancelled        | cancelled                          | job_cancelled
        runs alone        | cancelled        | cancelled                          | job_cancelled
        running           | requested        | running, to be cancelled
        running, late     | requested        | running, to be cancelled
        running alone     | requested        | running, to be cancelled
        on its last life  | requested        | running, to be cancelled, alone
        asked to stop     | requested
        lapsed            | requested        | running, to be cancelled
        lapsed, last life | requested        | running, to be cancelled, alone
        succeeded         | already_finished
        failed            | already_finished
        cancelled         | already_finished
        dead letter       | already_finished
    """,
    "reconcile": """
        queued, late      | overdue          | failed, timeout                    | job_failed
        lapsed            | resend expired   | queued, alone                      | job_requeued
        lapsed, last life | expired          | failed, worker_lost, dead letter   | job_failed
    """,
    "reconcile, sparing": """
        queued, late      | overdue          | failed, timeout                    | job_failed
    """,
    "forget dead letter": """
        dead letter       | -                | failed, worker_lost
    """,
}


@pytest.mark.parametrize("call", TABLES)
def test_a_call_does_from_each_state_what_its_table_says(rig: Rig, call: str) -> None:
    expected = [line.strip() for line in TABLES[call].strip().splitlines()]
    assert list(_rows(rig, call)) == expected


def test_every_call_has_its_table() -> None:
    assert TABLES.keys() == CALLS.keys()


# ---------------------------------------------------------------- who may call

HOLDERS_CALLS = [call for call in CALLS if call.split(":")[0] in {
    "renew", "append", "checkpoint", "succeed", "fail", "give back"}]  # fmt: skip


@pytest.mark.parametrize("whose", ["older", "forged", "of no job"])
@pytest.mark.parametrize("call", HOLDERS_CALLS)
def test_whoever_does_not_hold_the_newest_lease_changes_nothing(rig: Rig, call: str, whose: str) -> None:
    older = _given_back(rig, LEFT)
    newest = claimed(rig.store, older.job_id)
    lease = {
        "older": older,
        "forged": replace(newest, token="forged"),
        "of no job": replace(newest, job_id="nobody"),
    }[whose]
    before, log = rig.store.get(newest.job_id), rig.store.events(newest.job_id)

    assert told(CALLS[call](rig.store, lease)) == "lost"

    assert rig.store.get(newest.job_id) == before
    assert rig.store.events(newest.job_id) == log
    assert rig.store.renew(newest, lease_ttl_ms=LONG_MS).held


@pytest.mark.parametrize("state", ["running", "running alone", "lapsed"])
def test_the_holder_learns_of_a_cancel_when_it_renews(rig: Rig, state: str) -> None:
    lease = STATES[state](rig)
    assert not rig.store.renew(lease, lease_ttl_ms=LONG_MS).cancel_requested
    rig.store.cancel(lease.job_id)
    assert rig.store.renew(lease, lease_ttl_ms=LONG_MS).cancel_requested


@pytest.mark.parametrize("state", STATES)
def test_a_purge_removes_a_job_in_any_state_and_twice_does_no_harm(rig: Rig, state: str) -> None:
    lease = STATES[state](rig)
    rig.store.purge(lease.job_id)
    rig.store.purge(lease.job_id)
    with pytest.raises(JobNotFound):
        rig.store.get(lease.job_id)
    assert not rig.store.page(JobQuery("alice")).jobs
    assert not rig.store.page(JobQuery("alice", dead_letters=True)).jobs
    assert rig.store.depth("cpu-shapes") == QueueDepth(0, 0)
    assert not rig.store.renew(lease, lease_ttl_ms=LONG_MS).held
    assert rig.store.claim(lease.job_id, worker_id="w", lease_ttl_ms=LONG_MS) is None
