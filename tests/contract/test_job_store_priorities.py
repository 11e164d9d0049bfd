"""Who goes first: the higher priority, then the older, and whoever has waited for long moves up."""

import pytest

from omnirt_tasks.contract import JobState, Priority
from omnirt_tasks.jobs.effects import SERVICE_TIMES_KEPT_MS, SERVICE_TIMES_MAX, service_kind
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.values import QueueDepth, Requeue, ServiceTime, WakeUp, part_id
from tests.support.jobs import LONG_MS, PROMOTE_AFTER_MS, ManualClock, Rig, claimed, failed, new_job, succeeded

QUEUE = "cpu-shapes"
LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


def _waiting(rig: Rig, priority: Priority = NORMAL, *, parts: int = 0) -> str:
    return rig.store.create(new_job(priority=priority, parts=parts)).record.id


def _line(rig: Rig, *job_ids: str) -> list[str]:
    """The jobs in the order in which they wait."""
    return sorted(job_ids, key=lambda job_id: rig.store.position(job_id) or 0)


def _resent(rig: Rig) -> list[WakeUp]:
    return list(rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend)


@pytest.fixture
def rig(quick_rig: Rig) -> Rig:
    return quick_rig


# ---------------------------------------------------------------- the order of those that wait


def test_jobs_wait_by_priority_and_then_by_age(rig: Rig) -> None:
    low, normal, high, high_too, normal_too = (
        _waiting(rig, priority) for priority in (LOW, NORMAL, HIGH, HIGH, NORMAL)
    )
    expected = [high, high_too, normal, normal_too, low]
    assert [rig.store.position(job_id) for job_id in expected] == [1, 2, 3, 4, 5]
    assert rig.store.depth(QUEUE) == QueueDepth(5, 0)
    assert rig.store.depth(QUEUE).by_priority == {HIGH: 2, NORMAL: 2, LOW: 1}


def test_a_job_counts_as_what_it_was_asked_for_at_first(rig: Rig) -> None:
    job = rig.store.create(new_job(priority=LOW))
    assert (job.priority, job.record.priority) == (LOW, LOW)
    assert job.wake_ups == (WakeUp(job.record.id, QUEUE, LOW),)
    assert rig.store.get(job.record.id) == job


def test_a_job_that_goes_back_has_its_place_again(rig: Rig) -> None:
    first, second, low = _waiting(rig), _waiting(rig), _waiting(rig, LOW)
    leases = [claimed(rig.store, job_id) for job_id in (low, first)]
    for lease in leases:
        rig.store.give_back(lease, Requeue("left"))
    assert _line(rig, low, second, first) == [first, second, low]


# ---------------------------------------------------------------- promotion


