"""Any order of calls leaves a job in one legal state with at most one end: a plain model, compared after each call."""

import uuid
from collections.abc import Callable, Iterator
from itertools import count
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

from omnirt_tasks.contract import CancelOutcome, JobState, Priority
from omnirt_tasks.errors import IdempotencyMismatch, JobNotFound
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.effects import AWAITED_MS
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import (
    Cancelled,
    Checkpoint,
    Claim,
    JobQuery,
    Lease,
    MustRunAlone,
    Outcome,
    QueueDepth,
    Requeue,
    WakeUp,
)
from omnirt_tasks.settings import Settings
from tests.support.job_model import OVER, Model, Whole, check_log, check_unit, check_whole
from tests.support.jobs import (
    DEATHS_MAX,
    LONG_MS,
    PICTURES_PER_PART,
    PROMOTE_AFTER_MS,
    ManualClock,
    ScriptClock,
    failed,
    idempotency,
    new_job,
    step,
    succeeded,
)

OUTCOMES: dict[JobState, Callable[[int], Outcome]] = {
    # By the number of the part.
    JobState.SUCCEEDED: lambda number: succeeded("job", first=number * PICTURES_PER_PART, count=PICTURES_PER_PART),
    JobState.FAILED: lambda _: failed(),
    JobState.CANCELLED: lambda _: Cancelled(),
}

LEASES_MS = (10, LONG_MS)
DEADLINES_S = (None, 0.03, 0.1)
WAITS_MS = (0, 20)
WORKERS = ("w1", "w2")
PARTS = (0, 0, 2, 3)


