"""Messages keep their place in the broker: what a worker cannot use goes back to where it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from omnirt_tasks.broker_lists import list_of, move_to_front
from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.contract import Priority
from omnirt_tasks.jobs.values import WakeUp
from omnirt_tasks.settings import Settings
from omnirt_tasks.tasks import CELERY_PRIORITIES, send_job
from tests.support.job_system import STUB_QUEUE, JobSystem
from workers.consumption import put_back


@pytest.fixture
def system(settings: Settings) -> Iterator[JobSystem]:
    """A system with three messages on its queue, and nobody to take them."""
    system = JobSystem(settings)
    for job_id in ("first", "second", "third"):
        system.send(job_id)
    yield system
    system.close()


@contextmanager
def consuming(system: JobSystem) -> Iterator[Any]:
    """A channel as a worker has one."""
    with system.app.connection_for_read() as connection:
        yield connection.default_channel


def normal_list(system: JobSystem) -> str:
    return list_of(STUB_QUEUE, CELERY_PRIORITIES[Priority.NORMAL], prefix=broker_prefix(system.settings))


def line(system: JobSystem) -> list[str]:
    """Whose messages wait, the next to be taken first."""
    with consuming(system) as channel:
        messages = []
        while (message := channel.basic_get(STUB_QUEUE, no_ack=True)) is not None:
            messages.append(message.headers["id"])
    return messages


def unacknowledged(system: JobSystem) -> int:
    return int(system.redis.hlen(f"{broker_prefix(system.settings)}unacked"))


def test_a_message_that_is_put_back_is_the_next_to_be_taken(system: JobSystem) -> None:
    with consuming(system) as channel:
        message = channel.basic_get(STUB_QUEUE)
        assert unacknowledged(system) == 1

        put_back(message)

    assert unacknowledged(system) == 0
    assert line(system) == ["first", "second", "third"]


def test_a_job_that_goes_back_is_moved_to_the_front_of_its_list(system: JobSystem) -> None:
    moved = move_to_front(system.redis, "third", normal_list(system))

    assert moved
    assert line(system) == ["third", "first", "second"]


def test_a_message_that_was_taken_already_is_not_moved(system: JobSystem) -> None:
    assert not move_to_front(system.redis, "taken", normal_list(system))

    assert line(system) == ["first", "second", "third"]


@pytest.mark.parametrize("priority", list(Priority))
def test_each_priority_has_the_list_that_kombu_puts_its_messages_on(system: JobSystem, priority: Priority) -> None:
    send_job(system.app, WakeUp("job", "cpu-stub-other", priority))

    name = list_of("cpu-stub-other", CELERY_PRIORITIES[priority], prefix=broker_prefix(system.settings))
    assert system.redis.llen(name) == 1
