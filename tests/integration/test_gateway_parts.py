"""A job that runs in parts is one job to whoever asks: one record, one stream, one cancel, and no part in sight."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from omnirt_tasks.contract import Event, EventName
from omnirt_tasks.jobs.values import Lease, Requeue, part_id
from tests.support.files import files_in
from tests.support.gateway import REQUEST, Gateway, code_of, gateway_settings, png, running_gateway
from tests.support.waiting import eventually

PICTURES: dict[str, Any] = REQUEST | {"config": {"num_images_per_prompt": 10, "num_inference_steps": 3, "seed": 40}}
PARTS = ((0, 4), (4, 3), (7, 3))  # where each begins, and how many pictures it has
PART_PATHS = ("", "/events", "/trace", "/artifacts/0.png")


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"))
    with running_gateway(settings) as running:
        running.worker.announce()
        yield running


def record_of(gateway: Gateway, job_id: str) -> dict[str, Any]:
    record: dict[str, Any] = gateway.http.get(f"/v1/jobs/{job_id}").json()
    return record


def begin(gateway: Gateway, job_id: str, part: int) -> Lease:
    return gateway.worker.claim(part_id(job_id, part))


def finish(gateway: Gateway, lease: Lease, part: int) -> None:
    first, count = PARTS[part]
    gateway.worker.succeed(lease, {f"{first + index}.png": png(8 + first + index) for index in range(count)})


def run_parts(gateway: Gateway, job_id: str, order: tuple[int, ...] = (0, 1, 2)) -> None:
    for part in order:
        lease = begin(gateway, job_id, part)
        gateway.worker.steps(lease, 1, 3, 3)
        finish(gateway, lease, part)


def test_a_large_job_is_accepted_as_one_with_its_parts_counted(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)

    record = record_of(gateway, job_id)

    assert record["parts"] == {"total": 3, "queued": 3, "running": 0, "succeeded": 0}
    assert record["request"]["config"]["num_images_per_prompt"] == 10
    assert record["queue"]["position"] >= 1
    assert sum(job_id in message for message in gateway.messages()) == 3
    assert record_of(gateway, gateway.submit())["parts"] is None


def test_its_outputs_come_in_order_whoever_ends_first_and_each_is_fetched(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)

    run_parts(gateway, job_id, order=(2, 0, 1))

    record = record_of(gateway, job_id)
    assert (record["state"], record["parts"]["succeeded"]) == ("succeeded", 3)
    outputs = record["result"]["outputs"]
    assert [output["name"] for output in outputs] == [f"{index}.png" for index in range(10)]
    assert [output["index"] for output in outputs] == list(range(10))
    for index, output in enumerate(outputs):
        assert output["url"] == f"/v1/jobs/{job_id}/artifacts/{index}.png"
        answer = gateway.http.get(output["url"])
        assert answer.status_code == 200, output
        assert answer.content == png(8 + index)
    assert code_of(gateway.http.get(f"/v1/jobs/{job_id}/artifacts/10.png")) == "artifact_not_found"


def test_nothing_of_it_is_fetched_before_all_of_it_is_there(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    run_parts(gateway, job_id, order=(0,))

    assert record_of(gateway, job_id)["parts"]["succeeded"] == 1
    assert code_of(gateway.http.get(f"/v1/jobs/{job_id}/artifacts/0.png")) == "artifact_not_found"


def test_a_part_is_nowhere(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    run_parts(gateway, job_id)
    part = part_id(job_id, 0)

    for path in PART_PATHS:
        answer = gateway.http.get(f"/v1/jobs/{part}{path}")
        assert (answer.status_code, code_of(answer)) == (404, "job_not_found"), path
    assert gateway.http.delete(f"/v1/jobs/{part}").status_code == 404
    assert gateway.http.delete(f"/v1/jobs/{part}", params={"purge": "true"}).status_code == 404
    assert gateway.http.post(f"/v1/jobs/{part}/retry").status_code == 404
    with gateway.socket(part) as socket, pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4404
    listed = {record["id"] for record in gateway.http.get("/v1/jobs?limit=100").json()["data"]}
    assert job_id in listed
    assert not any("." in listed_id for listed_id in listed)
    image = REQUEST | {"model": "sdxl-base-1.0", "task": "image2image"}
    answer = gateway.http.post("/v1/jobs", json=image | {"inputs": {"prompt": "x", "image": f"artifact:{part}/0.png"}})
    assert answer.status_code == 422, "its name is none that a request may hold"
    assert record_of(gateway, job_id)["state"] == "succeeded", "and nothing was done to the job"


def test_an_output_of_any_part_is_the_input_of_another_job(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    run_parts(gateway, job_id)
    body = REQUEST | {"model": "sdxl-base-1.0", "task": "image2image"}

    for name, status in (("0.png", 202), ("9.png", 202), ("10.png", 404)):
        inputs = {"prompt": "x", "image": f"artifact:{job_id}/{name}"}
        assert gateway.http.post("/v1/jobs", json=body | {"inputs": inputs}).status_code == status, name


def test_a_watcher_sees_one_job_with_one_progress_and_one_end(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)

    with gateway.watch(job_id) as watching:
        run_parts(gateway, job_id, order=(1, 2, 0))
        events = list(watching.events())

    names = [event.name for event in events]
    assert [name for name in names if name in {"job_finished", "job_failed", "job_cancelled"}] == ["job_finished"]
    assert names[-1] == "job_finished"
    assert names.count("job_started") == 1
    assert [int(event.id or 0) for event in events] == list(range(1, len(events) + 1))
    told = [Event.model_validate(event.data) for event in events]
    steps = [int(str(event.data["step"])) for event in told if event.event is EventName.STAGE_PROGRESS]
    assert steps == sorted(steps)
    assert steps[-1] == 9
    with gateway.socket(job_id) as socket:
        replayed = [json.loads(message)["event"] for message in socket]
    assert replayed == names, "a WebSocket tells the same"


def test_a_synchronous_request_waits_for_the_last_part(gateway: Gateway) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(gateway.http.post, "/v1/generate", json=PICTURES | {"metadata": {"sync": "1"}})
        job_id = eventually(
            lambda: next(
                (
                    record["id"]
                    for record in gateway.http.get("/v1/jobs").json()["data"]
                    if record["metadata"] == {"sync": "1"}
                ),
                None,
            )
        )
        run_parts(gateway, job_id or "")
        answer = asked.result(20)

    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Omnirt-Job-Id"] == job_id
    assert len(answer.json()["outputs"]) == 10
    assert answer.json()["metadata"]["job_id"] == job_id


def test_one_cancel_stops_what_runs_and_what_waits(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    lease = begin(gateway, job_id, 0)

    assert gateway.http.delete(f"/v1/jobs/{job_id}").json()["cancel"] == "requested"

    assert gateway.worker.store.renew(lease, lease_ttl_ms=60_000).cancel_requested
    assert gateway.worker.store.claim(part_id(job_id, 1), worker_id="w", lease_ttl_ms=1_000) is None
    gateway.worker.give_in(lease)
    assert record_of(gateway, job_id)["state"] == "cancelled"
    assert gateway.http.delete(f"/v1/jobs/{job_id}").json()["cancel"] == "already_finished"
    with gateway.watch(job_id) as watching:
        assert [event.name for event in watching.events()][-1] == "job_cancelled"


def test_a_split_job_of_which_nothing_runs_is_cancelled_at_once(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)

    assert gateway.http.delete(f"/v1/jobs/{job_id}").json()["cancel"] == "cancelled"
    assert gateway.worker.store.claim(part_id(job_id, 0), worker_id="w", lease_ttl_ms=1_000) is None


def test_a_part_that_fails_for_good_fails_the_job_which_says_which(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    run_parts(gateway, job_id, order=(0,))
    gateway.worker.fail(begin(gateway, job_id, 1))

    record = record_of(gateway, job_id)

    assert record["state"] == "failed"
    assert record["error"]["message"].startswith("Part 2 of 3, pictures 4 to 6: ")
    again = gateway.http.post(f"/v1/jobs/{job_id}/retry").json()
    assert again["parts"]["total"] == 3, "a retry is split as any job"
    assert again["request"]["config"]["seed"] == 40


def test_the_same_submit_again_is_the_same_split_job(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": "ten pictures"}
    first = gateway.http.post("/v1/jobs", json=PICTURES, headers=headers)

    again = gateway.http.post("/v1/jobs", json=PICTURES, headers=headers)

    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert sum(first.json()["id"] in message for message in gateway.messages()) == 3, "no part was sent twice"


def test_a_purged_job_is_gone_with_all_its_parts(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    run_parts(gateway, job_id)

    assert gateway.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"}).status_code == 204

    assert gateway.http.get(f"/v1/jobs/{job_id}").status_code == 404
    assert not [key for key in gateway.worker.redis.scan_iter() if job_id in key]
    assert not [file for file in files_in(gateway.settings.data_dir) if job_id in str(file)]


def test_a_trace_tells_the_stages_of_each_part(gateway: Gateway) -> None:
    job_id = gateway.submit(**PICTURES)
    assert gateway.worker.store.give_back(begin(gateway, job_id, 0), Requeue("storage_error"))
    first, second = begin(gateway, job_id, 0), begin(gateway, job_id, 1)
    gateway.worker.tell(first, EventName.STAGE_START)
    gateway.worker.tell(second, EventName.STAGE_START)
    gateway.worker.tell(second, EventName.STAGE_END, elapsed_ms=1)
    finish(gateway, second, 1)

    root, *stages = gateway.http.get(f"/v1/jobs/{job_id}/trace").json()["spans"]

    assert root["name"] == "job"
    assert [(span["attributes"]["part"], span["attributes"]["attempt"], span["status"]) for span in stages] == [
        (0, 2, "unset"),
        (1, 1, "ok"),
    ]


def test_the_api_tells_of_lists_of_prompts_of_priorities_and_of_parts(gateway: Gateway) -> None:
    document = gateway.http.get("/openapi.json").json()

    schemas = document["components"]["schemas"]
    assert schemas["Priority"]["enum"] == ["high", "normal", "low"]
    assert schemas["JobRecord"]["properties"]["parts"]
    for path in ("/v1/jobs", "/v1/generate"):
        assert "list of prompts" in document["paths"][path]["post"]["description"]
    assert "list of prompts" in gateway.http.get("/docs").text
    limits = gateway.http.get("/v1/models/stub").json()["limits"]["text2image"]
    assert (limits["prompt"]["max_items"], limits["prompt"]["max_length"]) == (16, 8000)
    other = gateway.http.get("/v1/models/sdxl-base-1.0").json()["limits"]["image2image"]
    assert "max_items" not in other["prompt"]


def test_a_request_for_many_prompts_is_checked_without_being_queued(gateway: Gateway) -> None:
    before = gateway.messages()
    prompts = ["a red star", "a blue ring"]

    answer = gateway.http.post("/v1/validate", json=REQUEST | {"inputs": {"prompt": prompts}}).json()

    assert answer["ok"]
    assert answer["request"]["inputs"]["prompt"] == prompts
    assert gateway.messages() == before


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
def test_a_priority_is_taken_and_shown(gateway: Gateway, priority: str) -> None:
    job_id = gateway.submit(priority=priority)

    assert record_of(gateway, job_id)["priority"] == priority


def test_a_higher_priority_stands_before_a_lower_one_in_the_broker_and_in_its_position(gateway: Gateway) -> None:
    low, high, normal = (gateway.submit(priority=priority) for priority in ("low", "high", "normal"))

    places = {job_id: record_of(gateway, job_id)["queue"]["position"] for job_id in (high, normal, low)}
    waiting = [json.loads(message)["headers"]["id"] for message in gateway.messages()]

    assert list(places.values()) == sorted(places.values())
    assert sorted((high, normal, low), key=waiting.index) == [high, normal, low]
    for job_id in (low, normal, high):
        gateway.worker.run(job_id)
