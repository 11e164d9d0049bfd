"""Any order of calls leaves a job in one legal state with at most one end: a plain model, compared after each call."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from omnirt_tasks.contract import ALLOWED_MOVES, CancelOutcome, Event, EventName, JobState
from omnirt_tasks.errors import IdempotencyMismatch
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.effects import AWAITED_MS
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import (
    Cancelled,
    Checkpoint,
    Claim,
    JobQuery,
    JobStore,
    Lease,
    MustRunAlone,
    Outcome,
    QueueDepth,
    Requeue,
    StoredJob,
)
from omnirt_tasks.settings import Settings
from tests.support.jobs import (
    DEATHS_MAX,
    LONG_MS,
    ManualClock,
    ScriptClock,
    failed,
    idempotency,
    new_job,
    step,
    succeeded,
)

STATE_AFTER = {
    EventName.JOB_ENQUEUED: JobState.QUEUED,
    EventName.JOB_STARTED: JobState.RUNNING,
    EventName.JOB_REQUEUED: JobState.QUEUED,
    EventName.JOB_FINISHED: JobState.SUCCEEDED,
    EventName.JOB_FAILED: JobState.FAILED,
    EventName.JOB_CANCELLED: JobState.CANCELLED,
}

OUTCOMES: dict[JobState, Callable[[str], Outcome]] = {
    JobState.SUCCEEDED: succeeded,
    JobState.FAILED: lambda _: failed(),
    JobState.CANCELLED: lambda _: Cancelled(),
}

LEASES_MS = (10, LONG_MS)
DEADLINES_S = (None, 0.03, 0.1)
WAITS_MS = (0, 20)
WORKERS = ("w1", "w2")


@dataclass
class Model:
    """What a job ought to be; `leases` are all that it ever had, the newest last. Times are the machine's."""

    deadline_at: float = float("inf")
    key: str | None = None
    state: JobState = JobState.QUEUED
    error: str | None = None
    attempt: int = 0
    leases: list[Lease] = field(default_factory=list)
    to_cancel: bool = False
    # of the attempt in hand
    worker_id: str = ""
    alone: bool = False
    lease_until: int = 0
    # of the next attempt
    runs_alone: bool = False
    not_before: int = 0
    delayed: bool = False  # and no round has sent its message since
    dropped: bool = False  # its message was taken, and left, by the worker that is to leave it to another
    avoided: str = ""
    avoided_until: int = 0
    awaited: str = ""
    awaited_until: int = 0
    deaths: int = 0
    retries: int = 0
    checkpoint: Checkpoint | None = None
    dead_letter: bool = False

    def end(self, state: JobState, error: str | None = None) -> None:
        self.state, self.error = state, error

    def claimed(self, lease: Lease, *, worker_id: str, alone: bool, until: int) -> None:
        self.state = JobState.RUNNING
        self.attempt += 1
        self.leases.append(lease)
        self.worker_id, self.alone, self.lease_until = worker_id, alone, until

    def release(self, how: Requeue, now: int) -> None:
        """End the attempt without an outcome."""
        to_blame = how.died and self.alone
        self.deaths += to_blame
        self.retries += how.retry
        self.runs_alone |= how.died or how.alone
        if self.to_cancel:
            self.end(JobState.CANCELLED)
        elif self.deadline_at <= now:
            self.end(JobState.FAILED, "timeout")
        elif to_blame and self.deaths >= DEATHS_MAX:
            self.end(JobState.FAILED, "worker_lost")
            self.dead_letter = True
        else:
            self.state = JobState.QUEUED
            self.not_before, self.delayed, self.dropped = now + how.delay_ms, how.delay_ms > 0, False
            self.avoided, self.avoided_until = self.worker_id, now + how.delay_ms + how.avoid_ms
            self.awaited = ""

    def act_on_time(self, now: int) -> None:
        """What a round does with a job whose time has come; a claim does it with one that waits."""
        if self.state is JobState.RUNNING and self.lease_until <= now:
            self.release(Requeue("lease_expired", died=True), now)
        elif self.state is JobState.QUEUED and self.deadline_at <= now:
            self.end(JobState.FAILED, "timeout")


