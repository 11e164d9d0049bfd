"""A gateway that is killed takes nothing with it: streams go on at another, and what was submitted is there, once."""

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Event

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from omnirt_tasks import requests
from omnirt_tasks.client import Client
from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.jobs.values import Lease, NewJob
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Settings
from omnirt_tasks.validation import Door, parse_request, resolve
from tests.support.gateway import QUEUE, REQUEST, Gateway, running_gateway
from tests.support.processes import Processes, free_port
from tests.support.waiting import eventually

STEPS = 40


@pytest.fixture
def gateways(settings: Settings) -> Iterator[tuple[Gateway, Gateway]]:
    """Two gateways of one system."""
    with running_gateway(settings) as first, running_gateway(settings) as second:
        yield first, second


def kill(gateway: Gateway) -> None:
    assert gateway.process is not None
    gateway.process.kill()
    assert gateway.process.wait(10)


def begun(gateway: Gateway) -> tuple[str, Lease]:
    """A job that has done half of its steps."""
    job_id = gateway.submit()
    lease = gateway.worker.claim(job_id)
    gateway.worker.tell(lease, EventName.STAGE_START)
    gateway.worker.steps(lease, 1, STEPS // 2, STEPS)
    return job_id, lease


def end(gateway: Gateway, lease: Lease) -> None:
    """The other half, and the result."""
    gateway.worker.steps(lease, STEPS // 2 + 1, STEPS, STEPS)
    gateway.worker.succeed(lease)


def log_of(gateway: Gateway, job_id: str) -> list[int]:
    return [event.seq for event in gateway.worker.store.events(job_id)]


@pytest.mark.parametrize("seen_before", [1, 7, 2 + STEPS // 2])
def test_a_stream_goes_on_at_another_gateway_with_no_gap_and_no_repeat(
    gateways: tuple[Gateway, Gateway], seen_before: int
) -> None:
    first, second = gateways
    job_id, lease = begun(second)
    seen: list[int] = []
    with first.watch(job_id) as watching, suppress(httpx.TransportError):
        for event in watching.events():
            seen.append(int(event.id or 0))
            if len(seen) == seen_before:
                break
        kill(first)
        seen.extend(int(event.id or 0) for event in watching.events())  # what was on its way already
    end(second, lease)

    with second.watch(job_id, headers={"Last-Event-ID": str(seen[-1])}) as watching:
        rest = list(watching.events())

    assert seen + [int(event.id or 0) for event in rest] == log_of(second, job_id)
    assert [event.name for event in rest].count("job_finished") == 1
    assert rest[-1].name == "job_finished"


def test_a_websocket_goes_on_at_another_gateway_with_no_gap_and_no_repeat(gateways: tuple[Gateway, Gateway]) -> None:
    first, second = gateways
    job_id, lease = begun(second)
    seen: list[int] = []
    with first.socket(job_id) as socket, suppress(ConnectionClosed):
        seen += [json.loads(socket.recv(10))["seq"] for _ in range(5)]
        kill(first)
        while True:
            seen.append(json.loads(socket.recv(10))["seq"])
    end(second, lease)

    with second.socket(job_id, f"?after={seen[-1]}") as socket:
        rest = [json.loads(message) for message in socket]

    assert seen + [event["seq"] for event in rest] == log_of(second, job_id)
    assert rest[-1]["event"] == "job_finished"


def test_a_stream_of_a_finished_job_is_whole_at_any_gateway_and_ends(gateways: tuple[Gateway, Gateway]) -> None:
    first, second = gateways
    job_id = first.finished()
    kill(first)

    with second.watch(job_id) as watching:
        events = list(watching.events())
    with second.socket(job_id) as socket:
        told = [json.loads(message) for message in socket]

    assert [int(event.id or 0) for event in events] == [event["seq"] for event in told] == log_of(second, job_id)
    assert (events[-1].name, told[-1]["event"]) == ("job_finished", "job_finished")


def test_the_client_s_stream_goes_on_by_itself_when_its_gateway_is_killed_and_comes_back(
    settings: Settings, processes: Processes
) -> None:
    settings = settings.model_copy(update={"port": free_port()})
    killed = Event()
    with running_gateway(settings) as first, Client(first.url) as client, ThreadPoolExecutor(1) as pool:
        job_id, lease = begun(first)

        def watch() -> list[int]:
            seen = []
            for event in client.events(job_id):
                seen.append(event.seq)
                if len(seen) == STEPS // 4:
                    kill(first)
                    killed.set()
            return seen

        watching = pool.submit(watch)
        assert killed.wait(20)
        end(first, lease)
        processes.gateway(settings)

        assert watching.result(30) == log_of(first, job_id)


def test_submits_while_gateways_are_killed_are_each_one_job(settings: Settings, processes: Processes) -> None:
    settings = settings.model_copy(update={"port": free_port()})
    gateway, url = processes.gateway(settings)
    enough = Event()
    request = requests.text2image(model="stub", prompt="x")

    def submit(client: Client) -> list[str]:
        made = []
        while not enough.is_set():
            name = uuid.uuid4().hex
            job = client.submit(request.model_copy(update={"metadata": {"name": name}}))
            assert job.metadata == {"name": name}
            made.append(job.id)
        return made

    with Client(url) as client, ThreadPoolExecutor(4) as pool:
        submitting = [pool.submit(submit, client) for _ in range(4)]
        for _ in range(3):
            eventually(partial(more_than, client, len(jobs(client)) + 8), 20)
            gateway.kill()
            assert gateway.wait(10)
            gateway, _ = processes.gateway(settings)
        enough.set()
        made = [job_id for future in submitting for job_id in future.result(60)]
        accepted = jobs(client)

    assert len(made) == len(set(made))
    assert accepted == set(made), "what was accepted and what was answered is the same, each once"


def jobs(client: Client) -> set[str]:
    return {job.id for job in client.jobs()}


def more_than(client: Client, count: int) -> bool:
    return len(jobs(client)) > count


def test_a_job_whose_gateway_died_between_its_record_and_its_message_runs(
    settings: Settings, processes: Processes
) -> None:
    resolved, _ = resolve(parse_request(REQUEST), discover(), door=Door()).unwrap()
    with running_gateway(settings) as gateway:
        job_id = str(uuid.uuid4())
        record = NewJob(id=job_id, owner="", queue=QUEUE, request=dict(REQUEST), resolved=resolved)
        kill(gateway)
        gateway.worker.store.create(record)
        assert not gateway.worker.redis.exists(f"{settings.key_prefix}:celery:{QUEUE}")

        processes.worker(settings, QUEUE)

        job = eventually(lambda: found if (found := gateway.worker.store.get(job_id)).record.finished else None, 20)
        assert job is not None
        assert job.record.state is JobState.SUCCEEDED
