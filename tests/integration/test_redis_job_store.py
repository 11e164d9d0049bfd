"""What the Redis store promises beyond the contract of stores: lost answers, keys with an end, errors with a name."""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis

from omnirt_tasks.contract import ALLOWED_MOVES, CancelOutcome, ErrorInfo, JobState, Priority
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs import effects
from omnirt_tasks.jobs.connection import connect, reaching_store
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.scripting import RANK_SPAN, prelude
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Checkpoint, EventDraft, JobQuery, Lease, Reconciled, Requeue, WakeUp
from omnirt_tasks.settings import Settings
from tests.support.jobs import (
    LONG_MS,
    claimed,
    failed,
    idempotency,
    new_job,
    pass_redis_time,
    step,
    succeeded,
)
from tests.support.processes import free_port

PRELUDE = prelude()


@pytest.fixture
def client(settings: Settings) -> Iterator[Any]:
    client = connect(settings.redis_url)
    yield client
    client.close()


@pytest.fixture
def store(client: Any, settings: Settings) -> RedisJobStore:
    return RedisJobStore(client, prefix=settings.key_prefix, job_ttl_s=0.01)


def _running(store: JobStore) -> tuple[str, Lease]:
    job_id = store.create(new_job()).record.id
    return job_id, claimed(store, job_id)


# ---------------------------------------------------------------- the scripts and the contract


def test_the_scripts_and_the_contract_allow_the_same_moves(client: Any) -> None:
    moves = json.loads(client.eval(PRELUDE + "\nreturn cjson.encode(MOVES)", 0, "p", "", "1", ""))
    assert moves == {state: dict.fromkeys(after, True) for state, after in ALLOWED_MOVES.items()}


def test_the_scripts_have_the_rules_of_the_memory_store(client: Any) -> None:
    def constant(name: str) -> Any:
        return client.eval(f"{prelude(7)}\nreturn {name}", 0, "p", "", "1", "")

    assert constant("LOG_LENGTH") == effects.EVENT_LOG_LENGTH
    assert constant("DEATHS_MAX") == 7
    assert constant("SERVICE_TIMES_MAX") == effects.SERVICE_TIMES_MAX
    assert constant("SERVICE_TIMES_KEPT_MS") == effects.SERVICE_TIMES_KEPT_MS
    assert json.loads(constant("cjson.encode(RANKS)")) == effects.RANKS
    assert json.loads(constant("cjson.encode(NEXT_HIGHER)")) == effects.NEXT_HIGHER
    assert ErrorInfo.model_validate_json(constant("WORKER_LOST")) == effects.died_too_often(7)
    assert ErrorInfo.model_validate_json(constant("TIMED_OUT")) == effects.deadline_passed()


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("target", JobState)
def test_a_script_that_tries_a_forbidden_move_stops_before_it_writes(
    client: Any, settings: Settings, state: JobState, target: JobState
) -> None:
    body = "\nenter({id = 'job', key = job_key('job'), state = ARGV[5], queue = 'q', task = 't', model = 'm'}, ARGV[6])"
    arguments = (settings.key_prefix, "job", "1", "", state, target)
    if target in ALLOWED_MOVES[state]:
        client.eval(PRELUDE + body, 0, *arguments)
        assert client.hget(f"{settings.key_prefix}:job:job", "state") == target
    else:
        with pytest.raises(redis.ResponseError, match="ILLEGALMOVE"):
            client.eval(PRELUDE + body, 0, *arguments)
        assert not client.keys(f"{settings.key_prefix}:*")


# ---------------------------------------------------------------- a call whose answer was lost is sent again


class _Twice:
    """Runs each script twice with the same call id, as a client does that lost the first answer."""

    def __init__(self, script: Callable[..., Any]) -> None:
        self._script = script

    def __call__(self, *, args: tuple[Any, ...]) -> Any:
        self._script(args=args)
        return self._script(args=args)


@pytest.fixture
def store_without_answers(store: RedisJobStore) -> RedisJobStore:
    scripts = store._scripts._scripts
    store._scripts._scripts = {name: _Twice(script) for name, script in scripts.items()}  # type: ignore[misc]
    return store


