"""The same idempotency key of the same owner means the same job, whoever asks, and how often."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from omnirt_tasks.contract import JobState
from omnirt_tasks.errors import IdempotencyMismatch, JobNotFound
from omnirt_tasks.jobs.values import JobQuery
from tests.support.jobs import Rig, claimed, failed, idempotency, new_job, succeeded


def test_a_second_submit_with_the_key_is_answered_with_the_first_job(rig: Rig) -> None:
    first = rig.store.create(new_job(idempotency=idempotency()))
    assert rig.store.submitted("alice", idempotency()) == first
    lease = claimed(rig.store, first.record.id)
    again = rig.store.create(new_job(idempotency=idempotency()))
    assert (again.record.id, again.record.state) == (first.record.id, JobState.RUNNING)
    rig.store.commit(lease, succeeded(first.record.id))
    done = rig.store.create(new_job(idempotency=idempotency()), queue_limit=0)  # a full queue refuses no old job
    assert done == rig.store.get(first.record.id)
    assert done.record.result is not None
    assert len(rig.store.page(JobQuery("alice")).jobs) == 1


def test_another_body_with_the_key_is_refused_and_changes_nothing(rig: Rig) -> None:
    first = rig.store.create(new_job(idempotency=idempotency()))
    other = idempotency(body="another")
    with pytest.raises(IdempotencyMismatch, match="'key'"):
        rig.store.create(new_job("refused", idempotency=other))
    with pytest.raises(IdempotencyMismatch, match="'key'"):
        rig.store.submitted("alice", other)
    with pytest.raises(JobNotFound):
        rig.store.get("refused")
    assert rig.store.submitted("alice", idempotency()) == first


def test_keys_of_different_owners_and_different_keys_are_different_jobs(rig: Rig) -> None:
    jobs = [
        rig.store.create(new_job(owner=owner, idempotency=idempotency(key, body=f"{owner} {key}"))).record.id
        for owner in ("alice", "bob")
        for key in ("one", "two", "Ünïcode \n key")
    ]
    assert len(set(jobs)) == len(jobs)
    assert rig.store.submitted("carol", idempotency("one")) is None


def test_a_job_without_a_key_is_found_by_none(rig: Rig) -> None:
    rig.store.create(new_job())
    assert rig.store.submitted("alice", idempotency("")) is None


def test_a_key_whose_time_is_over_is_free_again(rig: Rig) -> None:
    short = idempotency(ttl_ms=20)
    first = rig.store.create(new_job(idempotency=short)).record.id
    rig.pass_time(21)
    assert rig.store.submitted("alice", short) is None
    second = rig.store.create(new_job(idempotency=idempotency(body="another"))).record.id
    assert second != first
    rig.store.purge(first)  # takes away its own key alone
    submitted = rig.store.submitted("alice", idempotency(body="another"))
    assert submitted is not None
    assert submitted.record.id == second


def test_a_key_whose_job_was_purged_is_free_again(rig: Rig) -> None:
    first = rig.store.create(new_job(idempotency=idempotency())).record.id
    rig.store.commit(claimed(rig.store, first), failed())
    rig.store.purge(first)
    assert rig.store.submitted("alice", idempotency()) is None
    assert rig.store.create(new_job(idempotency=idempotency(body="another"))).record.id != first


def test_of_many_submits_at_once_with_one_key_one_job_is_made(rig: Rig) -> None:
    start = Barrier(16)

    def submit(_: int) -> str:
        start.wait(10)
        return rig.store.create(new_job(idempotency=idempotency())).record.id

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(submit, range(16)))) == 1
    assert len(rig.store.page(JobQuery("alice")).jobs) == 1
    assert rig.store.depth("cpu-shapes").waiting == 1


def test_of_many_submits_at_once_with_different_bodies_one_is_taken_and_the_others_refused(rig: Rig) -> None:
    start = Barrier(8)

    def submit(number: int) -> bool:
        start.wait(10)
        try:
            rig.store.create(new_job(idempotency=idempotency(body=str(number))))
        except IdempotencyMismatch:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(submit, range(8))) == 1
    assert rig.store.depth("cpu-shapes").waiting == 1
