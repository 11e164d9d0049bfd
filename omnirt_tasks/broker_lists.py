"""What waits in the broker: the lists in Redis that a queue is spread over, and whose messages are in them."""

import json
from collections.abc import Callable
from time import monotonic
from typing import Any

import redis

from omnirt_tasks.jobs.connection import reaching_store

PRIORITY_ENDS = ("", "\x06\x163", "\x06\x166", "\x06\x169")


def lists_of(queue: str, *, prefix: str) -> tuple[str, ...]:
    """The lists in Redis over which kombu spreads a queue, one for each priority; `prefix` is `broker_prefix`."""
    return tuple(f"{prefix}{queue}{end}" for end in PRIORITY_ENDS)


def celery_waiting(client: redis.Redis, *, prefix: str) -> Callable[[str], frozenset[str]]:
    """A `waiting_in_broker` for Celery's lists in Redis; `client` speaks to the broker's database.

    `prefix` begins every key of Celery's: `celery_app.broker_prefix`.

    A message that a worker has taken off the list and not started counts as gone: if its worker died, it is. To read
    a list costs as much as it is long, so what was read serves for a millisecond per message.
    """
    broker: Any = client
    known: dict[str, tuple[float, frozenset[str]]] = {}  # queue → until when it serves, what was read

    def waiting(queue: str) -> frozenset[str]:
        for name in [name for name, (until, _) in known.items() if monotonic() >= until]:
            del known[name]
        if queue not in known:
            pipeline = broker.pipeline(transaction=False)
            for name in lists_of(queue, prefix=prefix):
                pipeline.lrange(name, 0, -1)
            with reaching_store():
                lists = pipeline.execute()
            task_ids = frozenset(
                task_id for messages in lists for message in messages if (task_id := _task_id(message))
            )
            known[queue] = (monotonic() + len(task_ids) / 1000, task_ids)
        return known[queue][1]

    return waiting


def _task_id(message: str | bytes) -> str | None:
    """The Celery task id, which is the job id; None for what is no message of Celery's."""
    try:
        return str(json.loads(message)["headers"]["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
