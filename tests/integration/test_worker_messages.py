"""What lies in a worker's queue: messages that come twice, that are none of ours, and what is no message at all."""

import base64
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.settings import Settings
from tests.support.job_system import STUB_QUEUE, JobSystem
from tests.support.processes import Processes
from tests.support.waiting import eventually


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    """A system of the test's own, without a worker."""
    system = JobSystem(settings)
    yield system
    system.close()


def test_a_message_that_comes_twice_runs_its_job_once(system: JobSystem, processes: Processes) -> None:
    job_id = system.submit(steps=20, step_ms=10)
    system.send(job_id)
    processes.worker(system.settings, STUB_QUEUE)
    assert system.finished(job_id).state is JobState.SUCCEEDED
    eventually(lambda: system.celery_state(job_id) == "SUCCESS")

    failed = system.finished(system.submit(fail_at_step=1)).id
    eventually(lambda: system.celery_state(failed) == "FAILURE")
    system.send(failed)  # over already: its stored result stays as it is
    system.finished(system.submit())

    eventually(lambda: not system.messages())
    assert len(system.events(job_id, EventName.JOB_STARTED)) == 1
    assert system.celery_state(failed) == "FAILURE"


def test_messages_that_are_none_of_ours_are_refused_and_the_worker_goes_on(
    system: JobSystem, processes: Processes, tmp_path: Path
) -> None:
    spoilt = system.submit()
    (sound,) = system.messages()
    marker = tmp_path / "pickle-was-loaded"

    def changed(body: bytes | None = None, content_type: str | None = None, **headers: object) -> str:
        message: dict[str, Any] = json.loads(sound)
        message["headers"] = {name: value for name, value in (message["headers"] | headers).items() if value != ""}
        message["content-type"] = content_type or message["content-type"]
        if body is not None:
            message["body"] = base64.b64encode(body).decode()
        return json.dumps(message)

    queue = broker_prefix(system.settings) + STUB_QUEUE
    system.redis.delete(queue)
    for message in (
        changed(pickle.dumps(_Bomb(str(marker))), "application/x-python-serialize"),
        changed(b"{not json"),
        changed(id=""),
        changed(id="", task=""),
        changed(task="os.system"),
        changed(task=["os.system"]),
        changed(task={"os": "system"}, id=7),
        changed(b'[["no-such-job"], {}, {}]', id="no-such-job"),
        changed(b'[[{"job": 1}], {}, {}]'),
        changed(b"[[], {}, {}]"),
    ):
        system.redis.lpush(queue, message)

    lines: list[str] = []
    worker = processes.start_worker(system.settings, STUB_QUEUE, on_line=lines.append)

    assert system.finished(system.submit()).state is JobState.SUCCEEDED
    assert worker.exit_code is None
    assert not marker.exists()
    assert not [line for line in lines if "Connection to broker lost" in line], "each is refused, and no more"
    assert not system.redis.hgetall(broker_prefix(system.settings) + "unacked")
    # Its message was spoilt, its record was not: it is sent again.
    assert system.finished(spoilt).state is JobState.SUCCEEDED


def test_what_is_no_message_at_all_is_dropped_and_the_worker_goes_on(system: JobSystem, processes: Processes) -> None:
    queue = broker_prefix(system.settings) + STUB_QUEUE
    garbage = [
        b"no message at all",
        b"\xff\xfe\x00",
        b"",
        b"null",
        b"[1, 2]",
        b"{}",
        b'{"body": "x", "properties": {}}',
        b'{"body": "x", "properties": {"delivery_tag": "t"}, "headers": 7}',
    ]
    system.redis.lpush(queue, *garbage)

    worker = processes.worker(system.settings, STUB_QUEUE)

    assert system.finished(system.submit(), timeout_s=60).state is JobState.SUCCEEDED
    running = system.submit(steps=100, step_ms=30)
    system.seen(running, EventName.STAGE_PROGRESS)
    system.redis.lpush(queue, garbage[0])
    assert system.finished(system.submit()).state is JobState.SUCCEEDED
    assert system.finished(running).attempt == 1, "what runs is not harmed"
    assert worker.exit_code is None
    assert not system.messages()


class _Bomb:
    """What runs when somebody unpickles it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))
