"""Watching a job over server-sent events and over a WebSocket."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection

from omnirt_tasks.contract import EventName
from omnirt_tasks.jobs.values import EventDraft
from tests.support.gateway import Gateway, Told, code_of, gateway_settings, running_gateway
from tests.support.waiting import eventually

WATCHERS = 300
PING = b'{"action": "ping"}'
MASK = bytes(4)  # a mask that changes nothing


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"), max_streams_per_key=WATCHERS + 50)
    with running_gateway(settings) as running:
        yield running


def streams_open(gateway: Gateway) -> int:
    """How many streams the gateway holds, by its own metrics."""
    lines = gateway.http.get("/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("omnirt_http_streams ")).split()[1]))


def seqs(events: list[Told]) -> list[int]:
    return [int(event.id or 0) for event in events]


# ---------------------------------------------------------------- server-sent events


def test_a_watcher_sees_every_event_as_it_happens_and_the_stream_ends(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.watch(job_id) as watching:
        headers = watching.response.headers
        assert headers["Content-Type"].startswith("text/event-stream")
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Accel-Buffering"] == "no"
        events = watching.events()
        first = next(events)
        assert (first.id, first.name, first.data["seq"]) == ("1", "job_enqueued", 1)
        gateway.worker.run(job_id, steps=3)
        rest = list(events)
    names = [event.name for event in (first, *rest)]
    assert names == ["job_enqueued", "job_started", "stage_start", *["stage_progress"] * 3, "stage_end", "job_finished"]
    assert seqs([first, *rest]) == list(range(1, 9))
    for event in rest:
        assert event.data.keys() == {"seq", "event", "stage", "timestamp_ms", "data"}
        assert (str(event.data["seq"]), event.data["event"]) == (event.id, event.name)


def test_a_waiting_stream_is_kept_alive_by_comments(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.watch(job_id) as watching:
        assert watching.comment()
        started = time.monotonic()
        while watching.comment() != ": keep-alive":
            pass
        assert time.monotonic() - started < 5


def test_a_watcher_that_comes_back_misses_and_repeats_nothing(gateway: Gateway) -> None:
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    seen: list[Told] = []
    for part in range(4):
        headers = {"Last-Event-ID": seen[-1].id or ""} if seen else None
        gateway.worker.steps(lease, 5 * part + 1, 5 * part + 5, 20)
        with gateway.watch(job_id, headers) as watching:
            events = watching.events()
            while not seen or seen[-1].data["data"] != {"step": 5 * part + 3, "total": 20}:
                seen.append(next(events))
    gateway.worker.succeed(lease)
    with gateway.watch(job_id, after=int(seen[-1].id or 0)) as watching:
        seen += watching.events()
    assert seqs(seen) == list(range(1, 24))
    assert seen[-1].name == "job_finished"


@pytest.mark.parametrize("junk", ["", "abc", "-1", "1.5", "0x10", "٣", "0"])
def test_a_resume_from_what_is_no_number_replays_from_the_start(gateway: Gateway, junk: str) -> None:
    job_id = gateway.finished()
    for where in ({"headers": {"Last-Event-ID": junk.encode()}}, {"after": junk}):
        with gateway.watch(job_id, **where) as watching:
            assert seqs(list(watching.events()))[0] == 1


def test_who_has_seen_all_of_a_job_that_is_over_is_told_there_is_nothing_more(gateway: Gateway) -> None:
    job_id = gateway.finished()
    last = gateway.worker.store.get(job_id).last_seq
    for after in (last, last + 1, 10**30):
        answer = gateway.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(after)})
        assert (answer.status_code, answer.content) == (204, b"")
    answer = gateway.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(last - 1)})
    assert answer.text.count("event: job_finished") == 1


@pytest.mark.parametrize("after", ["1", "1000", str(10**30)])
def test_a_resume_beyond_the_end_of_a_job_that_goes_on_waits_for_what_comes(gateway: Gateway, after: str) -> None:
    job_id = gateway.submit()
    with gateway.watch(job_id, {"Last-Event-ID": after}) as watching:
        assert watching.comment()
        gateway.worker.run(job_id, steps=1)
        assert next(watching.events()).name == "job_started"


def test_a_stream_ends_with_the_terminal_event_however_the_job_ends(gateway: Gateway) -> None:
    failed, cancelled = gateway.submit(), gateway.submit()
    gateway.worker.fail(gateway.worker.claim(failed))
    gateway.http.delete(f"/v1/jobs/{cancelled}")
    for job_id, name in ((failed, "job_failed"), (cancelled, "job_cancelled")):
        with gateway.watch(job_id) as watching:
            assert list(watching.events())[-1].name == name


def test_a_stream_ends_when_its_job_is_purged(gateway: Gateway) -> None:
    job_id = gateway.submit()
    gateway.worker.claim(job_id)
    with gateway.watch(job_id) as watching:
        events = watching.events()
        next(events)
        gateway.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})
        assert [event.name for event in events][-1] == "job_cancelled"


def test_a_vanished_watcher_leaves_nothing_behind(gateway: Gateway) -> None:
    job_id = gateway.submit()
    eventually(lambda: streams_open(gateway) == 0)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(gateway.watch(job_id)).comment()
            stack.enter_context(gateway.socket(job_id)).recv(timeout=5)
        assert streams_open(gateway) == 10
    eventually(lambda: streams_open(gateway) == 0)
    assert gateway.http.head(f"/v1/jobs/{job_id}/events").status_code == 200
    assert streams_open(gateway) == 0
    gateway.http.delete(f"/v1/jobs/{job_id}")


def test_three_hundred_watchers_share_one_subscriber(gateway: Gateway) -> None:
    job_id = gateway.submit()
    ended: list[int] = []
    lock = threading.Lock()
    address = f"/v1/jobs/{job_id}/events"
    host, port = gateway.url.removeprefix("http://").split(":")

    def watch() -> None:
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            request = f"GET {address} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            text = b""
            while chunk := connection.recv(65_536):
                text += chunk
        with lock:
            ended.append(text.count(b"\nid: "))

    with ThreadPoolExecutor(WATCHERS) as pool:
        for _ in range(WATCHERS):
            pool.submit(watch)
        eventually(lambda: streams_open(gateway) == WATCHERS, 60)
        subscribers = [client for client in gateway.worker.redis.client_list() if int(client["sub"])]
        assert len(subscribers) == 1, "one subscriber connection per process, however many watch"
        assert gateway.http.get("/healthz").status_code == 200
        gateway.worker.run(job_id, steps=5)
    assert ended == [10] * WATCHERS, "every watcher saw every event"
    eventually(lambda: streams_open(gateway) == 0)


def test_a_watcher_that_takes_nothing_holds_nobody_up_and_still_gets_the_end(gateway: Gateway) -> None:
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.settimeout(20)
        slow.connect((host, int(port)))
        slow.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        eventually(lambda: streams_open(gateway) == 1)
        for step in range(1, 601):
            gateway.worker.tell(lease, EventName.PREVIEW, step=step, mime="image/png", data_b64="x" * 20_000)
        with gateway.watch(job_id, after=0) as watching:
            quick = watching.events()
            assert next(quick).id == "1"
            gateway.worker.succeed(lease)
            assert seqs(list(quick))[-1] == 603
        text = b""
        while chunk := slow.recv(1_000_000):
            text = (text + chunk)[-2_000:]
    assert b"event: job_finished" in text


# ---------------------------------------------------------------- WebSocket


def received(ws: ClientConnection) -> dict[str, Any]:
    """The next message."""
    message: dict[str, Any] = json.loads(ws.recv(timeout=10))
    return message


def close_of(ws: ClientConnection) -> tuple[int | None, list[dict[str, Any]]]:
    """The close code, and what came before it."""
    before = []
    try:
        while True:
            before.append(received(ws))
    except ConnectionClosed as closed:
        return (closed.rcvd.code if closed.rcvd else None), before


def test_a_websocket_tells_the_same_events_and_closes_after_the_terminal_one(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.socket(job_id) as ws:
        first = received(ws)
        assert (first["seq"], first["event"]) == (1, "job_enqueued")
        gateway.worker.run(job_id, steps=2)
        code, rest = close_of(ws)
    assert code == 1000
    told = [event.model_dump(mode="json") for event in gateway.worker.store.events(job_id)]
    assert [first, *rest] == told
    with gateway.socket(job_id, f"?after={told[-2]['seq']}") as ws:
        assert close_of(ws) == (1000, told[-1:])


def test_a_websocket_takes_actions_and_acknowledges_each(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.socket(job_id) as ws:
        assert received(ws)["seq"] == 1
        ws.send('{"action": "ping"}')
        assert received(ws) == {"event": "control_ack", "action": "ping", "ok": True, "job_id": job_id}
        ws.send('{"action": "resume", "after": 0}')
        assert received(ws) == {"event": "control_ack", "action": "resume", "ok": True, "job_id": job_id}
        assert received(ws)["seq"] == 1, "it is told again from there"
        ws.send('{"action": "cancel"}')
        _, rest = close_of(ws)
        assert {"event": "control_ack", "action": "cancel", "ok": True, "job_id": job_id} in rest
        assert [event["event"] for event in rest if "seq" in event] == ["job_cancelled"]
    assert gateway.http.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"


def test_an_action_that_comes_with_the_handshake_is_not_left_lying(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.socket(job_id, "?after=1") as ws:
        started = time.monotonic()
        ws.send('{"action": "ping"}')
        assert received(ws)["action"] == "ping"
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "message",
    [
        "not JSON", "", "[]", "7", '"cancel"', "{}", '{"action": "explode"}', '{"action": 7}', '{"action": "resume"}',
        '{"action": "resume", "after": -1}', '{"action": "resume", "after": "3"}',
        '{"action": "resume", "after": true}',
        '{"action": "cancel", "force": true}', '{"action": NaN}', "[" * 4_000, b"\x00\x01",
    ],
    ids=lambda message: repr(message[:24]),
)  # fmt: skip
def test_nonsense_on_a_websocket_is_answered_and_the_stream_goes_on(gateway: Gateway, message: str | bytes) -> None:
    job_id = gateway.submit()
    with gateway.socket(job_id) as ws:
        assert received(ws)["seq"] == 1
        ws.send(message)
        answer = received(ws)
        assert (answer["event"], "seq" in answer) == ("error", False)
        assert answer["error"]["code"] in {"invalid_json", "validation_failed"}
        gateway.worker.run(job_id, steps=1)
        code, rest = close_of(ws)
    assert code == 1000
    assert rest[-1]["event"] == "job_finished"


def test_a_message_that_is_too_big_ends_the_websocket(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.socket(job_id) as ws:
        received(ws)
        ws.send("x" * 100_000)
        assert close_of(ws)[0] == 1009
    eventually(lambda: streams_open(gateway) == 0)


def test_cancelling_a_job_that_is_over_is_not_ok(gateway: Gateway) -> None:
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    with gateway.socket(job_id) as ws:
        received(ws), received(ws)
        gateway.worker.redis.hset(f"{gateway.settings.key_prefix}:job:{job_id}", "state", "succeeded")
        ws.send('{"action": "cancel"}')
        assert received(ws) == {"event": "control_ack", "action": "cancel", "ok": False, "job_id": job_id}
        gateway.worker.redis.hset(f"{gateway.settings.key_prefix}:job:{job_id}", "state", "running")
        gateway.worker.succeed(lease)
        assert close_of(ws)[0] == 1000


def test_a_websocket_to_no_job_is_closed_with_its_code(gateway: Gateway) -> None:
    with gateway.socket("11111111-2222-3333-4444-555555555555") as ws:
        assert close_of(ws) == (4404, [])


def test_a_websocket_from_elsewhere_is_refused_at_the_handshake(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with pytest.raises(InvalidStatus) as refused, gateway.socket(job_id, origin="http://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    with gateway.socket(job_id, origin=gateway.url) as ws:
        assert received(ws)["seq"] == 1


def test_a_flood_of_messages_is_answered_one_by_one(gateway: Gateway) -> None:
    job_id = gateway.submit()
    with gateway.socket(job_id, "?after=1") as ws:

        def flood() -> None:
            for _ in range(2_000):
                ws.send('{"action": "ping"}')

        sender = threading.Thread(target=flood)
        sender.start()
        answers = [received(ws) for _ in range(2_000)]
        sender.join(10)
    assert {answer["event"] for answer in answers} == {"control_ack"}


def pour(connection: socket.socket, content: bytes) -> None:
    """Send all of it, however long that takes. Raises TimeoutError when nothing is taken for the socket's timeout."""
    while content:
        content = content[connection.send(content[:65_536]) :]