def test_a_call_that_is_sent_twice_counts_once(store_without_answers: RedisJobStore) -> None:
    store = store_without_answers
    job_id, lease = _running(store)
    assert lease.attempt == 1
    assert store.append(lease, [step(1)])
    assert store.checkpoint(lease, name="a", step=1)
    assert store.give_back(lease, Requeue("test", retry=True))
    lease = claimed(store, job_id)
    assert lease.attempt == 2
    assert store.give_back(lease, Requeue("test", died=True))
    job = store.get(job_id)
    assert (job.retries, job.deaths, job.checkpoint) == (1, 1, Checkpoint(1, "a", 1))
    assert store.commit(claimed(store, job_id), succeeded(job_id))
    assert [event.seq for event in store.events(job_id)] == list(range(1, 10))

    queued = store.create(new_job()).record.id
    assert store.cancel(queued) is CancelOutcome.CANCELLED
    assert store.state_counts()["text2image", "shapes", "unknown", "queued"] == 4


def test_a_call_for_a_part_that_is_sent_twice_counts_once(store_without_answers: RedisJobStore) -> None:
    store = store_without_answers
    job = store.create(new_job(parts=2))
    first, second = (claimed(store, part) for part in job.parts)
    assert store.append(first, [step(1)])
    assert store.give_back(first, Requeue("test", retry=True))
    first = claimed(store, first.job_id)
    assert store.commit(first, succeeded("part", count=2))
    assert store.commit(second, succeeded("part", first=2, count=2))
    told = [event.event.value for event in store.events(job.record.id)]
    assert told == [
        "job_enqueued", "job_started", "part_started", "part_started", "stage_progress", "part_requeued",
        "part_started", "part_finished", "job_finished",
    ]  # fmt: skip
    assert len(store.service_times("cpu-shapes")) == 2

    waiting = store.create(new_job(parts=2)).record.id
    assert store.cancel(waiting) is CancelOutcome.CANCELLED


def test_a_submit_with_a_key_that_is_sent_twice_is_one_job(store_without_answers: RedisJobStore) -> None:
    given = new_job(idempotency=idempotency())
    assert store_without_answers.create(given).record.id == given.id
    assert store_without_answers.depth("cpu-shapes").waiting == 1


def test_a_round_whose_answers_were_lost_still_names_what_it_did(
    store_without_answers: RedisJobStore, client: Any
) -> None:
    store = store_without_answers
    lapsed, late = (store.create(new_job(deadline_s=deadline_s)).record.id for deadline_s in (None, 0.001))
    claimed(store, lapsed, lease_ttl_ms=1)
    pass_redis_time(client, 2)
    found = store.reconcile(unclaimed_after_ms=LONG_MS)
    assert (found.expired, found.overdue, found.resend) == ([lapsed], [late], [WakeUp(lapsed, "cpu-shapes")])
    assert store.get(lapsed).deaths == 1


