"""What waits in the broker: the lists in Redis that a queue is spread over, and whose messages are in them."""

import json
from collections.abc import Callable
from time import monotonic
from typing import Any

import redis

from omnirt_tasks.celery_app import PRIORITY_STEPS
from omnirt_tasks.contract import Priority
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.values import WakeUp

SEPARATOR = "\x06\x16"
LOOK_AMONG = 100
"""Among how many messages at the end of a list one that was put there just now is looked for."""
# What a message in each of these lists counts as; the last holds none of ours.
PRIORITIES = (Priority.HIGH, Priority.NORMAL, Priority.LOW, Priority.LOW)


def lists_of(queue: str, *, prefix: str) -> tuple[str, ...]:
    """The lists in Redis over which kombu spreads a queue, one for each priority; `prefix` is `broker_prefix`."""
    return tuple(list_of(queue, priority, prefix=prefix) for priority in PRIORITY_STEPS)


def list_of(queue: str, priority: int, *, prefix: str) -> str:
    """The list in which a queue's messages of one of the PRIORITY_STEPS wait; the first in line is its last."""
    return f"{prefix}{queue}{SEPARATOR}{priority}" if priority else f"{prefix}{queue}"


def celery_waiting(client: redis.Redis, *, prefix: str) -> Callable[[str], frozenset[WakeUp]]:
    """A `waiting_in_broker` for Celery's lists in Redis; `client` speaks to the broker's database.

    `prefix` begins every key of Celery's: `celery_app.broker_prefix`.

    A message that a worker has taken off the list and not started counts as gone: if its worker died, it is. To read
    a list costs as much as it is long, so what was read serves for a millisecond per message.
    """
    broker: Any = client
    known: dict[str, tuple[float, frozenset[WakeUp]]] = {}  # queue → until when it serves, what was read

    def waiting(queue: str) -> frozenset[WakeUp]:
        for name in [name for name, (until, _) in known.items() if monotonic() >= until]:
            del known[name]
        if queue not in known:
            pipeline = broker.pipeline(transaction=False)
            for name in lists_of(queue, prefix=prefix):
                pipeline.lrange(name, 0, -1)
            with reaching_store():
                lists = pipeline.execute()
            wake_ups = frozenset(
                WakeUp(task_id, queue, priority)
                for messages, priority in zip(lists, PRIORITIES, strict=True)
                for message in messages
                if (task_id := _task_id(message))
            )
            known[queue] = (monotonic() + len(wake_ups) / 1000, wake_ups)
        return known[queue][1]

    return waiting


def move_to_front(client: redis.Redis, task_id: str, list_name: str) -> bool:
    """Let a message that was put on a list just now be the next to be taken from it; whether it was there still.

    One that is taken meanwhile comes a second time, which its claim drops. Raises StoreUnavailable.
    """
    broker: Any = client
    with reaching_store():
        newest = broker.lrange(list_name, 0, LOOK_AMONG - 1)
        found = next((message for message in newest if _task_id(message) == task_id), None)
        if found is not None:
            broker.pipeline().lrem(list_name, 1, found).rpush(list_name, found).execute()
    return found is not None


def _task_id(message: str | bytes) -> str | None:
    """The Celery task id, which is the job id; None for what is no message of Celery's."""
    try:
        return str(json.loads(message)["headers"]["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
