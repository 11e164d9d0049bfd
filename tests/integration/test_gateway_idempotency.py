"""One key, one job: over HTTP, at the same time, through two gateways, and after both and Redis were started again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from omnirt_tasks.client import Client
from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.requests import image2image
from omnirt_tasks.settings import Settings
from tests.support.gateway import REQUEST, Gateway, code_of, gateway_settings, png, running_gateway
from tests.support.waiting import eventually

REPLAYED = "Idempotent-Replayed"


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"), sync_timeout_s=15.0)
    with running_gateway(settings) as running:
        running.worker.announce()
        yield running


def post(gateway: Gateway, key: str, path: str = "/v1/jobs", **more: Any) -> httpx.Response:
    prefer = {"Prefer": more.pop("prefer")} if "prefer" in more else {}
    return gateway.http.post(path, json=REQUEST | more, headers={"Idempotency-Key": key, **prefer})


def count(gateway: Gateway, **metadata: str) -> int:
    """How many jobs there are with this metadata."""
    records = gateway.http.get("/v1/jobs?limit=100").json()["data"]
    return sum(record["metadata"] == metadata for record in records)


def test_the_same_key_and_body_give_the_same_job_and_say_so(gateway: Gateway) -> None:
    first = post(gateway, "again", metadata={"test": "again"})
    gateway.worker.claim(first.json()["id"])
    second = post(gateway, "again", metadata={"test": "again"})

    assert (first.status_code, second.status_code) == (202, 202)
    assert REPLAYED not in first.headers
    assert second.headers[REPLAYED] == "true"
    assert second.headers["Location"] == first.headers["Location"]
    assert second.json()["id"] == first.json()["id"]
    assert (first.json()["state"], second.json()["state"]) == ("queued", "running"), "the record as it stands"
    assert count(gateway, test="again") == 1


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/generate"])
def test_a_finished_job_answers_a_repeat_that_prefers_to_wait_at_once(gateway: Gateway, path: str) -> None:
    body: dict[str, Any] = {"async_run": True, "metadata": {"test": path}}
    job_id = post(gateway, f"wait {path}", path, **body).json()["id"]
    gateway.worker.run(job_id)

    answer = post(gateway, f"wait {path}", path, **body, prefer="wait=10")
    plain = post(gateway, f"wait {path}", path, **body)

    assert (answer.status_code, answer.json()["id"], answer.json()["state"]) == (200, job_id, "succeeded")
    assert answer.headers[REPLAYED] == "true"
    assert (plain.status_code, plain.json()["state"]) == (202, "succeeded")


def test_a_synchronous_repeat_waits_for_the_job_that_there_is(gateway: Gateway) -> None:
    job_id = post(gateway, "sync", metadata={"test": "sync"}).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, gateway, "sync", "/v1/generate", metadata={"test": "sync"})
        gateway.worker.run(job_id)
        answer = asked.result(15)
    late = post(gateway, "sync", "/v1/generate", metadata={"test": "sync"})

    for told in (answer, late):
        assert (told.status_code, told.headers["X-Omnirt-Job-Id"], told.headers[REPLAYED]) == (200, job_id, "true")
        assert told.json()["outputs"]


def test_a_synchronous_repeat_of_a_failed_job_tells_its_failure(gateway: Gateway) -> None:
    job_id = post(gateway, "failed").json()["id"]
    gateway.worker.fail(gateway.worker.claim(job_id))

    answer = post(gateway, "failed", "/v1/generate")

    assert (answer.status_code, code_of(answer), answer.headers[REPLAYED]) == (500, "model_failed", "true")
    assert answer.json()["error"]["job_id"] == job_id


def test_another_body_under_the_same_key_is_refused(gateway: Gateway) -> None:
    post(gateway, "other", metadata={"test": "other"})
    for path in ("/v1/jobs", "/v1/generate"):
        answer = post(gateway, "other", path, inputs={"prompt": "a blue circle"})
        assert (answer.status_code, code_of(answer)) == (422, "idempotency_mismatch")
        assert "blue circle" not in answer.text


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "kéy", "a\tb"])
def test_what_is_no_key_is_refused_by_name_with_nothing_queued(gateway: Gateway, key: str) -> None:
    before = gateway.http.get("/v1/jobs?limit=1").json()["data"][:1]
    answer = gateway.http.post("/v1/jobs", json=REQUEST, headers=[(b"Idempotency-Key", key.encode("latin-1"))])
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "Idempotency-Key")
    assert gateway.http.get("/v1/jobs?limit=1").json()["data"][:1] == before


@pytest.mark.parametrize(("sent", "same"), [("a b", '"a b"'), (r"q\"x", r'"q\\\"x"'), ("k" * 255, f'"{"k" * 255}"')])
def test_a_key_in_quotes_is_the_key_inside(gateway: Gateway, sent: str, same: str) -> None:
    assert post(gateway, sent).json()["id"] == post(gateway, same).json()["id"]


def test_a_purged_job_frees_its_key(gateway: Gateway) -> None:
    first = post(gateway, "purged").json()["id"]
    gateway.http.delete(f"/v1/jobs/{first}?purge=true")

    second = post(gateway, "purged")

    assert second.json()["id"] != first
    assert REPLAYED not in second.headers


def test_each_owner_has_keys_of_his_own(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("anna:key-of-anna\nbert:key-of-bert\n")
    (tmp_path / "keys").chmod(0o600)
    settings = gateway_settings(redis_url, tmp_path, api_keys_file=tmp_path / "keys")
    with running_gateway(settings, "key-of-anna") as gateway:
        bert = {"Authorization": "Bearer key-of-bert", "Idempotency-Key": "shared"}
        mine = post(gateway, "shared").json()["id"]
        theirs = gateway.http.post("/v1/jobs", json=REQUEST | {"inputs": {"prompt": "a star"}}, headers=bert)
        assert theirs.status_code == 202, theirs.text
        assert theirs.json()["id"] != mine


def test_many_at_once_through_two_gateways_make_one_job(gateway: Gateway) -> None:
    with running_gateway(gateway.settings) as other, ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(post, place, "storm", metadata={"test": "storm"}) for place in (gateway, other) * 24]
        answers = [future.result(20) for future in sent]

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum(REPLAYED not in answer.headers for answer in answers) == 1, "one of them made it"
    assert count(gateway, test="storm") == 1
    messages = gateway.messages()
    assert sum(answers[0].json()["id"] in message for message in messages) <= 1, "nobody sent it twice"


def test_a_key_stands_for_its_job_after_gateway_and_redis_were_started_again(tmp_path: Path) -> None:
    with EmbeddedBroker(data_dir=tmp_path / "broker") as broker:
        settings = gateway_settings(broker.url, tmp_path)
        with running_gateway(settings) as gateway:
            job_id = post(gateway, "lasting").json()["id"]
        assert broker.child is not None
        broker.child.kill()
        broker.stop()
        broker.start()
        with running_gateway(settings) as gateway:
            again = post(gateway, "lasting")
            changed = post(gateway, "lasting", inputs={"prompt": "a star"})

    assert (again.json()["id"], again.headers[REPLAYED]) == (job_id, "true")
    assert code_of(changed) == "idempotency_mismatch"


def test_a_key_is_free_again_when_its_time_is_over(redis_url: str, tmp_path: Path) -> None:
    settings: Settings = gateway_settings(redis_url, tmp_path, idempotency_ttl_s=0.3)
    with running_gateway(settings) as gateway:
        first = post(gateway, "short").json()["id"]
        eventually(lambda: post(gateway, "short").json()["id"] != first)


def test_a_local_file_under_a_key_of_the_caller_s_is_the_same_request_again(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(64, 64))
    request = image2image(model="sdxl-base-1.0", image=tmp_path / "red.png", prompt="x", backend="cuda")
    with Client(gateway.url) as client:
        first = client.submit(request, idempotency_key="picture")
        again = client.submit(request, idempotency_key="picture")
        other = client.submit(request)

    assert again.id == first.id
    assert other.id != first.id, "without a key each submit is one of its own"