def test_what_changes_while_the_lapsed_jobs_are_collected_stays_changed(
    store: RedisJobStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed, left = (claimed(store, store.create(new_job()).record.id, lease_ttl_ms=1) for _ in range(2))
    pass_redis_time(client, 2)
    run = store._scripts.run

    def act_after_overdue(name: str, *args: Any) -> Any:
        answer = run(name, *args)
        if name == "overdue":
            assert set(answer[0]) == {renewed.job_id, left.job_id}
            assert store.renew(renewed, lease_ttl_ms=LONG_MS).held
            assert store.give_back(left, Requeue("left"))
        return answer

    monkeypatch.setattr(store._scripts, "run", act_after_overdue)
    assert store.reconcile(unclaimed_after_ms=LONG_MS) == Reconciled([], [], [])
    assert store.get(renewed.job_id).record.state is JobState.RUNNING
    assert store.get(left.job_id).record.state is JobState.QUEUED


# ---------------------------------------------------------------- nothing stays for ever


DAY_MS = 24 * 3600 * 1000
DEADLINE_MS = 150


def _cancel_before_its_retry(store: RedisJobStore, job_id: str) -> None:
    store.give_back(claimed(store, job_id), Requeue("error", retry=True, delay_ms=LONG_MS, avoid_ms=LONG_MS))
    store.cancel(job_id)


def _die_too_often(store: RedisJobStore, job_id: str) -> None:
    for _ in range(effects.DEATHS_MAX):
        store.give_back(claimed(store, job_id), Requeue("died", died=True))


def _wait_for_a_retry_past_its_deadline(store: RedisJobStore, job_id: str) -> None:
    store.give_back(claimed(store, job_id), Requeue("error", delay_ms=LONG_MS))
    pass_redis_time(store._client, DEADLINE_MS)
    store.reconcile(unclaimed_after_ms=LONG_MS)


def _expire_past_its_deadline(store: RedisJobStore, job_id: str) -> None:
    claimed(store, job_id, lease_ttl_ms=1)
    pass_redis_time(store._client, DEADLINE_MS)
    store.reconcile(unclaimed_after_ms=LONG_MS)


ENDS: dict[str, Callable[[RedisJobStore, str], object]] = {
    "committed": lambda store, job_id: store.commit(claimed(store, job_id), failed()),
    "cancelled": lambda store, job_id: store.cancel(job_id),
    "cancelled before its retry": _cancel_before_its_retry,
    "a dead letter": _die_too_often,
    "timed out": _wait_for_a_retry_past_its_deadline,
    "expired past its deadline": _expire_past_its_deadline,
}


def _lasting_keys(client: Any, settings: Settings) -> set[str]:
    keys = client.keys(f"{settings.key_prefix}:*")
    return {key.removeprefix(f"{settings.key_prefix}:") for key in keys if client.pttl(key) == -1}


@pytest.mark.parametrize("end", ENDS)
def test_a_job_that_is_over_waits_nowhere_and_its_keys_have_an_end_even_if_no_sweeper_comes(
    client: Any, store: RedisJobStore, settings: Settings, end: str
) -> None:
    job_id = store.create(new_job(deadline_s=DEADLINE_MS / 1000, idempotency=idempotency())).record.id
    assert f"job:{job_id}" in _lasting_keys(client, settings)
    ENDS[end](store, job_id)
    assert store.get(job_id).record.finished
    store.reconcile(unclaimed_after_ms=LONG_MS)
    dead = {"dead:alice"} if store.get(job_id).record.dead_letter else set()
    assert _lasting_keys(client, settings) == {"serial", "states", "finished", "owner:alice"} | dead
    for kind in ("job", "log"):
        assert DAY_MS - 5_000 < client.pttl(f"{settings.key_prefix}:{kind}:{job_id}") <= DAY_MS + 10


def _succeed(store: RedisJobStore, parts: Sequence[str]) -> None:
    for number, part in enumerate(parts):
        store.commit(claimed(store, part), succeeded("part", first=2 * number, count=2))


SPLIT_ENDS: dict[str, Callable[[RedisJobStore, Sequence[str]], object]] = {
    "succeeded": _succeed,
    "cancelled": lambda store, parts: store.cancel(parts[0].partition(".")[0]),
    "failed": lambda store, parts: store.commit(claimed(store, parts[0]), failed()),
    "a dead letter": lambda store, parts: _die_too_often(store, parts[1]),
    "timed out": lambda store, parts: _wait_for_a_retry_past_its_deadline(store, parts[1]),
}


@pytest.mark.parametrize("end", SPLIT_ENDS)
def test_the_keys_of_parts_have_the_end_of_their_jobs_and_none_survives_its_purge(
    client: Any, store: RedisJobStore, settings: Settings, end: str
) -> None:
    job = store.create(new_job(parts=3, deadline_s=DEADLINE_MS / 1000))
    job_id = job.record.id
    assert {f"job:{each}" for each in (job_id, *job.parts)} <= _lasting_keys(client, settings)
    SPLIT_ENDS[end](store, job.parts)
    assert store.get(job_id).record.finished
    store.reconcile(unclaimed_after_ms=LONG_MS)
    dead = {"dead:alice"} if store.get(job_id).record.dead_letter else set()
    assert _lasting_keys(client, settings) == {"serial", "states", "finished", "owner:alice"} | dead
    assert client.zcard(f"{settings.key_prefix}:finished") == client.zcard(f"{settings.key_prefix}:owner:alice") == 1
    ends = {client.pexpiretime(f"{settings.key_prefix}:job:{each}") for each in (job_id, *job.parts)}
    assert ends == {client.pexpiretime(f"{settings.key_prefix}:log:{job_id}")}

    store.purge(job_id)

    assert set(client.keys(f"{settings.key_prefix}:*")) - {f"{settings.key_prefix}:times:cpu-shapes"} == {
        f"{settings.key_prefix}:{name}" for name in ("serial", "states")
    }


def test_the_service_times_of_a_queue_that_nobody_uses_any_more_are_forgotten(
    client: Any, store: RedisJobStore, settings: Settings
) -> None:
    job_id, lease = _running(store)
    store.commit(lease, succeeded(job_id))
    kept_ms = client.pttl(f"{settings.key_prefix}:times:cpu-shapes")
    assert effects.SERVICE_TIMES_KEPT_MS - 60_000 < kept_ms <= effects.SERVICE_TIMES_KEPT_MS


def test_the_order_of_a_queue_outlives_more_jobs_than_there_will_be(
    client: Any, store: RedisJobStore, settings: Settings
) -> None:
    client.set(f"{settings.key_prefix}:serial", RANK_SPAN - 10)
    low, normal, high, normal_too = (
        store.create(new_job(priority=priority)).record.id
        for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL)
    )
    assert [store.position(job_id) for job_id in (high, normal, normal_too, low)] == [1, 2, 3, 4]
    assert store.depth("cpu-shapes").by_priority == {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 1}


