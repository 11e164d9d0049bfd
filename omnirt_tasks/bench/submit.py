"""How many jobs a second the gateway accepts, against a naive Flask handler that calls `apply_async`.

Both run under the same gunicorn settings on one embedded broker, and are asked in turns by clients with kept-alive
connections, in a process of their own. The naive handler validates nothing and writes no record. `naive` has a result
backend, as Celery's first steps show it; `naive-bare` ignores results, which spares it a subscription per task.
"""

import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flask import Flask, Response, jsonify, request

from omnirt_tasks.bench.figures import MS_PER_S, Row, Table, percentile
from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.errors import OperatorError
from omnirt_tasks.graces import GATEWAY_GRACE_S, GATEWAY_MARGIN_S
from omnirt_tasks.settings import PREFIX, Settings, load_settings

BODY = json.dumps(
    {
        "task": "text2image",
        "model": "shapes",
        "inputs": {"prompt": "a large red circle on a blue background"},
        "config": {"preset": "fast", "seed": 7},
        "metadata": {"run": "bench"},
    }
).encode()
OURS, NAIVE, NAIVE_BARE = "ours", "naive", "naive-bare"
PATHS = {OURS: "/v1/jobs", NAIVE: "/jobs", NAIVE_BARE: "/jobs"}
WARM_UP_S = 1.0
START_TIMEOUT_S = 60.0
QUEUE_LIMIT = 10_000_000
LISTENING = "listening on "


@dataclass(frozen=True)
class Load:
    """What one server took in one turn: requests a second, and every latency in seconds."""

    rate_per_s: float
    latencies_s: Sequence[float]


def measure(rounds: int, seconds: float, clients: int) -> Iterator[int | Table]:
    """Ask each server for `seconds` in each of the rounds; yields how many are done, then the table."""
    found: dict[str, list[Load]] = {kind: [] for kind in PATHS}
    with ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="omnirt-bench-", ignore_cleanup_errors=True))
        ports = {kind: stack.enter_context(running_server(kind, broker.url, Path(folder))) for kind in PATHS}
        for done in range(1, rounds + 1):
            for kind, path in PATHS.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found[kind].append(pool.apply(ask, (ports[kind], path, clients, seconds)))
            yield done
    yield _table(found, rounds, seconds, clients)


def make_naive(settings: Settings, *, ignore_result: bool) -> Flask:
    """The handler that one would write first."""
    from celery import Celery

    celery = Celery("naive", broker=settings.celery_url, backend=settings.celery_url)

    @celery.task(name="naive.generate", ignore_result=ignore_result)
    def generate(body: dict[str, object]) -> None:
        """Never runs here."""

    app = Flask("naive")

    @app.post("/jobs")
    def submit() -> tuple[Response, int]:
        result = generate.apply_async(args=(request.get_json(),), queue="naive")
        return jsonify({"id": result.id}), 202

    return app


def serve(kind: str) -> None:
    """Run one of the servers in this process, with the settings of its environment."""
    from web import server

    if kind == OURS:
        server.serve(load_settings())
    else:
        server.serve(load_settings(), load=lambda settings: make_naive(settings, ignore_result=kind == NAIVE_BARE))


def ask(port: int, path: str, clients: int, seconds: float) -> Load:
    """Load one server from this process, with a thread and a connection for each client."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    message = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    taken: list[float] = []
    begin = time.perf_counter() + WARM_UP_S
    end = begin + seconds

    def client() -> None:
        mine = []
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (started := time.perf_counter()) < end:
                connection.sendall(message)
                _read_answer(connection)
                if started >= begin:
                    mine.append(time.perf_counter() - started)
        taken.extend(mine)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(len(taken) / seconds, taken)


@contextmanager
def running_server(kind: str, redis_url: str, folder: Path, **settings: str) -> Iterator[int]:
    """One server as a process, with these settings beside the bench's own; yields its port."""
    environment = {
        "OMNIRT_REDIS_URL": redis_url,
        "OMNIRT_KEY_PREFIX": f"bench-{kind}",
        "OMNIRT_PORT": "0",
        "OMNIRT_DATA_DIR": str(folder / kind),
        "OMNIRT_RUN_DIR": str(folder / kind),
        "OMNIRT_LOG_LEVEL": "WARNING",
        "OMNIRT_QUEUE_LIMIT": str(QUEUE_LIMIT),
        "PYTHONUNBUFFERED": "1",
    } | {f"{PREFIX}{name.upper()}": value for name, value in settings.items()}
    listening = threading.Event()
    port = 0

    def read(line: str) -> None:
        nonlocal port
        if line.startswith(LISTENING):
            port = int(line.rsplit(":", 1)[1])
            listening.set()

    child = ChildProcess(
        kind,
        [sys.executable, "-c", f"from omnirt_tasks.bench.submit import serve; serve({kind!r})"],
        env=environment,
        grace_s=GATEWAY_GRACE_S + GATEWAY_MARGIN_S,
        on_line=read,
        on_exit=lambda _: listening.set(),
    )
    try:
        if not listening.wait(START_TIMEOUT_S) or not port:
            raise OperatorError(f"The server {kind!r} did not start: {' '.join(child.last_lines)}")
        yield port
    finally:
        child.stop()


def _read_answer(connection: socket.socket) -> None:
    answer = connection.recv(65_536)
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65_536)
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 202 " not in head.split(b"\r\n", 1)[0]:
        raise OperatorError(f"A submit was not accepted: {answer[:500]!r}")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)


def _table(found: dict[str, list[Load]], rounds: int, seconds: float, clients: int) -> Table:
    def ratio(kind: str) -> float:
        return statistics.median(
            ours.rate_per_s / its.rate_per_s for ours, its in zip(found[OURS], found[kind], strict=True)
        )

    def row(kind: str) -> Row:
        latencies = [latency for load in found[kind] for latency in load.latencies_s]
        rate = statistics.median(load.rate_per_s for load in found[kind])
        spread = (f"{percentile(latencies, percent) * MS_PER_S:.1f}" for percent in (50, 99))
        return Row(kind, (f"{rate:.0f}", *spread, "" if kind == OURS else f"{ratio(kind):.2f}"))

    return Table(
        title="Submits over HTTP against a naive handler",
        columns=("submits/s", "p50 ms", "p99 ms", "ours / it"),
        rows=tuple(row(kind) for kind in PATHS),
        note=(
            f"POST /v1/jobs with validation and record, against Flask + apply_async; {rounds} rounds of {seconds:g} s "
            f"each in turn, {clients} clients with kept-alive connections. The ratio is the median over the rounds."
        ),
    )