class StoreMachine(RuleBasedStateMachine):
    """Calls a store as gateways, workers and reconcilers do, in any order."""

    store: ClassVar[JobStore]
    clock: ClassVar[ManualClock | ScriptClock]

    def __init__(self) -> None:
        super().__init__()
        self.queue = f"cpu-{uuid.uuid4().hex}"
        self.owner = uuid.uuid4().hex
        self.jobs: dict[str, Model] = {}
        self.now = 0

    jobs_index = st.integers(0, 2)
    lease_index = st.integers(-1, 5)
    requeues = st.builds(
        Requeue,
        st.just("test"),
        died=st.booleans(),
        alone=st.booleans(),
        retry=st.booleans(),
        delay_ms=st.sampled_from(WAITS_MS),
        avoid_ms=st.sampled_from(WAITS_MS),
    )

    def pick(self, index: int) -> tuple[str, Model]:
        ids = list(self.jobs)
        return ids[index % len(ids)], self.jobs[ids[index % len(ids)]]

    def pick_lease(self, index: int, which: int) -> tuple[Lease, Model, bool]:
        """Any lease that was ever given for a job, or a forged one, and whether it is the one that counts."""
        job_id, model = self.pick(index)
        if which < 0 or not model.leases:
            return Lease(job_id, model.attempt, "forged"), model, False
        lease = model.leases[-1 - which % len(model.leases)]
        return lease, model, model.state is JobState.RUNNING and lease is model.leases[-1]

    @initialize()
    def begin(self) -> None:
        self.create(None, None)

    @rule(ms=st.sampled_from([1, 10, 50]))
    def pass_time(self, ms: int) -> None:
        self.now += ms
        self.clock.pass_time(ms)

    @precondition(lambda self: len(self.jobs) < 3)
    @rule(deadline_s=st.sampled_from(DEADLINES_S), key=st.sampled_from([None, "a", "b"]))
    def create(self, deadline_s: float | None, key: str | None) -> None:
        known = [job_id for job_id, model in self.jobs.items() if key and model.key == key]
        job = self.store.create(
            new_job(
                queue=self.queue,
                owner=self.owner,
                deadline_s=deadline_s,
                idempotency=idempotency(key) if key else None,
            )
        )
        if known:
            assert [job.record.id] == known
            return
        deadline_at = float("inf") if deadline_s is None else self.now + round(deadline_s * 1000)
        self.jobs[job.record.id] = Model(deadline_at, key)

    @rule(index=jobs_index)
    def create_again(self, index: int) -> None:
        job_id, model = self.pick(index)
        again = self.store.create(new_job(job_id, queue=self.queue, owner=self.owner))
        assert again.record.state is model.state

    @rule(key=st.sampled_from(["a", "b"]))
    def create_with_another_body(self, key: str) -> None:
        if any(model.key == key for model in self.jobs.values()):
            with pytest.raises(IdempotencyMismatch):
                self.store.create(
                    new_job(queue=self.queue, owner=self.owner, idempotency=idempotency(key, body="another"))
                )

    @rule(
        index=jobs_index,
        worker_id=st.sampled_from(WORKERS),
        lease_ttl_ms=st.sampled_from(LEASES_MS),
        alone=st.booleans(),
    )
    def claim(self, index: int, worker_id: str, lease_ttl_ms: int, alone: bool) -> None:
        job_id, model = self.pick(index)
        if model.state is JobState.QUEUED:
            model.act_on_time(self.now)
        claim = self.store.claim(job_id, worker_id=worker_id, lease_ttl_ms=lease_ttl_ms, alone=alone)
        if model.state is not JobState.QUEUED or self.now < model.not_before:
            assert claim is None
        elif worker_id == model.avoided and self.now < model.avoided_until:
            assert claim is None
            model.dropped = True
        elif model.runs_alone and not alone:
            elsewhere = model.awaited not in {"", worker_id} and self.now < model.awaited_until
            assert claim == MustRunAlone(awaited=elsewhere)
            if not elsewhere:
                model.awaited, model.awaited_until = worker_id, self.now + AWAITED_MS
        else:
            assert isinstance(claim, Claim)
            model.claimed(claim.lease, worker_id=worker_id, alone=alone, until=self.now + lease_ttl_ms)
            assert claim.lease.attempt == model.attempt
            assert claim.remaining_ms in {None, model.deadline_at - self.now}
            assert claim.job.checkpoint == model.checkpoint

    @rule(index=jobs_index, which=lease_index, lease_ttl_ms=st.sampled_from(LEASES_MS))
    def renew(self, index: int, which: int, lease_ttl_ms: int) -> None:
        lease, model, held = self.pick_lease(index, which)
        renewal = self.store.renew(lease, lease_ttl_ms=lease_ttl_ms)
        assert renewal.held == held
        assert renewal.cancel_requested == (held and model.to_cancel)
        if held:
            model.lease_until = self.now + lease_ttl_ms

    @rule(index=jobs_index, which=lease_index)
    def append(self, index: int, which: int) -> None:
        lease, _, held = self.pick_lease(index, which)
        assert self.store.append(lease, [step(1), step(2)]) == held

    @rule(index=jobs_index, which=lease_index, number=st.integers(1, 9))
    def checkpoint(self, index: int, which: int, number: int) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.store.checkpoint(lease, name=f"{number}", step=number) == held
        if held:
            model.checkpoint = Checkpoint(model.attempt, f"{number}", number)

    @rule(index=jobs_index, which=lease_index, end=st.sampled_from(list(OUTCOMES)))
    def commit(self, index: int, which: int, end: JobState) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.store.commit(lease, OUTCOMES[end](lease.job_id)) == held
        if held:
            model.end(end, "model_failed" if end is JobState.FAILED else None)

    @rule(index=jobs_index, which=lease_index, how=requeues)
    def give_back(self, index: int, which: int, how: Requeue) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.store.give_back(lease, how) == held
        if held:
            model.release(how, self.now)

    @rule(index=jobs_index)
    def cancel(self, index: int) -> None:
        job_id, model = self.pick(index)
        outcome = self.store.cancel(job_id)
        if model.state is JobState.QUEUED:
            model.end(JobState.CANCELLED)
            assert outcome is CancelOutcome.CANCELLED
        elif model.state is JobState.RUNNING:
            model.to_cancel = True
            assert outcome is CancelOutcome.REQUESTED
        else:
            assert outcome is CancelOutcome.ALREADY_FINISHED

    @rule(spare_leases=st.booleans())
    def reconcile(self, spare_leases: bool) -> None:
        to_send, expired, overdue = set[str](), set[str](), set[str]()
        for job_id, model in self.jobs.items():
            before = model.state
            if before is JobState.RUNNING and not spare_leases and model.lease_until <= self.now:
                expired.add(job_id)
            elif before is JobState.QUEUED and model.deadline_at <= self.now:
                overdue.add(job_id)
            elif before is JobState.QUEUED and (model.dropped or (model.delayed and model.not_before <= self.now)):
                to_send.add(job_id)
                model.dropped = model.delayed = False
        for job_id in expired | overdue:
            self.jobs[job_id].act_on_time(self.now)
            if self.jobs[job_id].state is JobState.QUEUED:
                to_send.add(job_id)
        found = self.store.reconcile(unclaimed_after_ms=LONG_MS, spare_leases=spare_leases)
        assert sorted(job_id for job_id, queue in found.resend if queue == self.queue) == sorted(to_send)
        assert expired == set(found.expired) & set(self.jobs)
        assert overdue == set(found.overdue) & set(self.jobs)

    @rule(index=jobs_index)
    def forget_dead_letter(self, index: int) -> None:
        job_id, model = self.pick(index)
        self.store.forget_dead_letter(job_id)
        model.dead_letter = False

    @precondition(lambda self: len(self.jobs) > 1)
    @rule(index=jobs_index)
    def purge(self, index: int) -> None:
        job_id, _ = self.pick(index)
        self.store.purge(job_id)
        del self.jobs[job_id]

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        waiting = [job_id for job_id, model in self.jobs.items() if model.state is JobState.QUEUED]
        running = sum(model.state is JobState.RUNNING for model in self.jobs.values())
        assert self.store.depth(self.queue) == QueueDepth(len(waiting), running)
        for job_id, model in self.jobs.items():
            job = self.store.get(job_id)
            _check_job(job, model)
            place = waiting.index(job_id) + 1 if job_id in waiting else None
            assert self.store.position(job_id) == place
            _check_log(self.store.events(job_id), model.state)
            if model.key:
                assert self.store.submitted(self.owner, idempotency(model.key)) == job
        dead = [job_id for job_id, model in self.jobs.items() if model.dead_letter]
        listed = self.store.page(JobQuery(self.owner, dead_letters=True)).jobs
        assert [job.record.id for job in listed] == dead[::-1]

    def teardown(self) -> None:
        for job_id in self.jobs:
            self.store.purge(job_id)