@pytest.mark.parametrize("end", ENDS)
def test_a_purged_job_leaves_no_key(client: Any, store: RedisJobStore, settings: Settings, end: str) -> None:
    job_id = store.create(new_job(deadline_s=DEADLINE_MS / 1000, idempotency=idempotency())).record.id
    ENDS[end](store, job_id)
    store.purge(job_id)
    store.reconcile(unclaimed_after_ms=LONG_MS)
    lasting = {f"{settings.key_prefix}:{name}" for name in ("serial", "states")}
    assert set(client.keys(f"{settings.key_prefix}:*")) == lasting


def test_a_key_whose_job_redis_dropped_is_free_again(client: Any, store: RedisJobStore, settings: Settings) -> None:
    first = store.create(new_job(idempotency=idempotency())).record.id
    client.delete(f"{settings.key_prefix}:job:{first}")
    assert store.submitted("alice", idempotency()) is None
    assert store.create(new_job(idempotency=idempotency(body="another"))).record.id != first


def test_a_record_that_redis_dropped_is_forgotten_everywhere(
    client: Any, store: RedisJobStore, settings: Settings
) -> None:
    kept = store.create(new_job()).record.id
    job_id, lease = _running(store)
    store.commit(lease, failed())
    client.delete(f"{settings.key_prefix}:job:{job_id}")
    pass_redis_time(client, 20)
    assert [job.record.id for job in store.page(JobQuery("alice")).jobs] == [kept]
    assert not store.expired()
    assert client.zcard(f"{settings.key_prefix}:finished") == 0
    assert client.zcard(f"{settings.key_prefix}:owner:alice") == 1


def test_a_dead_letter_that_redis_dropped_is_forgotten(client: Any, store: RedisJobStore, settings: Settings) -> None:
    job_id = store.create(new_job()).record.id
    _die_too_often(store, job_id)
    client.delete(f"{settings.key_prefix}:job:{job_id}")
    assert not store.page(JobQuery("alice", dead_letters=True)).jobs
    assert not client.exists(f"{settings.key_prefix}:dead:alice")


def test_a_waiting_job_whose_record_is_gone_holds_up_no_other(
    client: Any, store: RedisJobStore, settings: Settings
) -> None:
    gone, other = (store.create(new_job()).record.id for _ in range(2))
    client.delete(f"{settings.key_prefix}:job:{gone}")
    assert list(store.reconcile(unclaimed_after_ms=0).resend) == [WakeUp(other, "cpu-shapes")]
    assert store.depth("cpu-shapes").waiting == 1


def test_a_filtered_search_is_bounded_and_goes_on_from_its_cursor(store: RedisJobStore, monkeypatch: Any) -> None:
    monkeypatch.setattr("omnirt_tasks.jobs.redis.PAGE_SCAN_LIMIT", 100)
    wanted = store.create(new_job(model="rare")).record.id
    for _ in range(150):
        store.create(new_job())
    first = store.page(JobQuery("alice", model="rare"))
    assert (first.jobs, bool(first.next_cursor)) == ([], True)
    second = store.page(JobQuery("alice", model="rare", cursor=first.next_cursor))
    assert [job.record.id for job in second.jobs] == [wanted]
    assert second.next_cursor is None


