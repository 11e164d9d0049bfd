"""Any order of calls leaves a job in one legal state with at most one end: a plain model, compared after each call."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import hypothesis
import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from omnirt_tasks.contract import ALLOWED_MOVES, CancelOutcome, Event, EventName, JobState
from omnirt_tasks.jobs.store import Cancelled, Lease, Outcome, QueueDepth
from tests.support.jobs import LONG_MS, Rig, failed, new_job, step, succeeded

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


@dataclass
class Model:
    """What a job ought to be; `leases` are all that were ever given for it, the newest last."""

    state: JobState = JobState.QUEUED
    attempt: int = 0
    lapsed: bool = False
    to_cancel: bool = False
    leases: list[Lease] = field(default_factory=list)

    def release(self) -> bool:
        """End the attempt without an outcome; whether the job waits again."""
        self.state = JobState.CANCELLED if self.to_cancel else JobState.QUEUED
        return not self.to_cancel


class StoreMachine(RuleBasedStateMachine):
    """Calls a store as gateways, workers and reconcilers do, in any order."""

    rig: ClassVar[Rig]

    def __init__(self) -> None:
        super().__init__()
        self.queue = f"cpu-{uuid.uuid4().hex}"
        self.owner = uuid.uuid4().hex
        self.jobs: dict[str, Model] = {}

    jobs_index = st.integers(0, 2)
    lease_index = st.integers(-1, 5)

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
        self.create()

    @precondition(lambda self: len(self.jobs) < 3)
    @rule()
    def create(self) -> None:
        job = self.rig.store.create(new_job(queue=self.queue, owner=self.owner))
        self.jobs[job.record.id] = Model()

    @rule(index=jobs_index)
    def create_again(self, index: int) -> None:
        job_id, model = self.pick(index)
        again = self.rig.store.create(new_job(job_id, queue=self.queue, owner=self.owner))
        assert again.record.state is model.state

    @rule(index=jobs_index, lapse=st.booleans())
    def claim(self, index: int, lapse: bool) -> None:
        job_id, model = self.pick(index)
        if model.state is JobState.RUNNING and model.lapsed:
            model.release()
        claim = self.rig.store.claim(job_id, worker_id="w", lease_ttl_ms=1 if lapse else LONG_MS)
        assert (claim is not None) == (model.state is JobState.QUEUED)
        if claim is not None:
            model.state, model.attempt, model.lapsed = JobState.RUNNING, model.attempt + 1, lapse
            model.leases.append(claim.lease)
            assert claim.lease.attempt == model.attempt
            self.rig.pass_time(2 if lapse else 0)

    @rule(index=jobs_index, which=lease_index, lapse=st.booleans())
    def renew(self, index: int, which: int, lapse: bool) -> None:
        lease, model, held = self.pick_lease(index, which)
        renewal = self.rig.store.renew(lease, lease_ttl_ms=1 if lapse else LONG_MS)
        assert renewal.held == held
        assert renewal.cancel_requested == (held and model.to_cancel)
        if held:
            model.lapsed = lapse
            self.rig.pass_time(2 if lapse else 0)

    @rule(index=jobs_index, which=lease_index)
    def append(self, index: int, which: int) -> None:
        lease, _, held = self.pick_lease(index, which)
        assert self.rig.store.append(lease, [step(1), step(2)]) == held

    @rule(index=jobs_index, which=lease_index, end=st.sampled_from(list(OUTCOMES)))
    def commit(self, index: int, which: int, end: JobState) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.rig.store.commit(lease, OUTCOMES[end](lease.job_id)) == held
        if held:
            model.state = end

    @rule(index=jobs_index, which=lease_index)
    def give_back(self, index: int, which: int) -> None:
        lease, model, held = self.pick_lease(index, which)
        assert self.rig.store.give_back(lease, reason="test") == held
        if held:
            model.release()

    @rule(index=jobs_index)
    def cancel(self, index: int) -> None:
        job_id, model = self.pick(index)
        outcome = self.rig.store.cancel(job_id)
        if model.state is JobState.QUEUED:
            model.state = JobState.CANCELLED
            assert outcome is CancelOutcome.CANCELLED
        elif model.state is JobState.RUNNING:
            model.to_cancel = True
            assert outcome is CancelOutcome.REQUESTED
        else:
            assert outcome is CancelOutcome.ALREADY_FINISHED

    @rule()
    def reconcile(self) -> None:
        lapsed = [
            (job_id, model) for job_id, model in self.jobs.items() if model.state is JobState.RUNNING and model.lapsed
        ]
        requeued = [job_id for job_id, model in lapsed if model.release()]
        found = self.rig.store.reconcile(unclaimed_after_ms=LONG_MS)
        assert sorted(job_id for job_id, queue in found.resend if queue == self.queue) == sorted(requeued)

    @precondition(lambda self: len(self.jobs) > 1)
    @rule(index=jobs_index)
    def purge(self, index: int) -> None:
        job_id, _ = self.pick(index)
        self.rig.store.purge(job_id)
        del self.jobs[job_id]

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        waiting = [job_id for job_id, model in self.jobs.items() if model.state is JobState.QUEUED]
        running = sum(model.state is JobState.RUNNING for model in self.jobs.values())
        assert self.rig.store.depth(self.queue) == QueueDepth(len(waiting), running)
        for job_id, model in self.jobs.items():
            record = self.rig.store.get(job_id).record
            assert (record.state, record.attempt) == (model.state, model.attempt)
            place = waiting.index(job_id) + 1 if job_id in waiting else None
            assert self.rig.store.position(job_id) == place
            _check_log(self.rig.store.events(job_id), model.state)

    def teardown(self) -> None:
        for job_id in self.jobs:
            self.rig.store.purge(job_id)


def _check_log(log: Sequence[Event], state: JobState) -> None:
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    entered = [STATE_AFTER[event.event] for event in log if event.event in STATE_AFTER]
    assert all(after in ALLOWED_MOVES[before] for before, after in pairwise(entered))
    assert entered[-1] is state
    assert sum(event.terminal for event in log) <= 1
    assert not any(event.terminal for event in log[:-1])


def test_any_order_of_calls_keeps_the_rules_of_a_jobs_life(rig: Rig) -> None:
    checks = hypothesis.settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
    )
    machine = type("StoreMachineOfRig", (StoreMachine,), {"rig": rig})
    run_state_machine_as_test(machine, settings=checks)