def _check_job(job: StoredJob, model: Model) -> None:
    record = job.record
    assert (record.state, record.attempt) == (model.state, model.attempt)
    assert (record.error.code if record.error else None) == model.error
    assert (record.result is not None) == (record.state is JobState.SUCCEEDED)
    assert (job.runs_alone, job.deaths, job.retries) == (model.runs_alone, model.deaths, model.retries)
    assert (record.dead_letter, job.checkpoint) == (model.dead_letter, model.checkpoint)


def _check_log(log: Sequence[Event], state: JobState) -> None:
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    entered = [STATE_AFTER[event.event] for event in log if event.event in STATE_AFTER]
    assert all(after in ALLOWED_MOVES[before] for before, after in pairwise(entered))
    assert entered[-1] is state
    assert sum(event.terminal for event in log) <= 1
    assert not any(event.terminal for event in log[:-1])


@pytest.fixture(params=["memory", "redis"])
def clocked(request: pytest.FixtureRequest, settings: Settings) -> Iterator[tuple[JobStore, ManualClock | ScriptClock]]:
    """A store of each kind, and its clock, which goes on only when told."""
    if request.param == "memory":
        clock = ManualClock()
        yield MemoryJobStore(deaths_max=DEATHS_MAX, now_ms=clock), clock
        return
    with connect(settings.redis_url) as client:
        store = RedisJobStore(client, prefix=settings.key_prefix, job_ttl_s=60, deaths_max=DEATHS_MAX)
        yield store, ScriptClock(store, client, prefix=settings.key_prefix)


def test_any_order_of_calls_keeps_the_rules_of_a_jobs_life(
    clocked: tuple[JobStore, ManualClock | ScriptClock],
) -> None:
    checks = hypothesis.settings(
        max_examples=100,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
    )
    store, clock = clocked
    machine = type("StoreMachineOfKind", (StoreMachine,), {"store": store, "clock": clock})
    run_state_machine_as_test(machine, settings=checks)