@pytest.mark.parametrize("parts", [0, 16])
def test_creating_a_job_is_one_round_trip(client: Any, store: RedisJobStore, parts: int) -> None:
    store.create(new_job())
    client.config_resetstat()
    store.create(new_job(deadline_s=1, idempotency=idempotency(), parts=parts), queue_limit=10)
    sent = {name for name in client.info("commandstats") if name not in {"cmdstat_config|resetstat", "cmdstat_info"}}
    direct = sent & {"cmdstat_evalsha", "cmdstat_eval", "cmdstat_script|load", "cmdstat_multi"}
    assert direct == {"cmdstat_evalsha"}
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1


# ---------------------------------------------------------------- when Redis is away or takes no writes

CALLS: dict[str, Callable[[JobStore], object]] = {
    "create": lambda store: store.create(new_job()),
    "get": lambda store: store.get("a"),
    "page": lambda store: store.page(JobQuery("alice")),
    "claim": lambda store: store.claim("a", worker_id="w", lease_ttl_ms=1),
    "renew": lambda store: store.renew(Lease("a", 1, "t"), lease_ttl_ms=1),
    "append": lambda store: store.append(Lease("a", 1, "t"), [step(1)]),
    "commit": lambda store: store.commit(Lease("a", 1, "t"), failed()),
    "submitted": lambda store: store.submitted("alice", idempotency()),
    "checkpoint": lambda store: store.checkpoint(Lease("a", 1, "t"), name="n", step=1),
    "forget_dead_letter": lambda store: store.forget_dead_letter("a"),
    "give_back": lambda store: store.give_back(Lease("a", 1, "t"), Requeue("test")),
    "cancel": lambda store: store.cancel("a"),
    "purge": lambda store: store.purge("a"),
    "reconcile": lambda store: store.reconcile(unclaimed_after_ms=LONG_MS),
    "expired": lambda store: store.expired(),
    "events": lambda store: store.events("a"),
    "depth": lambda store: store.depth("q"),
    "position": lambda store: store.position("a"),
    "service_times": lambda store: store.service_times("q"),
    "queues": lambda store: store.queues(),
    "state_counts": lambda store: store.state_counts(),
    "ping": lambda store: store.ping(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_is_away_is_told_by_one_error(call: str) -> None:
    with connect(f"redis://127.0.0.1:{free_port()}/0") as nobody, pytest.raises(StoreUnavailable) as caught:
        CALLS[call](RedisJobStore(nobody, prefix="p", job_ttl_s=1))
    assert caught.value.retry_after_s


def test_a_server_that_never_answers_is_told_in_bounded_time(monkeypatch: Any) -> None:
    monkeypatch.setattr("omnirt_tasks.jobs.connection.ANSWER_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with (
            connect(f"redis://127.0.0.1:{port}/0") as client,
            pytest.raises(StoreUnavailable),
        ):
            RedisJobStore(client, prefix="p", job_ttl_s=1).ping()


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (redis.ConnectionError("gone"), True),
        (redis.TimeoutError("late"), True),
        (redis.BusyLoadingError("LOADING"), True),
        (redis.OutOfMemoryError("OOM command not allowed"), True),
        (redis.ReadOnlyError("READONLY"), True),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), True),
        (redis.ResponseError("ILLEGALMOVE queued to queued"), False),
        (redis.ResponseError("WRONGTYPE"), False),
    ],
)
def test_only_what_passes_is_called_unavailable(error: redis.RedisError, transient: bool) -> None:
    with pytest.raises(StoreUnavailable if transient else redis.ResponseError), reaching_store():
        raise error


def test_data_that_is_no_json_number_is_refused_before_anything_is_written(store: RedisJobStore) -> None:
    job_id, lease = _running(store)
    with pytest.raises(ValueError, match="JSON"):
        store.append(lease, [EventDraft(step(1).event, "denoise", {"step": 1, "loss": float("nan")})])
    assert len(store.events(job_id)) == 2
