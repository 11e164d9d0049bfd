"""What the Redis store promises beyond the contract of stores: lost answers, keys with an end, errors with a name."""

import json
import socket
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest
import redis

from omnirt_tasks.contract import ALLOWED_MOVES, CancelOutcome, JobState
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs import effects
from omnirt_tasks.jobs.connection import connect, reaching_store
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import EventDraft, JobQuery, JobStore, Lease
from omnirt_tasks.settings import Settings
from tests.support.jobs import LONG_MS, failed, new_job, pass_redis_time, step, succeeded
from tests.support.processes import free_port

PRELUDE = (resources.files("omnirt_tasks.jobs") / "scripts" / "prelude.lua").read_text()


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
    claim = store.claim(job_id, worker_id="w", lease_ttl_ms=LONG_MS)
    assert claim is not None
    return job_id, claim.lease


# ---------------------------------------------------------------- the scripts and the contract


def test_the_scripts_and_the_contract_allow_the_same_moves(client: Any) -> None:
    moves = json.loads(client.eval(PRELUDE + "\nreturn cjson.encode(MOVES)", 0, "p", "", "1", ""))
    assert moves == {state: dict.fromkeys(after, True) for state, after in ALLOWED_MOVES.items()}


def test_the_scripts_keep_as_many_events_as_the_memory_store(client: Any) -> None:
    assert client.eval(PRELUDE + "\nreturn LOG_LENGTH", 0, "p", "", "1", "") == effects.EVENT_LOG_LENGTH


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("target", JobState)
def test_a_script_that_tries_a_forbidden_move_stops_before_it_writes(
    client: Any, settings: Settings, state: JobState, target: JobState
) -> None:
    body = "\nenter({state = ARGV[5], queue = 'q', task = 't', model = 'm'}, ARGV[6])"
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


def test_a_call_that_is_sent_twice_counts_once(store: RedisJobStore) -> None:
    scripts = store._scripts._scripts
    store._scripts._scripts = {name: _Twice(script) for name, script in scripts.items()}  # type: ignore[misc]

    job_id, lease = _running(store)
    assert lease.attempt == 1
    assert store.append(lease, [step(1)])
    assert store.give_back(lease, reason="test")
    claim = store.claim(job_id, worker_id="w", lease_ttl_ms=LONG_MS)
    assert claim is not None
    assert claim.lease.attempt == 2
    assert store.commit(claim.lease, succeeded(job_id))
    assert [event.seq for event in store.events(job_id)] == list(range(1, 7))

    queued = store.create(new_job()).record.id
    assert store.cancel(queued) is CancelOutcome.CANCELLED
    assert store.state_counts()["text2image", "shapes", "unknown", "queued"] == 3


def test_a_lease_that_is_renewed_while_the_expired_ones_are_collected_stays(
    store: RedisJobStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = store.create(new_job()).record.id
    claim = store.claim(job_id, worker_id="w", lease_ttl_ms=1)
    assert claim is not None
    pass_redis_time(client, 2)
    run = store._scripts.run

    def renew_after_overdue(name: str, *args: Any) -> Any:
        answer = run(name, *args)
        if name == "overdue":
            assert answer[0] == [job_id]
            assert store.renew(claim.lease, lease_ttl_ms=LONG_MS).held
        return answer

    monkeypatch.setattr(store._scripts, "run", renew_after_overdue)
    assert not store.reconcile(unclaimed_after_ms=LONG_MS).resend
    assert store.get(job_id).record.state is JobState.RUNNING


# ---------------------------------------------------------------- nothing stays for ever


def test_the_keys_of_a_finished_job_have_an_end_even_if_no_sweeper_comes(
    client: Any, store: RedisJobStore, settings: Settings
) -> None:
    job_id, lease = _running(store)
    store.append(lease, [step(1)])
    keys = [f"{settings.key_prefix}:{kind}:{job_id}" for kind in ("job", "log")]
    assert [client.pttl(key) for key in keys] == [-1, -1]
    store.commit(lease, failed())
    day_ms = 24 * 3600 * 1000
    assert all(day_ms - 5_000 < client.pttl(key) <= day_ms + 10 for key in keys)


def test_a_purged_job_leaves_no_key(client: Any, store: RedisJobStore, settings: Settings) -> None:
    job_id, lease = _running(store)
    store.append(lease, [step(1)])
    store.commit(lease, failed())
    store.purge(job_id)
    store.reconcile(unclaimed_after_ms=LONG_MS)
    lasting = {f"{settings.key_prefix}:{name}" for name in ("serial", "states")}
    assert set(client.keys(f"{settings.key_prefix}:*")) == lasting


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


def test_creating_a_job_is_one_round_trip(client: Any, store: RedisJobStore) -> None:
    store.create(new_job())
    client.config_resetstat()
    store.create(new_job(), queue_limit=10)
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
    "give_back": lambda store: store.give_back(Lease("a", 1, "t"), reason="test"),
    "cancel": lambda store: store.cancel("a"),
    "purge": lambda store: store.purge("a"),
    "reconcile": lambda store: store.reconcile(unclaimed_after_ms=LONG_MS),
    "expired": lambda store: store.expired(),
    "events": lambda store: store.events("a"),
    "depth": lambda store: store.depth("q"),
    "position": lambda store: store.position("a"),
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