def test_who_sends_and_never_reads_is_not_read_for_ever(gateway: Gateway) -> None:
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    preview = EventDraft(EventName.PREVIEW, "denoise", {"step": 1, "mime": "image/png", "data_b64": "x" * 20_000})
    for _ in range(40):
        assert gateway.worker.store.append(lease, [preview] * 10)
    host, port = gateway.url.removeprefix("http://").split(":")
    handshake = (
        f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    pings = b"".join(bytes((0x81, 0x80 | len(PING), *MASK)) + PING for _ in range(100))
    with socket.socket() as rude:
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        rude.settimeout(2)
        rude.connect((host, int(port)))
        rude.sendall(handshake.encode())
        eventually(lambda: streams_open(gateway) == 1)
        with pytest.raises(TimeoutError):
            pour(rude, pings * 2_000)
    eventually(lambda: streams_open(gateway) == 0)
    gateway.http.delete(f"/v1/jobs/{job_id}")


def test_streams_are_counted_and_one_too_many_is_refused(redis_url: str, tmp_path: Path) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path, max_streams_per_key=2)) as gateway, ExitStack() as stack:
        job_id = gateway.submit()
        watching = stack.enter_context(gateway.watch(job_id))
        watching.comment()
        ws = stack.enter_context(gateway.socket(job_id))
        received(ws)
        refused = gateway.http.get(f"/v1/jobs/{job_id}/events")
        assert (refused.status_code, code_of(refused)) == (429, "too_many_streams")
        assert refused.headers["Retry-After"]
        with gateway.socket(job_id) as third:
            assert close_of(third)[0] == 4429
        ws.close()
        eventually(lambda: streams_open(gateway) == 1)
        with gateway.socket(job_id) as third:
            assert received(third)["seq"] == 1


def test_a_gateway_that_is_stopped_ends_its_streams_so_that_clients_resume(redis_url: str, tmp_path: Path) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path)) as gateway, ExitStack() as stack:
        job_id = gateway.submit()
        watching = stack.enter_context(gateway.watch(job_id))
        events = watching.events()
        next(events)
        ws = stack.enter_context(gateway.socket(job_id))
        received(ws)
        stopping = threading.Thread(target=gateway.stop)
        started = time.monotonic()
        stopping.start()
        assert list(events) == [], "no event is invented"
        assert close_of(ws)[0] == 1012
        stopping.join()
        assert time.monotonic() - started < 8