class StoreMachine(RuleBasedStateMachine):
    """Calls a store as gateways, workers and reconcilers do, in any order."""

    store: ClassVar[JobStore]
    clock: ClassVar[ManualClock | ScriptClock]

    def __init__(self) -> None:
        super().__init__()
        self.queue = f"cpu-{uuid.uuid4().hex}"
        self.owner = uuid.uuid4().hex
        self.jobs: dict[str, Model | Whole] = {}  # as their callers know them
        self.serials = count()
        self.now = 0

    jobs_index = st.integers(0, 2)
    units_index = st.integers(0, 8)
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

    @property
    def units(self) -> dict[str, Model]:
        """What is claimed and runs: jobs, and the parts of those that are split."""
        units: dict[str, Model] = {}
        for job_id, job in self.jobs.items():
            units |= job.parts if isinstance(job, Whole) else {job_id: job}
        return units

    def pick(self, index: int) -> tuple[str, Model | Whole]:
        ids = list(self.jobs)
        return ids[index % len(ids)], self.jobs[ids[index % len(ids)]]

    def pick_unit(self, index: int) -> tuple[str, Model]:
        units = self.units
        ids = list(units)
        return ids[index % len(ids)], units[ids[index % len(ids)]]

    def pick_lease(self, index: int, which: int) -> tuple[Lease, Model, bool]:
        """Any lease that was ever given for a job, or a forged one, and whether it is the one that counts."""
        job_id, model = self.pick_unit(index)
        if which < 0 or not model.leases:
            return Lease(job_id, model.attempt, "forged"), model, False
        lease = model.leases[-1 - which % len(model.leases)]
        return lease, model, model.state is JobState.RUNNING and lease is model.leases[-1]

    @initialize()
    def begin(self) -> None:
        self.create(None, None, 0, Priority.NORMAL)

    @rule(ms=st.sampled_from([1, 10, 50, PROMOTE_AFTER_MS]))
    def pass_time(self, ms: int) -> None:
        self.now += ms
        self.clock.pass_time(ms)

    @precondition(lambda self: len(self.jobs) < 3)
    @rule(
        deadline_s=st.sampled_from(DEADLINES_S),
        key=st.sampled_from([None, "a", "b"]),
        parts=st.sampled_from(PARTS),
        priority=st.sampled_from(list(Priority)),
    )
    def create(self, deadline_s: float | None, key: str | None, parts: int, priority: Priority) -> None:
        known = [job_id for job_id, model in self.jobs.items() if key and model.key == key]
        job = self.store.create(
            new_job(
                queue=self.queue,
                owner=self.owner,
                deadline_s=deadline_s,
                idempotency=idempotency(key) if key else None,
                priority=priority,
                parts=parts,
            )
        )
        if known:
            assert [job.record.id] == known
            return
        deadline_at = float("inf") if deadline_s is None else self.now + round(deadline_s * 1000)

        def unit(whole: Whole | None = None) -> Model:
            return Model(
                next(self.serials),
                whole,
                deadline_at,
                None if whole else key,
                priority=priority,
                ranked_at=self.now,
            )

        if parts:
            whole = Whole(key)
            whole.parts = {part_id: unit(whole) for part_id in job.parts}
            self.jobs[job.record.id] = whole
        else:
            self.jobs[job.record.id] = unit()

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
        index=units_index,
        worker_id=st.sampled_from(WORKERS),
        lease_ttl_ms=st.sampled_from(LEASES_MS),
        alone=st.booleans(),
    )
    def claim(self, index: int, worker_id: str, lease_ttl_ms: int, alone: bool) -> None:
        job_id, model = self.pick_unit(index)
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
            assert claim.job.priority is model.priority

    @rule(index=jobs_index)
    def claim_a_whole_job(self, index: int) -> None:
        job_id, job = self.pick(index)
        if isinstance(job, Whole):
            assert self.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS, alone=True) is None

    @rule(index=units_index)
    def ask_for_a_part(self, index: int) -> None:
        job_id, model = self.pick_unit(index)
        if model.whole is not None:
            self.store.purge(job_id)
            with pytest.raises(JobNotFound):
                self.store.cancel(job_id)

    @rule(index=units_index, which=lease_index, lease_ttl_ms=st.sampled_from(LEASES_MS))
    def renew(self, index: int, which: int, lease_ttl_ms: int) -> None:
        lease, model, held = self.pick_lease(index, which)
        renewal = self.store.renew(lease, lease_ttl_ms=lease_ttl_ms)
        assert renewal.held == held
        assert renewal.cancel_requested == (held and model.to_cancel)
        if held:
            model.lease_until = self.now + lease_ttl_ms

    @rule(index=units_index, which=lease_index)
    def append(self, index: int, which: int) -> None:
        lease, _, held = self.pick_lease(index, which)
        assert self.store.append(lease, [step(1), step(2)]) == held

    @rule(index=units_index, which=lease_index, number=st.integers(1, 9))
    def checkpoint(self, index: int, which: int, number: int) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.store.checkpoint(lease, name=f"{number}", step=number) == held
        if held:
            model.checkpoint = Checkpoint(model.attempt, f"{number}", number)

    @rule(index=units_index, which=lease_index, end=st.sampled_from(list(OUTCOMES)))
    def commit(self, index: int, which: int, end: JobState) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.store.commit(lease, OUTCOMES[end](_place_of(lease, model))) == held
        if held:
            model.end(end, "model_failed" if end is JobState.FAILED else None)

    @rule(index=units_index, which=lease_index, how=requeues)
    def give_back(self, index: int, which: int, how: Requeue) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.store.give_back(lease, how) == held
        if held:
            model.release(how, self.now)

    @rule(index=jobs_index)
    def cancel(self, index: int) -> None:
        job_id, model = self.pick(index)
        outcome = self.store.cancel(job_id)
        if model.state not in OVER:
            model.cancel()
            assert outcome is (CancelOutcome.CANCELLED if model.state in OVER else CancelOutcome.REQUESTED)
        else:
            assert outcome is CancelOutcome.ALREADY_FINISHED

    @rule(spare_leases=st.booleans())
    def reconcile(self, spare_leases: bool) -> None:
        to_send, expired, overdue = set[str](), set[str](), set[str]()
        units = self.units
        # In the order of their times, those that run first: what becomes of a part may end another.
        running = sorted(
            (model.lease_until, job_id) for job_id, model in units.items() if model.state is JobState.RUNNING
        )
        for job_id in [] if spare_leases else [job_id for _, job_id in running]:
            if units[job_id].act_on_time(self.now):
                expired.add(job_id)
                if units[job_id].state is JobState.QUEUED:
                    to_send.add(job_id)
        waits = sorted((model.deadline_at, job_id) for job_id, model in units.items() if model.state is JobState.QUEUED)
        for _, job_id in waits:
            if units[job_id].state is JobState.QUEUED and units[job_id].act_on_time(self.now):
                overdue.add(job_id)
        waiting = {job_id: model for job_id, model in units.items() if model.state is JobState.QUEUED}
        for job_id, model in waiting.items():
            if model.dropped or (model.delayed and model.not_before <= self.now):
                to_send.add(job_id)
                model.dropped = model.delayed = False
        for job_id, model in sorted(waiting.items(), key=lambda item: item[1].place):
            if model.promote(self.serials, self.now) and model.not_before <= self.now:
                to_send.add(job_id)
        found = self.store.reconcile(unclaimed_after_ms=LONG_MS, spare_leases=spare_leases)
        named = [wake_up for wake_up in found.resend if wake_up.queue == self.queue]
        assert len(named) == len(to_send)
        assert set(named) == {WakeUp(job_id, self.queue, units[job_id].priority) for job_id in to_send}
        assert expired == set(found.expired) & set(units)
        assert overdue == set(found.overdue) & set(units)

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
        units = self.units
        waiting = sorted(
            (job_id for job_id, model in units.items() if model.state is JobState.QUEUED),
            key=lambda job_id: units[job_id].place,
        )
        running = sum(model.state is JobState.RUNNING for model in units.values())
        depth = self.store.depth(self.queue)
        assert depth == QueueDepth(len(waiting), running)
        assert sum(depth.by_priority.values()) == len(waiting)
        for job_id, model in units.items():
            check_unit(self.store.get(job_id), model)
        for job_id, job in self.jobs.items():
            stored = self.store.get(job_id)
            places = [waiting.index(each) + 1 for each in stored.parts or (job_id,) if each in waiting]
            assert self.store.position(job_id) == min(places, default=None)
            if isinstance(job, Whole):
                check_whole(stored, job)
            check_log(self.store.events(job_id), job.state)
            if job.key:
                assert self.store.submitted(self.owner, idempotency(job.key)) == stored
        dead = [job_id for job_id, job in self.jobs.items() if job.dead_letter]
        listed = self.store.page(JobQuery(self.owner, dead_letters=True)).jobs
        assert [job.record.id for job in listed] == dead[::-1]
        assert [job.record.id for job in self.store.page(JobQuery(self.owner)).jobs] == list(self.jobs)[::-1]

    def teardown(self) -> None:
        for job_id in self.jobs:
            self.store.purge(job_id)


def _place_of(lease: Lease, model: Model) -> int:
    """Which part of its job the lease is for; 0 for a whole one."""
    return list(model.whole.parts).index(lease.job_id) if model.whole else 0


@pytest.fixture(params=["memory", "redis"])
def clocked(request: pytest.FixtureRequest, settings: Settings) -> Iterator[tuple[JobStore, ManualClock | ScriptClock]]:
    """A store of each kind, and its clock, which goes on only when told."""
    if request.param == "memory":
        clock = ManualClock()
        yield MemoryJobStore(deaths_max=DEATHS_MAX, promote_after_s=PROMOTE_AFTER_MS / 1000, now_ms=clock), clock
        return
    with connect(settings.redis_url) as client:
        store = RedisJobStore(
            client,
            prefix=settings.key_prefix,
            job_ttl_s=60,
            deaths_max=DEATHS_MAX,
            promote_after_s=PROMOTE_AFTER_MS / 1000,
        )
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
