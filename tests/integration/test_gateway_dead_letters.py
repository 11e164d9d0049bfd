"""Jobs that cannot end well: deadlines that pass, dead letters, and how both are looked at, retried and dropped."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from omnirt_tasks.cli import cli
from omnirt_tasks.client import Client
from omnirt_tasks.contract import JobState
from omnirt_tasks.errors import JobTimeout, NotFound
from omnirt_tasks.jobs.values import Claim, Requeue
from omnirt_tasks.requests import text2image
from omnirt_tasks.results import result_of
from tests.support.gateway import LEASE_MS, Gateway, code_of, gateway_settings, running_gateway
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"))
    with running_gateway(settings) as running:
        running.worker.announce()
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.url) as client:
        yield client


def dead_letter(gateway: Gateway, **changes: Any) -> str:
    """A job whose worker died, again and again, and at last while it ran alone; its id."""
    job_id = gateway.submit(**changes)
    store = gateway.worker.store

    def died() -> bool:
        claim = store.claim(job_id, worker_id="scripted", lease_ttl_ms=LEASE_MS, alone=True)
        if isinstance(claim, Claim):
            assert store.give_back(claim.lease, Requeue(reason="device_lost", died=True))
        return store.get(job_id).record.finished

    eventually(died)
    return job_id


def dead(gateway: Gateway) -> set[str]:
    return {record["id"] for record in gateway.http.get("/v1/jobs?dead_letters=true").json()["data"]}


def test_a_job_that_is_queued_past_its_deadline_ends_with_a_timeout_once(gateway: Gateway) -> None:
    job_id = gateway.submit(deadline_s=0.3)

    with gateway.watch(job_id) as watching:
        events = list(watching.events())
    record = gateway.http.get(f"/v1/jobs/{job_id}").json()

    assert [event.name for event in events] == ["job_enqueued", "job_failed"]
    assert (record["state"], record["error"]["code"], record["attempt"]) == ("failed", "timeout", 0)
    assert record["deadline_at_ms"] == record["enqueued_at_ms"] + 300
    assert record["request"]["deadline_s"] == 0.3
    assert record["finished_at_ms"] >= record["deadline_at_ms"]
    again = gateway.http.get(f"/v1/jobs/{job_id}/events")
    assert again.text.count("event: job_failed") == 1


def test_who_waits_for_a_job_is_told_that_its_deadline_passed(gateway: Gateway) -> None:
    answer = gateway.http.post(
        "/v1/generate",
        json={"task": "text2image", "model": "stub", "inputs": {"prompt": "x"}, "deadline_s": 0.2},
    )
    assert (answer.status_code, code_of(answer)) == (504, "timeout")


def test_the_client_s_helpers_take_a_deadline(client: Client) -> None:
    job = client.submit(text2image(model="stub", prompt="x", deadline_s=0.2))

    with pytest.raises(JobTimeout):
        result_of(client.wait(job.id, timeout_s=20))


def test_a_dead_letter_tells_what_happened_and_is_listed_until_it_is_retried(gateway: Gateway) -> None:
    job_id = dead_letter(gateway, metadata={"who": "me"}, config={"seed": None})
    record = gateway.http.get(f"/v1/jobs/{job_id}").json()
    assert (record["state"], record["error"]["code"], record["dead_letter"]) == ("failed", "worker_lost", True)
    assert str(gateway.settings.deaths_max) in record["error"]["message"], "how often it died"
    assert job_id in dead(gateway)

    answer = gateway.http.post(f"/v1/jobs/{job_id}/retry")

    new = answer.json()
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/v1/jobs/{new['id']}")
    assert new["id"] != job_id
    assert (new["state"], new["attempt"], new["metadata"], new["dead_letter"]) == ("queued", 0, {"who": "me"}, False)
    store = gateway.worker.store
    old, again = store.get(job_id).resolved, store.get(new["id"]).resolved
    assert old.config["seed"] is not None
    assert again == old
    assert job_id not in dead(gateway)
    assert not gateway.http.get(f"/v1/jobs/{job_id}").json()["dead_letter"]
    gateway.worker.run(new["id"])
    assert gateway.http.get(f"/v1/jobs/{new['id']}").json()["state"] == "succeeded"


def test_a_job_is_retried_once_however_often_that_is_asked_for(gateway: Gateway) -> None:
    job_id = dead_letter(gateway)
    first, second = (gateway.http.post(f"/v1/jobs/{job_id}/retry") for _ in range(2))
    other = gateway.http.post(f"/v1/jobs/{job_id}/retry", headers={"Idempotency-Key": "once more"})

    assert first.json()["id"] == second.json()["id"]
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert other.json()["id"] not in {job_id, first.json()["id"]}, "a key of the caller's own says that it is another"


@pytest.mark.parametrize("state", ["queued", "running", "succeeded"])
def test_what_did_not_fail_has_no_retry(gateway: Gateway, state: str) -> None:
    job_id = gateway.submit()
    if state == "running":
        gateway.worker.claim(job_id)
    if state == "succeeded":
        gateway.worker.run(job_id)

    answer = gateway.http.post(f"/v1/jobs/{job_id}/retry")

    assert (answer.status_code, code_of(answer)) == (404, "not_found")
    assert state in answer.json()["error"]["message"]


def test_a_cancelled_job_is_retried_too_and_an_unknown_one_is_not(gateway: Gateway) -> None:
    job_id = gateway.submit()
    gateway.http.delete(f"/v1/jobs/{job_id}")
    assert gateway.http.post(f"/v1/jobs/{job_id}/retry").status_code == 202
    assert code_of(gateway.http.post("/v1/jobs/nobody/retry")) == "job_not_found"


def test_dead_letters_are_paged_and_a_plain_failure_is_none(gateway: Gateway, client: Client) -> None:
    made = [dead_letter(gateway) for _ in range(3)]
    failed = gateway.submit()
    gateway.worker.fail(gateway.worker.claim(failed))

    page = gateway.http.get("/v1/jobs?dead_letters=true&limit=2").json()
    found = [job.id for job in client.jobs(dead_letters=True)]

    assert [record["id"] for record in page["data"]] == made[:0:-1]
    assert page["has_more"]
    assert found[:3] == made[::-1]
    assert failed not in found
    assert gateway.http.get("/v1/jobs?dead_letters=maybe").status_code == 422


def test_the_client_retries_and_purges(gateway: Gateway, client: Client) -> None:
    job_id = dead_letter(gateway)
    other = dead_letter(gateway)

    again = client.retry(job_id)
    client.purge(other)

    assert again.state is JobState.QUEUED
    assert client.retry(job_id).id == again.id
    assert not {job_id, other} & dead(gateway)
    with pytest.raises(NotFound):
        client.retry(again.id)


def test_the_command_lists_retries_and_drops_dead_letters(gateway: Gateway) -> None:
    job_id, other = dead_letter(gateway), dead_letter(gateway)
    runner = CliRunner()

    def omnirt(*arguments: str) -> str:
        done = runner.invoke(cli, ["jobs", *arguments, "--url", gateway.url], env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.output
        return done.stdout

    table = omnirt("list", "--dead")
    assert job_id in table
    assert str(gateway.settings.deaths_max) in table.split(other)[1].splitlines()[0], "why"
    listed = json.loads(omnirt("list", "--dead", "--json"))
    assert {job_id, other} <= {record["id"] for record in listed}

    made = json.loads(omnirt("retry", job_id, "--json"))[job_id]
    assert made in omnirt("retry", job_id)
    assert omnirt("drop", other) == f"{other}: dropped\n"

    assert not {job_id, other} & dead(gateway)
    assert gateway.http.get(f"/v1/jobs/{other}").status_code == 404
    assert gateway.http.get(f"/v1/jobs/{job_id}").status_code == 200


def test_a_job_that_is_refused_keeps_a_command_from_none_of_the_others(gateway: Gateway) -> None:
    before, after = dead_letter(gateway), dead_letter(gateway)
    runner = CliRunner()

    retried = runner.invoke(cli, ["jobs", "retry", before, "nobody", after, "--url", gateway.url])
    dropped = runner.invoke(cli, ["jobs", "drop", before, "nobody", after, "--json", "--url", gateway.url])

    assert (retried.exit_code, dropped.exit_code) == (2, 2)
    assert [line.partition(": again as ")[0] for line in retried.stdout.splitlines()] == [before, after]
    assert "nobody: job_not_found: " in retried.stderr
    told = json.loads(dropped.stdout)
    assert (told[before], told[after]) == ("dropped", "dropped")
    assert told["nobody"]["error"]["code"] == "job_not_found"


@pytest.mark.parametrize("options", [(), ("--dead",)], ids=["all", "dead"])
def test_the_list_of_jobs_is_whole_on_a_terminal_of_80_columns(gateway: Gateway, options: tuple[str, ...]) -> None:
    job_id = dead_letter(gateway)

    shown = CliRunner().invoke(cli, ["jobs", "list", *options, "--url", gateway.url], env={"COLUMNS": "80"})

    assert shown.exit_code == 0
    assert job_id in shown.stdout
    assert "…" not in shown.stdout