def test_a_job_that_has_waited_for_long_moves_up_behind_those_that_wait_there(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    rig.pass_time(PROMOTE_AFTER_MS - 1)
    normal, high = _waiting(rig, NORMAL), _waiting(rig, HIGH)
    assert _resent(rig) == []
    rig.pass_time(1)

    assert _resent(rig) == [WakeUp(low, QUEUE, NORMAL)]

    later, job = _waiting(rig, NORMAL), rig.store.get(low)
    assert (job.priority, job.record.priority) == (NORMAL, LOW)
    assert job.wake_ups == (WakeUp(low, QUEUE, NORMAL),)
    assert _line(rig, low, normal, high, later) == [high, normal, low, later]
    assert _resent(rig) == []
    assert rig.store.depth(QUEUE).by_priority == {HIGH: 1, NORMAL: 3}


def test_it_moves_up_again_after_as_long_as_before_and_no_further_than_to_the_top(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    named: list[WakeUp] = []
    for _ in range(3):
        rig.pass_time(PROMOTE_AFTER_MS - 1)
        assert _resent(rig) == []
        rig.pass_time(1)
        named += _resent(rig)
    assert named == [WakeUp(low, QUEUE, NORMAL), WakeUp(low, QUEUE, HIGH)]


def test_one_round_moves_nobody_up_twice(rig: Rig) -> None:
    low, normal = _waiting(rig, LOW), _waiting(rig, NORMAL)
    rig.pass_time(3 * PROMOTE_AFTER_MS)
    assert sorted(_resent(rig), key=lambda wake_up: wake_up.priority) == [
        WakeUp(normal, QUEUE, HIGH),
        WakeUp(low, QUEUE, NORMAL),
    ]


def test_a_job_is_sent_once_though_its_message_was_due_too(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    rig.pass_time(PROMOTE_AFTER_MS)
    assert list(rig.store.reconcile(unclaimed_after_ms=1).resend) == [WakeUp(low, QUEUE, NORMAL)]


def test_a_job_that_was_promoted_counts_as_sent_then_and_is_named_once_per_period(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    rig.pass_time(PROMOTE_AFTER_MS)
    assert _resent(rig) == [WakeUp(low, QUEUE, NORMAL)]
    assert not rig.store.reconcile(unclaimed_after_ms=PROMOTE_AFTER_MS).resend


def test_a_job_whose_lease_expired_in_the_round_that_promotes_it_is_sent_as_what_it_has_come_to(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    claimed(rig.store, low, lease_ttl_ms=1)
    rig.pass_time(PROMOTE_AFTER_MS)
    assert _resent(rig) == [WakeUp(low, QUEUE, NORMAL)]


def test_a_job_that_was_promoted_and_comes_back_keeps_what_it_has_come_to(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    rig.pass_time(PROMOTE_AFTER_MS)
    rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    later = _waiting(rig, NORMAL)
    lease = claimed(rig.store, low, lease_ttl_ms=1)
    rig.pass_time(2)
    assert _resent(rig) == [WakeUp(low, QUEUE, NORMAL)]
    assert rig.store.renew(lease, lease_ttl_ms=LONG_MS).held is False
    assert _line(rig, later, low) == [low, later]


def test_a_job_that_runs_or_is_over_is_not_promoted(rig: Rig) -> None:
    running, over = _waiting(rig, LOW), _waiting(rig, LOW)
    claimed(rig.store, running)
    rig.store.commit(claimed(rig.store, over), failed())
    rig.pass_time(2 * PROMOTE_AFTER_MS)
    assert _resent(rig) == []
    assert [rig.store.get(job_id).priority for job_id in (running, over)] == [LOW, LOW]


def test_a_job_that_waits_for_its_retry_is_promoted_and_sent_when_that_has_come(rig: Rig) -> None:
    low = _waiting(rig, LOW)
    rig.store.give_back(claimed(rig.store, low), Requeue("error", delay_ms=2 * PROMOTE_AFTER_MS - 1))
    rig.pass_time(PROMOTE_AFTER_MS)
    assert _resent(rig) == []
    assert rig.store.get(low).priority is NORMAL
    rig.pass_time(PROMOTE_AFTER_MS - 1)
    assert _resent(rig) == [WakeUp(low, QUEUE, NORMAL)]


def test_the_parts_of_a_job_are_promoted_together(rig: Rig) -> None:
    job_id = _waiting(rig, LOW, parts=3)
    claimed(rig.store, part_id(job_id, 0))
    rig.pass_time(PROMOTE_AFTER_MS)
    assert _resent(rig) == [WakeUp(part_id(job_id, number), QUEUE, NORMAL) for number in (1, 2)]
    assert rig.store.get(job_id).priority is NORMAL
    assert rig.store.get(part_id(job_id, 0)).priority is LOW


@pytest.mark.parametrize("priority", [LOW, NORMAL])
def test_an_endless_stream_of_high_jobs_keeps_no_job_waiting_for_ever(rig: Rig, priority: Priority) -> None:
    """One is claimed per promotion time, and two come: a job starts once those are served that were high before it."""
    waiting = _waiting(rig, priority)
    high = [_waiting(rig, HIGH)]
    promoted_behind = None
    for _ in range(20):
        rig.pass_time(PROMOTE_AFTER_MS)
        rig.store.reconcile(unclaimed_after_ms=LONG_MS)
        if promoted_behind is None and rig.store.get(waiting).priority is HIGH:
            promoted_behind = len(high)
        first = min((waiting, *high), key=lambda job_id: rig.store.position(job_id) or 0)
        claimed(rig.store, first)
        if first == waiting:
            break
        high.remove(first)
        high += [_waiting(rig, HIGH), _waiting(rig, HIGH)]
        if promoted_behind is not None:
            promoted_behind -= 1
    assert rig.store.get(waiting).record.state is JobState.RUNNING
    assert promoted_behind == 0


# ---------------------------------------------------------------- service times


def test_the_times_of_what_succeeded_are_kept_newest_first_with_what_it_was_alike_to(rig: Rig) -> None:
    steps = [new_job(config={"num_inference_steps": count, "seed": 1}) for count in (4, 20)]
    for job, ms in zip(steps, (30, 50), strict=True):
        rig.store.create(job)
        rig.pass_time(7)  # waiting is no service
        lease = claimed(rig.store, job.id)
        rig.pass_time(ms)
        rig.store.commit(lease, succeeded(job.id))
    assert list(rig.store.service_times(QUEUE)) == [
        ServiceTime(service_kind(job.resolved), ms) for job, ms in ((steps[1], 50), (steps[0], 30))
    ]
    assert len({service_kind(job.resolved) for job in steps}) == 2
    assert list(rig.store.service_times("cpu-other")) == []


def test_a_part_has_a_service_time_of_its_own_and_the_whole_job_none(rig: Rig) -> None:
    job = new_job(parts=2)
    rig.store.create(job)
    for number, ms in ((0, 10), (1, 20)):
        lease = claimed(rig.store, part_id(job.id, number))
        rig.pass_time(ms)
        rig.store.commit(lease, succeeded("part", first=2 * number, count=2))
    kind = service_kind(job.parts[0].resolved)
    assert list(rig.store.service_times(QUEUE)) == [ServiceTime(kind, 20), ServiceTime(kind, 10)]
    assert kind != service_kind(job.resolved)


def test_what_did_not_succeed_tells_nothing_of_how_long_it_takes(rig: Rig) -> None:
    rig.store.commit(claimed(rig.store, _waiting(rig)), failed())
    rig.store.give_back(claimed(rig.store, _waiting(rig)), Requeue("left"))
    assert list(rig.store.service_times(QUEUE)) == []


def test_only_the_newest_service_times_are_kept(rig: Rig) -> None:
    for _ in range(SERVICE_TIMES_MAX + 1):
        job_id = _waiting(rig)
        lease = claimed(rig.store, job_id)
        rig.store.commit(lease, succeeded(job_id))
        rig.store.purge(job_id)
    assert len(rig.store.service_times(QUEUE)) == SERVICE_TIMES_MAX


def test_the_service_times_of_a_queue_that_nobody_uses_any_more_are_forgotten_in_memory_too() -> None:
    clock = ManualClock()
    store = MemoryJobStore(now_ms=clock)
    for queue in (QUEUE, "cpu-other"):
        job_id = store.create(new_job(queue=queue)).record.id
        store.commit(claimed(store, job_id), succeeded(job_id))
        clock.pass_time(SERVICE_TIMES_KEPT_MS)
    assert list(store.service_times(QUEUE)) == []
    assert QUEUE not in store._lives.service_times
