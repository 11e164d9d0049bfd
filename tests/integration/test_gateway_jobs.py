"""The life of a job over HTTP: submit, wait, look, list, fetch, cancel, purge."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from omnirt_tasks.contract import EventName, GenerateResult, JobRecord
from tests.support.collector import Collector
from tests.support.files import files_in
from tests.support.gateway import QUEUE, REQUEST, Gateway, code_of, gateway_settings, png, running_gateway
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"), sync_timeout_s=15.0)
    with running_gateway(settings) as running:
        running.worker.announce()
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def submitted(gateway: Gateway, known: set[str]) -> str:
    """The job that was submitted since `known` were."""
    return eventually(lambda: next(iter(ids(gateway) - known), None)) or ""


def ids(gateway: Gateway) -> set[str]:
    return {record["id"] for record in gateway.http.get("/v1/jobs?limit=100").json()["data"]}


def test_a_submitted_job_is_accepted_with_its_record_and_its_address(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/jobs", json=REQUEST | {"metadata": {"who": "me"}})
    record = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/jobs/{record['id']}"
    assert answer.headers["Retry-After"] == "1"
    assert record.keys() == JobRecord.model_fields.keys(), "every key is always present"
    assert record["id"] == record["job_id"]
    assert (record["state"], record["attempt"], record["metadata"]) == ("queued", 0, {"who": "me"})
    assert record["queue"]["name"] == QUEUE
    assert record["queue"]["workers"] == 1
    assert record["queue"]["position"] >= 1
    assert record["request"]["async_run"] is True

    again = gateway.http.get(answer.headers["Location"]).json()
    assert again == record
    message = gateway.messages()[0]
    assert record["id"] in message
    assert "a red circle" not in message, "the message carries the id alone"


def test_the_position_counts_from_one_in_the_order_of_arrival(gateway: Gateway) -> None:
    first, second = gateway.submit(), gateway.submit()
    places = [gateway.http.get(f"/v1/jobs/{job_id}").json()["queue"]["position"] for job_id in (first, second)]
    assert places[1] == places[0] + 1
    gateway.worker.run(first)
    assert gateway.http.get(f"/v1/jobs/{second}").json()["queue"]["position"] == places[0]
    assert gateway.http.get(f"/v1/jobs/{first}").json()["queue"] is None


def test_a_synchronous_request_is_answered_with_the_result(gateway: Gateway, pool: ThreadPoolExecutor) -> None:
    known = ids(gateway)
    asked = pool.submit(gateway.http.post, "/v1/generate", json=REQUEST)
    job_id = submitted(gateway, known)
    gateway.worker.run(job_id)
    answer = asked.result(10)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Omnirt-Job-Id"] == job_id
    result = GenerateResult.model_validate(answer.json())
    address = f"/v1/jobs/{job_id}/artifacts/0.png"
    assert [(output.path, output.url) for output in (*result.outputs, *result.metadata.artifacts)] == [
        (address,) * 2
    ] * 2
    assert gateway.http.get(address).content == png()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("model_failed", 500),
        ("non_finite_output", 500),
        ("out_of_memory", 500),
        ("worker_lost", 503),
        ("timeout", 504),
        ("code of tomorrow", 500),
    ],
)
def test_a_failed_job_answers_a_synchronous_request_with_the_status_of_its_code(
    gateway: Gateway, pool: ThreadPoolExecutor, code: str, status: int
) -> None:
    known = ids(gateway)
    asked = pool.submit(gateway.http.post, "/v1/generate", json=REQUEST)
    job_id = submitted(gateway, known)
    gateway.worker.fail(gateway.worker.claim(job_id), code)
    answer = asked.result(10)
    assert answer.status_code == status
    assert code_of(answer) == ("internal" if code == "code of tomorrow" else code)
    assert answer.json()["error"]["job_id"] == job_id


def test_a_synchronous_request_whose_job_is_cancelled_is_409(gateway: Gateway, pool: ThreadPoolExecutor) -> None:
    known = ids(gateway)
    asked = pool.submit(gateway.http.post, "/v1/generate", json=REQUEST)
    job_id = submitted(gateway, known)
    gateway.http.delete(f"/v1/jobs/{job_id}")
    answer = asked.result(10)
    assert (answer.status_code, code_of(answer), answer.json()["error"]["job_id"]) == (409, "job_cancelled", job_id)


def test_generate_may_be_asked_to_run_asynchronously(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/generate", json=REQUEST | {"async_run": True})
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    assert answer.headers["Location"]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/generate"])
def test_a_caller_may_prefer_to_wait(gateway: Gateway, pool: ThreadPoolExecutor, path: str) -> None:
    body = REQUEST | {"async_run": True}
    known = ids(gateway)
    asked = pool.submit(gateway.http.post, path, json=body, headers={"Prefer": "respond-async, wait=3600"})
    gateway.worker.run(submitted(gateway, known))
    answer = asked.result(10)
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=60", "more than a minute counts as one"
    assert answer.json()["result"]["outputs"]

    late = gateway.http.post(path, json=body, headers={"Prefer": "wait=0"})
    assert (late.status_code, late.json()["state"]) == (202, "queued")
    assert late.headers["Preference-Applied"] == "wait=0"

    plain = gateway.http.post(path, json=body, headers={"Prefer": "wait=soon"})
    assert plain.status_code == 202
    assert "Preference-Applied" not in plain.headers


def test_jobs_are_listed_newest_first_page_by_page(gateway: Gateway) -> None:
    made = [gateway.submit(metadata={"n": str(n)}) for n in range(5)]
    gateway.worker.run(made[0])
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2, "model": "stub", "task": "text2image"}
    while len(seen) < 5:
        page = gateway.http.get("/v1/jobs", params=query).json()
        assert page["object"] == "list"
        assert all(record["result"] is None for record in page["data"])
        assert page["has_more"] == (page["next_cursor"] is not None)
        seen += [record["id"] for record in page["data"]]
        query["cursor"] = page["next_cursor"]
    assert seen[:5] == made[::-1]

    over = gateway.http.get("/v1/jobs", params={"state": "succeeded", "limit": 100}).json()
    assert made[0] in {record["id"] for record in over["data"]}
    assert {record["state"] for record in over["data"]} == {"succeeded"}
    assert gateway.http.get("/v1/jobs?model=shapes").json()["data"] == []


def test_a_running_job_is_cancelled_by_its_holder(gateway: Gateway) -> None:
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    asked = [gateway.http.delete(f"/v1/jobs/{job_id}").json() for _ in range(2)]
    assert [answer["cancel"] for answer in asked] == ["requested", "requested"]
    assert asked[0]["cancel_requested"]
    gateway.worker.give_in(lease)
    told = gateway.http.delete(f"/v1/jobs/{job_id}").json()
    assert (told["cancel"], told["state"]) == ("already_finished", "cancelled")


@pytest.mark.parametrize("stage", ["queued", "running", "succeeded"])
def test_a_purged_job_leaves_nothing(gateway: Gateway, stage: str) -> None:
    job_id = gateway.submit()
    if stage != "queued":
        lease = gateway.worker.claim(job_id)
    if stage == "succeeded":
        gateway.worker.succeed(lease)
    answer = gateway.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/events", "/trace", "/artifacts/0.png"):
        assert code_of(gateway.http.get(f"/v1/jobs/{job_id}{path}")) == "job_not_found"
    left = [
        key for key in gateway.worker.redis.keys(f"{gateway.settings.key_prefix}:*{job_id}*") if "celery" not in key
    ]
    assert left == []
    assert not [file for file in files_in(gateway.settings.data_dir) if job_id in str(file)]
    assert gateway.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"}).status_code == 404


@pytest.fixture
def picture(gateway: Gateway) -> str:
    """The address of an artifact."""
    return f"/v1/jobs/{gateway.finished()}/artifacts/0.png"


def test_an_artifact_comes_with_safe_headers_and_its_sum(gateway: Gateway, picture: str) -> None:
    answer = gateway.http.get(picture)
    assert (answer.status_code, answer.content) == (200, png())
    headers = answer.headers
    assert headers["Content-Type"] == "image/png"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Disposition"] == 'inline; filename="0.png"'
    assert headers["ETag"] == f'"{hashlib.sha256(png()).hexdigest()}"'
    assert headers["Accept-Ranges"] == "bytes"
    assert int(headers["Content-Length"]) == len(png())

    known = gateway.http.get(picture, headers={"If-None-Match": headers["ETag"]})
    assert (known.status_code, known.content) == (304, b"")
    assert gateway.http.head(picture).headers["Content-Length"] == headers["Content-Length"]


def test_a_range_of_an_artifact_is_answered_alone(gateway: Gateway, picture: str) -> None:
    whole = png()
    part = gateway.http.get(picture, headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, whole[1:4])
    assert part.headers["Content-Range"] == f"bytes 1-3/{len(whole)}"
    assert gateway.http.get(picture, headers={"Range": "bytes=-5"}).content == whole[-5:]
    stale = gateway.http.get(picture, headers={"Range": "bytes=1-3", "If-Range": '"another"'})
    assert (stale.status_code, stale.content) == (200, whole)
    for ignored in ({"Range": "lines=1-2"}, {"Range": "bytes=0-1,4-5"}, {"Range": "x"}, {"If-Match": '"another"'}):
        answer = gateway.http.get(picture, headers=ignored)
        assert (answer.status_code, answer.content) == (200, whole)
    beyond = gateway.http.get(picture, headers={"Range": "bytes=99999-"})
    assert (beyond.status_code, code_of(beyond)) == (416, "range_not_satisfiable")
    assert beyond.headers["Content-Range"] == f"bytes */{len(whole)}"


def test_there_is_no_artifact_before_the_job_has_succeeded(gateway: Gateway) -> None:
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    assert code_of(gateway.http.get(f"/v1/jobs/{job_id}/artifacts/0.png")) == "artifact_not_found"
    gateway.worker.fail(lease)
    assert code_of(gateway.http.get(f"/v1/jobs/{job_id}/artifacts/0.png")) == "artifact_not_found"


def test_what_a_browser_could_run_comes_as_bytes(gateway: Gateway) -> None:
    job_id = gateway.submit()
    gateway.worker.succeed(gateway.worker.claim(job_id), {"0.html": b"<script>alert(1)</script>"}, mime="text/html")
    answer = gateway.http.get(f"/v1/jobs/{job_id}/artifacts/0.html")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("form", [False, True], ids=["raw", "form"])
def test_an_upload_is_told_by_its_bytes(gateway: Gateway, form: bool) -> None:
    content = png()
    if form:
        answer = gateway.http.post("/v1/uploads", files={"file": ("a.exe", content, "text/html")})
    else:
        answer = gateway.http.post("/v1/uploads", content=content, headers={"Content-Type": "text/html"})
    assert answer.status_code == 201, answer.text
    told = answer.json()
    assert (told["mime"], told["size_bytes"]) == ("image/png", len(content))
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    assert told.keys() == {"id", "mime", "size_bytes", "sha256", "expires_at_ms"}


def test_models_are_listed_once_each_with_their_limits(gateway: Gateway) -> None:
    models = {model["id"]: model for model in gateway.http.get("/v1/models").json()["data"]}
    stub = models["stub"]
    assert stub["object"] == "model"
    width = stub["limits"]["text2image"]["width"]
    assert (width["min"], width["max"], width["multiple_of"], width["default"]) == (64, 512, 8, 64)
    for model in models.values():
        for name in (model["id"], *model["aliases"]):
            assert gateway.http.get(f"/v1/models/{name}").json() == model
    tier = {model["id"] for model in gateway.http.get("/v1/models?tier=experimental").json()["data"]}
    assert tier == {model["id"] for model in models.values() if model["tier"] == "experimental"}


def test_the_trace_of_a_job_is_a_root_that_covers_its_stages(gateway: Gateway) -> None:
    job_id = gateway.submit()
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    lease = gateway.worker.claim(job_id)
    gateway.worker.tell(lease, EventName.STAGE_START, "load")
    gateway.worker.tell(lease, EventName.STAGE_END, "load", elapsed_ms=1)
    gateway.worker.tell(lease, EventName.STAGE_START, "denoise")
    open_trace = gateway.http.get(f"/v1/jobs/{job_id}/trace").json()
    assert [span["status"] for span in open_trace["spans"]] == ["unset", "ok", "unset"]

    gateway.worker.fail(lease)
    trace = gateway.http.get(f"/v1/jobs/{job_id}/trace").json()
    root, *stages = trace["spans"]
    assert (trace["job_id"], trace["task"], trace["model"], trace["state"]) == (job_id, "text2image", "stub", "failed")
    assert (root["parent_span_id"], root["status"]) == (None, "error")
    assert [(span["stage"], span["status"]) for span in stages] == [("load", "ok"), ("denoise", "error")]
    assert {span["parent_span_id"] for span in stages} == {root["span_id"]}
    for span in stages:
        assert root["started_at_ms"] <= span["started_at_ms"] <= span["ended_at_ms"] <= root["ended_at_ms"]
    assert len({span["span_id"] for span in trace["spans"]}) == len(trace["spans"])

    mine = gateway.http.post(
        "/v1/jobs", json=REQUEST, headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    ).json()
    assert mine["trace_id"] == trace_id


def test_readiness_tells_the_queues(gateway: Gateway) -> None:
    gateway.submit()
    told = gateway.http.get("/readyz")
    assert told.status_code == 200
    ready = told.json()
    assert (ready["ok"], ready["job_store_backend"], ready["remote_worker_count"]) == (True, "redis", 1)
    assert ready["queues"][QUEUE]["workers"] == 1
    assert ready["queues"][QUEUE]["waiting"] >= 1


def test_tags_are_told_neither_by_readiness_nor_by_metrics(redis_url: str, tmp_path: Any) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path)) as gateway:
        queues = (QUEUE, f"{QUEUE}+eu", f"{QUEUE}+gold", f"{QUEUE}+eu+gold")
        gateway.worker.announce()
        gateway.worker.announce("tagged", queues)
        for tags in ([], ["eu"], ["gold", "eu"], ["nobody-has-it"]):
            job_id = gateway.submit(tags=tags, priority="high" if "eu" in tags else "normal")
        gateway.worker.claim(job_id)

        ready = gateway.http.get("/readyz").json()
        text = gateway.http.get("/metrics").text

    waiting = {"high": 2, "normal": 1}
    assert ready["queues"] == {QUEUE: {"workers": 2, "waiting": 3, "running": 1, "waiting_by_priority": waiting}}
    assert [line for line in text.splitlines() if "queue=" in line] == [
        f'omnirt_queue_depth{{priority="high",queue="{QUEUE}"}} 2.0',
        f'omnirt_queue_depth{{priority="normal",queue="{QUEUE}"}} 1.0',
        f'omnirt_queue_depth{{priority="low",queue="{QUEUE}"}} 0.0',
        f'omnirt_queue_running{{queue="{QUEUE}"}} 1.0',
        f'omnirt_queue_workers{{queue="{QUEUE}"}} 2.0',
    ]


@pytest.mark.parametrize(("path", "headers"), [("/v1/generate", {}), ("/v1/jobs", {"Prefer": "wait=20"})])
def test_who_waits_while_the_gateway_is_stopped_is_told_the_job_that_goes_on(
    redis_url: str, tmp_path: Any, path: str, headers: dict[str, str], pool: ThreadPoolExecutor
) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path)) as gateway:
        asked = pool.submit(httpx.post, f"{gateway.url}{path}", json=REQUEST, headers=headers, timeout=20)
        job_id = submitted(gateway, set())
        gateway.stop()
        answer = asked.result(10)

        assert (answer.status_code, code_of(answer)) == (503, "store_unavailable")
        assert "goes on" in answer.json()["error"]["message"]
        assert answer.json()["error"]["job_id"] == answer.headers["X-Omnirt-Job-Id"] == job_id
        assert answer.headers["Location"] == f"/v1/jobs/{job_id}"
        gateway.worker.run(job_id)
        assert gateway.worker.store.get(job_id).record.finished


def test_the_span_of_a_submit_reaches_the_collector_in_the_trace_of_its_job(redis_url: str, tmp_path: Any) -> None:
    with (
        Collector() as collector,
        running_gateway(gateway_settings(redis_url, tmp_path, otlp_endpoint=collector.endpoint)) as gateway,
    ):
        job_id = gateway.submit()
        trace_id = gateway.http.get(f"/v1/jobs/{job_id}").json()["trace_id"]
        gateway.stop()
        span = eventually(lambda: collector.spans.get("omnirt.submit"))

    assert span is not None
    assert span.trace_id.hex() == trace_id
    assert set(collector.services) == {"omnirt-gateway"}


def test_metrics_have_every_name_from_the_start_and_no_job_id(gateway: Gateway) -> None:
    job_id = gateway.finished()
    text = gateway.http.get("/metrics").text
    for name in (
        "omnirt_jobs_total", "omnirt_stage_duration_seconds", "omnirt_queue_depth", "omnirt_cache_hits_total",
        "omnirt_vram_peak_bytes", "omnirt_http_requests_total", "omnirt_http_streams",
    ):  # fmt: skip
        assert f"# TYPE {name.removesuffix('_total')}" in text
    assert 'omnirt_jobs_total{execution_mode="legacy_call",model="stub",state="succeeded",task="text2image"}' in text
    assert f'omnirt_queue_depth{{priority="normal",queue="{QUEUE}"}}' in text
    assert 'route="/v1/jobs/<job_id>"' in text
    assert job_id not in text


def test_a_gateway_gives_back_what_a_dead_worker_held(gateway: Gateway) -> None:
    job_id = gateway.submit()
    gateway.worker.claim(job_id, lease_ms=50)
    eventually(lambda: gateway.http.get(f"/v1/jobs/{job_id}").json()["state"] == "queued")
    names = [event.event for event in gateway.worker.store.events(job_id)]
    assert names[-1] == EventName.JOB_REQUEUED


def test_a_synchronous_request_that_takes_too_long_is_told_the_job_that_goes_on(redis_url: str, tmp_path: Any) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path, sync_timeout_s=0.3)) as gateway:
        answer = gateway.http.post("/v1/generate", json=REQUEST)
        assert (answer.status_code, code_of(answer)) == (504, "timeout")
        job_id = answer.json()["error"]["job_id"]
        assert answer.headers["X-Omnirt-Job-Id"] == job_id
        assert gateway.http.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"


def test_a_full_queue_takes_no_more(redis_url: str, tmp_path: Any) -> None:
    with running_gateway(gateway_settings(redis_url, tmp_path, queue_limit=2)) as gateway:
        jobs = [gateway.submit(), gateway.submit()]
        answer = gateway.http.post("/v1/jobs", json=REQUEST)
        assert (answer.status_code, code_of(answer)) == (429, "queue_full")
        assert int(answer.headers["Retry-After"]) >= 1
        gateway.worker.run(jobs[0])
        gateway.submit()


def test_many_synchronous_requests_wait_without_asking_redis(gateway: Gateway) -> None:
    known = ids(gateway)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{gateway.url}/v1/generate", json=REQUEST, timeout=20))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    mine = eventually(lambda: found if len(found := ids(gateway) - known) == 20 else None)
    assert mine is not None
    commands = gateway.worker.redis.info("commandstats")
    hgetalls = commands["cmdstat_hgetall"]["calls"]
    threading.Event().wait(1.0)
    waited = gateway.worker.redis.info("commandstats")["cmdstat_hgetall"]["calls"] - hgetalls
    assert waited < 20, f"{waited} reads of records in a second in which nothing happened"
    for job_id in mine:
        gateway.worker.run(job_id)
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [200] * 20
