"""The client where what answers is no gateway, or a gateway in trouble: a scripted HTTP server stands in."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from omnirt_tasks import requests
from omnirt_tasks.client import Client
from omnirt_tasks.contract import EventName, JobRecord, JobState
from omnirt_tasks.errors import GatewayUnreachable, Internal, JobTimeout, QueueFull, StoreUnavailable, ValidationFailed

Answer = Callable[[BaseHTTPRequestHandler], None]
REQUEST = requests.text2image(model="stub", prompt="x")


@pytest.fixture
def scripted() -> Iterator[Callable[..., Client]]:
    """A client of a server that gives these answers in turn, and the last one for ever."""
    servers: list[ThreadingHTTPServer] = []
    clients: list[Client] = []

    def start(*answers: Answer, reconnect_s: float = 5.0) -> Client:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                (left.pop(0) if len(left) > 1 else left[0])(self)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.block_on_close = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        client = Client(f"http://127.0.0.1:{server.server_address[1]}", reconnect_s=reconnect_s)
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.close()
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(status: int, body: str, **headers: str) -> Answer:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return write


def envelope(code: str, **more: object) -> str:
    return json.dumps({"error": {"code": code, "message": "told", "type": "x", "param": None, **more}})


def stream(*pieces: str, pause_s: float = 0.0) -> Answer:
    """An event stream of these pieces, which then breaks off."""

    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for piece in pieces:
            try:
                handler.wfile.write(piece.encode())
            except OSError:
                return
            time.sleep(pause_s)

    return write


def event(seq: int, name: str, **data: object) -> str:
    told = {"seq": seq, "event": name, "stage": "job", "timestamp_ms": 1, "data": data}
    return f"id: {seq}\nevent: {name}\ndata: {json.dumps(told, ensure_ascii=False)}\n\n"


def test_what_is_no_gateway_is_told_as_such(scripted: Callable[..., Client]) -> None:
    for status, body in ((502, "<html>Bad gateway</html>"), (200, "<html>Hello</html>"), (404, '{"detail": "no"}')):
        with pytest.raises(GatewayUnreachable):
            scripted(answer(status, body), reconnect_s=0.2).submit(REQUEST)


def test_a_gateway_that_is_not_ready_says_so_and_is_still_a_gateway(scripted: Callable[..., Client]) -> None:
    away = {"ok": False, "job_store_backend": "redis", "remote_worker_count": 0, "queues": {}}

    assert not scripted(answer(503, json.dumps(away))).ready().ok
    for status, body in ((503, "<html>Bad gateway</html>"), (200, "{}"), (200, "<html>Hello</html>")):
        with pytest.raises(GatewayUnreachable, match=f"answered {status}, and not as a gateway does"):
            scripted(answer(status, body)).ready()


def test_every_problem_of_the_envelope_is_kept(scripted: Callable[..., Client]) -> None:
    details = [
        {"loc": "config.width", "rule": "multiple_of", "message": "513"},
        {"loc": "x", "rule": "y", "message": "z"},
    ]

    with pytest.raises(ValidationFailed) as caught:
        scripted(answer(422, envelope("validation_failed", details=details))).submit(REQUEST)

    assert [problem.model_dump() for problem in caught.value.details] == details
    assert caught.value.message == "told"


def test_what_the_gateway_refused_is_not_sent_again(scripted: Callable[..., Client]) -> None:
    client = scripted(answer(429, envelope("queue_full"), Retry_After="7"), answer(500, envelope("internal")))

    with pytest.raises(QueueFull) as caught:
        client.submit(REQUEST)

    assert (caught.value.retry_after_s, caught.value.retryable) == (7, True)


def test_a_submit_that_may_have_got_lost_is_sent_again_under_the_same_key(scripted: Callable[..., Client]) -> None:
    keys: list[str | None] = []

    def noting(then: Answer) -> Answer:
        def write(handler: BaseHTTPRequestHandler) -> None:
            keys.append(handler.headers["Idempotency-Key"])
            handler.rfile.read(int(handler.headers["Content-Length"]))
            then(handler)

        return write

    def break_off(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True

    record = JobRecord(
        id="j", job_id="j", state=JobState.QUEUED, backend="cpu-stub", request={}, enqueued_at_ms=1
    ).model_dump_json()
    troubles = (break_off, answer(502, "<html>Bad gateway</html>"), answer(503, envelope("store_unavailable")))
    client = scripted(*map(noting, (*troubles, answer(202, record), *troubles, answer(202, record))))

    assert client.submit(REQUEST).id == "j"
    assert client.submit(REQUEST, idempotency_key="mine").id == "j"

    first, *others = keys[:4]
    assert first
    assert others == [first] * 3
    assert keys[4:] == ["mine"] * 4
    assert first != "mine"


@pytest.mark.parametrize(
    "trouble",
    [answer(503, "down"), answer(503, envelope("store_unavailable"))],
    ids=["no gateway", "no store"],
)
def test_a_submit_is_given_up_when_the_trouble_stays(scripted: Callable[..., Client], trouble: Answer) -> None:
    client = scripted(trouble, reconnect_s=0.3)

    began = time.monotonic()
    with pytest.raises((GatewayUnreachable, StoreUnavailable)) as caught:
        client.submit(REQUEST)

    assert caught.value.retryable
    assert time.monotonic() - began < 5


def test_a_code_of_a_newer_gateway_is_internal(scripted: Callable[..., Client]) -> None:
    with pytest.raises(Internal, match="told"):
        scripted(answer(418, envelope("is_a_teapot"))).submit(REQUEST)


def test_a_stream_that_breaks_again_and_again_gives_each_event_once(scripted: Callable[..., Client]) -> None:
    first = stream(event(1, "job_enqueued"), event(2, "job_started"), "id: 3\nevent: stage_st")
    second = stream(event(2, "job_started"), event(3, "stage_start"), ": keep-alive\n\n")
    unavailable = answer(503, envelope("store_unavailable"))
    third = stream(event(4, "something_new"), event(5, "job_finished", outputs=["a"]), event(6, "job_failed"))

    events = list(scripted(first, second, unavailable, third).events("j"))

    assert [(told.seq, told.event) for told in events] == [
        (1, EventName.JOB_ENQUEUED),
        (2, EventName.JOB_STARTED),
        (3, EventName.STAGE_START),
        (5, EventName.JOB_FINISHED),
    ]


def test_where_it_broke_is_told_to_the_gateway(scripted: Callable[..., Client]) -> None:
    asked: list[str | None] = []

    def second(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.headers["Last-Event-ID"])
        stream(event(3, "job_finished"))(handler)

    list(scripted(stream(event(1, "job_enqueued"), event(2, "job_started")), second).events("j"))

    assert asked == ["2"]


def test_a_line_separator_within_an_event_does_not_break_it(scripted: Callable[..., Client]) -> None:
    client = scripted(stream(event(1, "job_failed", error="one\u2028two\x85three")))

    (told,) = client.events("j")

    assert told.data == {"error": "one\u2028two\x85three"}


@pytest.mark.parametrize(
    "trouble",
    [answer(503, "down"), answer(503, envelope("store_unavailable")), stream(": hello\n\n"), stream()],
    ids=["no gateway", "no store", "streams that end", "empty streams"],
)
def test_a_gateway_that_stays_away_is_given_up(scripted: Callable[..., Client], trouble: Answer) -> None:
    client = scripted(stream(event(1, "job_enqueued")), trouble, reconnect_s=0.3)

    began = time.monotonic()
    with pytest.raises((GatewayUnreachable, StoreUnavailable)) as caught:
        list(client.events("j"))

    assert caught.value.retryable
    assert 0.2 < time.monotonic() - began < 3


@pytest.mark.parametrize("pieces", [(), (": keep-alive\n\n",) * 40], ids=["silent", "only keep-alives"])
def test_a_wait_ends_in_time_however_silent_the_stream(
    scripted: Callable[..., Client], pieces: tuple[str, ...]
) -> None:
    def hold(handler: BaseHTTPRequestHandler) -> None:
        stream(event(1, "job_enqueued"), *pieces, pause_s=0.05)(handler)
        if not pieces:
            time.sleep(0.6)

    began = time.monotonic()
    with pytest.raises(JobTimeout):
        scripted(hold).wait("j", timeout_s=0.5)

    assert 0.4 < time.monotonic() - began < 1.5
