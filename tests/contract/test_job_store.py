"""What every job store promises, whatever it is made of."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from omnirt_tasks.contract import CancelOutcome, EventName, ExecutionMode, JobState, Phase, Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import JobNotFound, QueueFull
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Cancelled, Claim, EventDraft, JobQuery, Lease, Outcome, QueueDepth, Requeue, WakeUp
from tests.support.jobs import LONG_MS, Rig, claimed, failed, new_job, step, succeeded, won

# ---------------------------------------------------------------- states to start from


def _queued(rig: Rig) -> tuple[str, Lease, Lease]:
    """A job that waits for its second attempt: (id, the newest lease, an older one)."""
    job_id = rig.store.create(new_job()).record.id
    older = claimed(rig.store, job_id)
    assert rig.store.give_back(older, Requeue("test"))
    return job_id, older, older


def _running(rig: Rig) -> tuple[str, Lease, Lease]:
    job_id, older, _ = _queued(rig)
    return job_id, claimed(rig.store, job_id), older


def _lapsed(rig: Rig) -> tuple[str, Lease, Lease]:
    """Running, under a lease that has expired."""
    job_id, older, _ = _queued(rig)
    newest = claimed(rig.store, job_id, lease_ttl_ms=1)
    rig.pass_time(2)
    return job_id, newest, older


# ---------------------------------------------------------------- claims and cancels


def test_a_lease_that_has_expired_is_taken_away_by_a_round_and_by_no_claim(rig: Rig) -> None:
    job_id, newest, _ = _lapsed(rig)
    assert rig.store.claim(job_id, worker_id="w2", lease_ttl_ms=LONG_MS, alone=True) is None
    assert rig.store.renew(newest, lease_ttl_ms=1).held  # as its holder does after an outage
    rig.pass_time(2)
    rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    claimed(rig.store, job_id, worker_id="w2")
    told = [(event.event, event.data) for event in rig.store.events(job_id)[-2:]]
    assert told == [
        (EventName.JOB_REQUEUED, {"attempt": 2, "reason": "lease_expired"}),
        (EventName.JOB_STARTED, {"attempt": 3, "worker_id": "w2"}),
    ]


def test_a_claim_that_is_made_again_with_its_token_gives_the_same_claim(rig: Rig) -> None:
    job_id = rig.store.create(new_job(deadline_s=60)).record.id

    def claim(token: str) -> object:
        return rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS, alone=True, token=token)

    first = claim("token")
    assert claim("another") is None
    assert claim("token") == first
    assert rig.store.get(job_id).record.attempt == 1


def test_events_that_are_appended_again_under_their_name_are_logged_once(rig: Rig) -> None:
    job_id, lease, _ = _running(rig)
    rig.store.append(lease, [step(1)], call="one")
    rig.store.checkpoint(lease, name="a", step=1)
    rig.store.cancel(job_id)  # as others do before the first one is tried again
    before = rig.store.events(job_id)
    assert rig.store.append(lease, [step(1)], call="one")
    assert rig.store.events(job_id) == before
    assert rig.store.append(lease, [step(2)], call="two")
    assert len(rig.store.events(job_id)) == len(before) + 1


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get("nobody"),
        lambda store: store.cancel("nobody"),
        lambda store: store.events("nobody"),
        lambda store: store.position("nobody"),
    ],
)
def test_an_unknown_job_is_told_so(rig: Rig, call: Callable[[JobStore], object]) -> None:
    with pytest.raises(JobNotFound, match="nobody"):
        call(rig.store)
    assert rig.store.claim("nobody", worker_id="w", lease_ttl_ms=1) is None


# ---------------------------------------------------------------- the record and the log


def test_a_new_job_is_queued_and_reads_back_as_it_was_returned(rig: Rig) -> None:
    given = new_job(prompt='quotes " and \\ and \n and ümläut and 🎈', config={"seed": 2**63 - 1, "n": 1})
    created = rig.store.create(given)
    assert created == rig.store.get(given.id)
    assert created.resolved == given.resolved
    assert (created.owner, created.queue, created.traceparent) == ("alice", "cpu-shapes", "00-parent")
    record = created.record
    assert (record.id, record.job_id) == (given.id, given.id)
    assert (record.state, record.attempt, record.backend) == (JobState.QUEUED, 0, "cpu")
    assert record.queue is not None
    assert record.queue.name == "cpu-shapes"
    assert record.request == given.request
    assert record.metadata == {"who": "test"}
    assert record.trace_id == "trace"
    [event] = rig.store.events(given.id)
    assert (event.seq, event.event, event.stage) == (1, EventName.JOB_ENQUEUED, "job")
    assert event.data == {"queue": "cpu-shapes"}
    assert event.timestamp_ms == record.enqueued_at_ms


def test_a_job_that_is_created_twice_is_one_job(rig: Rig) -> None:
    given = new_job()
    rig.store.create(given)
    lease = claimed(rig.store, given.id)
    again = rig.store.create(given)
    assert again.record.state is JobState.RUNNING
    assert rig.store.renew(lease, lease_ttl_ms=LONG_MS).held
    assert len(rig.store.page(JobQuery("alice")).jobs) == 1


def test_the_straight_way_fills_the_record(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    claim = won(
        rig.store.claim(job_id, worker_id='cpu"0@host', lease_ttl_ms=LONG_MS, execution_mode=ExecutionMode.LEGACY_CALL)
    )
    record = claim.job.record
    assert (record.state, record.phase, record.attempt) == (JobState.RUNNING, Phase.WAITING, 1)
    assert (record.worker_id, record.execution_mode, record.queue) == ('cpu"0@host', ExecutionMode.LEGACY_CALL, None)
    assert record.started_at_ms is not None
    assert claim.job.lease_expires_at_ms == record.started_at_ms + LONG_MS

    phases = []
    for stage in ("load", "encode_prompt", "denoise", "my_own", "decode", "export"):
        assert rig.store.append(claim.lease, [EventDraft(EventName.STAGE_START, stage)])
        phases.append(rig.store.get(job_id).record.phase)
    assert phases == [Phase.PREFILL] * 2 + [Phase.DECODE] * 2 + [Phase.DRAINING] * 2

    assert rig.store.append(claim.lease, [step(1), step(2), step(3)])
    progress = rig.store.get(job_id).record.progress
    assert progress is not None
    assert (progress.step, progress.total, progress.fraction) == (3, 4, 0.75)

    outcome = succeeded(job_id)
    assert rig.store.commit(claim.lease, outcome)
    record = rig.store.get(job_id).record
    assert (record.state, record.phase, record.result) == (JobState.SUCCEEDED, None, outcome.result)
    assert record.execution_mode is ExecutionMode.MODULAR  # the report of the run knows best
    assert record.finished_at_ms is not None
    assert record.expires_at_ms == record.finished_at_ms + 50
    last = rig.store.events(job_id)[-1]
    assert (last.event, last.data) == (EventName.JOB_FINISHED, {"outputs": ["0.png"]})
    assert rig.store.get(job_id).last_seq == last.seq


def test_a_failure_tells_its_error_in_record_and_log(rig: Rig) -> None:
    job_id, lease, _ = _running(rig)
    outcome = failed()
    rig.store.commit(lease, outcome)
    assert rig.store.get(job_id).record.error == outcome.error
    assert rig.store.events(job_id)[-1].data == {"error": outcome.error.model_dump(mode="json")}


def test_a_requeued_job_forgets_its_attempt_and_keeps_its_place(rig: Rig) -> None:
    first = rig.store.create(new_job()).record.id
    second = rig.store.create(new_job()).record.id
    lease = claimed(rig.store, first)
    rig.store.append(lease, [EventDraft(EventName.STAGE_START, "denoise"), step(1)])
    rig.store.give_back(lease, Requeue('the worker is "leaving"'))

    job = rig.store.get(first)
    assert (job.record.state, job.record.attempt) == (JobState.QUEUED, 1)
    assert (job.record.phase, job.record.progress, job.record.worker_id) == (None, None, None)
    assert (job.record.started_at_ms, job.lease_expires_at_ms) == (None, None)
    assert job.record.queue is not None
    assert rig.store.events(first)[-1].data == {"attempt": 1, "reason": 'the worker is "leaving"'}
    assert (rig.store.position(first), rig.store.position(second)) == (1, 2)


def test_the_log_counts_without_gaps_and_keeps_the_newest_thousand(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    lease = claimed(rig.store, job_id)
    for start in range(0, 1_200, 100):
        assert rig.store.append(lease, [step(number + 1, 1_200) for number in range(start, start + 100)])
    log = rig.store.events(job_id)
    assert [event.seq for event in log] == list(range(203, 1_203))
    assert [event.seq for event in rig.store.events(job_id, after=1_200)] == [1_201, 1_202]
    assert not rig.store.events(job_id, after=1_202)
    assert not rig.store.events(job_id, after=10**12)
    assert rig.store.events(job_id, after=-5) == log


def test_an_empty_append_holds_and_logs_nothing(rig: Rig) -> None:
    job_id, lease, older = _running(rig)
    log = rig.store.events(job_id)
    assert rig.store.append(lease, [])
    assert not rig.store.append(older, [])
    assert rig.store.events(job_id) == log


def test_each_state_is_counted_once_when_it_is_entered(rig: Rig) -> None:
    job_id, lease, _ = _running(rig)
    rig.store.commit(lease, succeeded(job_id))
    rig.store.commit(lease, failed())
    rig.store.cancel(job_id)
    assert rig.store.state_counts() == {
        ("text2image", "shapes", "unknown", "queued"): 2,
        ("text2image", "shapes", "unknown", "running"): 2,
        ("text2image", "shapes", "modular", "succeeded"): 1,
    }


# ---------------------------------------------------------------- queues


def test_a_full_queue_refuses_and_takes_again_when_one_leaves(rig: Rig) -> None:
    first = rig.store.create(new_job(), queue_limit=2).record.id
    rig.store.create(new_job(), queue_limit=2)
    with pytest.raises(QueueFull, match="cpu-shapes holds 2"):
        rig.store.create(new_job("refused"), queue_limit=2)
    with pytest.raises(JobNotFound):
        rig.store.get("refused")
    rig.store.create(new_job(queue="cuda-sdxl"), queue_limit=2)
    claimed(rig.store, first)
    rig.store.create(new_job(), queue_limit=2)


def test_position_and_depth_follow_the_jobs(rig: Rig) -> None:
    first, second, third = (rig.store.create(new_job()).record.id for _ in range(3))
    other = rig.store.create(new_job(queue="cuda-sdxl")).record.id
    assert [rig.store.position(job_id) for job_id in (first, second, third, other)] == [1, 2, 3, 1]
    assert rig.store.queues() == ["cpu-shapes", "cuda-sdxl"]

    lease = claimed(rig.store, first)
    rig.store.cancel(second)
    assert [rig.store.position(job_id) for job_id in (first, second, third)] == [None, None, 1]
    assert rig.store.depth("cpu-shapes") == QueueDepth(waiting=1, running=1)

    rig.store.commit(lease, failed())
    rig.store.cancel(third)
    assert rig.store.depth("cpu-shapes") == QueueDepth(0, 0)
    assert rig.store.queues() == ["cuda-sdxl"]


# ---------------------------------------------------------------- listing


def test_a_listing_goes_newest_first_and_stays_stable_while_jobs_arrive(rig: Rig) -> None:
    ids = [rig.store.create(new_job()).record.id for _ in range(7)]
    listed, cursor = [], None
    for _ in range(10):
        page = rig.store.page(JobQuery("alice", limit=2, cursor=cursor))
        listed += [job.record.id for job in page.jobs]
        rig.store.create(new_job())  # arrives between two pages, and belongs to neither
        cursor = page.next_cursor
        if cursor is None:
            break
    assert listed == ids[::-1]


def test_the_last_page_says_so_when_it_is_exactly_full(rig: Rig) -> None:
    for _ in range(4):
        rig.store.create(new_job())
    first = rig.store.page(JobQuery("alice", limit=2))
    assert first.next_cursor is not None
    assert rig.store.page(JobQuery("alice", limit=2, cursor=first.next_cursor)).next_cursor is None


def test_a_listing_shows_the_owners_jobs_that_match_and_no_results(rig: Rig) -> None:
    done = rig.store.create(new_job()).record.id
    rig.store.commit(claimed(rig.store, done), succeeded(done))
    other_model = rig.store.create(new_job(model="sdxl")).record.id
    other_task = rig.store.create(new_job(task=Task.IMAGE2IMAGE)).record.id
    rig.store.create(new_job(owner="bob"))

    def ids(query: JobQuery) -> list[str]:
        return [job.record.id for job in rig.store.page(query).jobs]

    assert ids(JobQuery("alice")) == [other_task, other_model, done]
    assert ids(JobQuery("alice", state=JobState.SUCCEEDED)) == [done]
    assert ids(JobQuery("alice", model="sdxl")) == [other_model]
    assert ids(JobQuery("alice", task=Task.IMAGE2IMAGE)) == [other_task]
    assert ids(JobQuery("alice", limit=1, state=JobState.QUEUED)) == [other_task]
    assert not ids(JobQuery("carol"))
    assert rig.store.page(JobQuery("alice", state=JobState.SUCCEEDED)).jobs[0].record.result is None


# ---------------------------------------------------------------- reconciling and expiry


def test_a_job_whose_lease_expired_is_queued_again_and_named_once(rig: Rig) -> None:
    job_id, _, _ = _lapsed(rig)
    alive, _, _ = _running(rig)
    found = rig.store.reconcile(unclaimed_after_ms=LONG_MS)
    assert list(found.resend) == [WakeUp(job_id, "cpu-shapes")]
    assert list(found.expired) == [job_id]
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend
    assert rig.store.get(job_id).record.state is JobState.QUEUED
    assert rig.store.get(alive).record.state is JobState.RUNNING
    assert rig.store.events(job_id)[-1].data == {"attempt": 2, "reason": "lease_expired"}


def test_a_job_whose_lease_expired_after_its_cancel_is_cancelled_and_not_sent(rig: Rig) -> None:
    job_id, _, _ = _lapsed(rig)
    rig.store.cancel(job_id)
    assert not rig.store.reconcile(unclaimed_after_ms=LONG_MS).resend
    assert rig.store.get(job_id).record.state is JobState.CANCELLED


def test_an_unclaimed_job_is_named_once_per_period(rig: Rig) -> None:
    period_ms = 20
    job_id = rig.store.create(new_job()).record.id

    def named() -> list[WakeUp]:
        return list(rig.store.reconcile(unclaimed_after_ms=period_ms).resend)

    assert not named()
    for _ in range(2):
        rig.pass_time(period_ms)
        assert named() == [WakeUp(job_id, "cpu-shapes")]
        assert not named()
    claimed(rig.store, job_id)
    rig.pass_time(period_ms)
    assert not named()


def test_a_finished_job_expires_and_is_found_to_be_purged(rig: Rig) -> None:
    job_id, lease, _ = _running(rig)
    waiting = rig.store.create(new_job()).record.id
    assert not rig.store.expired()
    rig.store.commit(lease, failed())
    rig.pass_time(60)
    assert [job.record.id for job in rig.store.expired()] == [job_id]
    rig.store.purge(job_id)
    assert not rig.store.expired()
    assert rig.store.get(waiting).record.state is JobState.QUEUED


# ---------------------------------------------------------------- races


def test_a_job_of_another_queue_is_left_alone_whose_message_strayed(rig: Rig) -> None:
    job_id = rig.store.create(new_job(queue="cpu-shapes")).record.id

    stray = rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS, queues=("cpu-stub-stub", "cpu-shapes+fast"))
    meant = rig.store.claim(job_id, worker_id="w1", lease_ttl_ms=LONG_MS, queues=("cpu-stub-stub", "cpu-shapes"))

    assert stray is None
    assert isinstance(meant, Claim)
    assert meant.lease.attempt == 1


def test_of_many_claims_at_once_one_wins(rig: Rig) -> None:
    job_id = rig.store.create(new_job()).record.id
    start = Barrier(8)

    def claim(number: int) -> bool:
        start.wait(10)
        return rig.store.claim(job_id, worker_id=f"w{number}", lease_ttl_ms=LONG_MS) is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, range(8))) == 1
    assert rig.store.get(job_id).record.attempt == 1


def test_a_cancel_that_races_a_claim_is_never_lost(rig: Rig) -> None:
    for _ in range(20):
        job_id = rig.store.create(new_job()).record.id
        start = Barrier(2)

        def claim(job_id: str = job_id, start: Barrier = start) -> Lease | None:
            start.wait(10)
            claim = rig.store.claim(job_id, worker_id="w", lease_ttl_ms=LONG_MS)
            return claim.lease if isinstance(claim, Claim) else None

        with ThreadPoolExecutor(1) as pool:
            claiming = pool.submit(claim)
            start.wait(10)
            outcome = rig.store.cancel(job_id)
            lease = claiming.result(10)
        if outcome is CancelOutcome.CANCELLED:
            assert lease is None
        else:
            assert lease is not None
            assert rig.store.renew(lease, lease_ttl_ms=LONG_MS).cancel_requested


def test_a_cancel_that_races_a_commit_leaves_one_end(rig: Rig) -> None:
    for _ in range(20):
        job_id, lease, _ = _running(rig)
        start = Barrier(3)

        def end(outcome: Outcome | None, job_id: str = job_id, lease: Lease = lease, start: Barrier = start) -> bool:
            start.wait(10)
            if outcome is None:
                return rig.store.cancel(job_id) is CancelOutcome.CANCELLED
            return rig.store.commit(lease, outcome)

        with ThreadPoolExecutor(3) as pool:
            won = list(pool.map(end, [failed(), Cancelled(), None]))
        assert sum(won) == 1
        assert sum(event.terminal for event in rig.store.events(job_id)) == 1


def test_events_appended_by_many_threads_count_without_gaps(rig: Rig) -> None:
    job_id, lease, _ = _running(rig)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda number: rig.store.append(lease, [step(number, 80)] * 3), range(1, 81)))
    log = rig.store.events(job_id)
    assert [event.seq for event in log] == list(range(1, len(log) + 1))


def test_tags_open_no_more_queues_than_there_may_be(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnirt_tasks.jobs.effects.QUEUES_MAX", 2)
    first = rig.store.create(new_job(queue="cpu-shapes+a")).record.id
    rig.store.create(new_job(queue="cpu-shapes+b"))
    with pytest.raises(QueueFull, match="tags"):
        rig.store.create(new_job(queue="cpu-shapes+c"))
    assert rig.store.queues() == ["cpu-shapes+a", "cpu-shapes+b"]
    rig.store.create(new_job(queue="cpu-shapes+b"))  # a queue that is open takes more
    rig.store.create(new_job(queue="cpu-shapes"))  # and models open theirs in any case
    rig.store.create(new_job(queue="cuda-sdxl"))
    for job in rig.store.page(JobQuery(owner="alice")).jobs:
        if job.record.id != first:
            rig.store.cancel(job.record.id)
    rig.store.create(new_job(queue="cpu-shapes+c"))  # those that have emptied make room
    assert rig.store.queues() == ["cpu-shapes+a", "cpu-shapes+c"]


def test_expired_jobs_are_named_oldest_first_without_those_to_skip(rig: Rig) -> None:
    jobs = [rig.store.create(new_job()).record.id for _ in range(3)]
    for job_id in jobs:
        rig.store.cancel(job_id)
        rig.pass_time(2)
    rig.pass_time(60)
    assert [job.record.id for job in rig.store.expired()] == jobs
    assert [job.record.id for job in rig.store.expired(1, skip=1)] == jobs[1:2]


def test_what_the_log_holds_is_json(rig: Rig) -> None:
    job_id, lease, _ = _running(rig)
    data: JsonObject = {"step": 1, "mime": "image/png", "data_b64": "AA==", "text": 'a "quoted" \\ \u2028 line'}
    rig.store.append(lease, [EventDraft(EventName.PREVIEW, 'a "stage"', data)])
    event = rig.store.events(job_id)[-1]
    assert (event.stage, event.data) == ('a "stage"', data)
    assert json.loads(event.model_dump_json())["data"] == data
