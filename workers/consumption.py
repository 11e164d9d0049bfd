"""How a worker takes messages: how many at once, whether it has room, and how it begins anew.

The admission limit is Celery's own: with `worker_disable_prefetch` a worker takes no message while it holds as many as
its `max_concurrency` allows.

    open ─► BACK_AGAIN ─► TAKE_NOTHING ─► open        a worker that closes has a pop under way, for up to a second;
            a message comes: put back                 kombu would keep what that brings until the worker opens
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

from celery.exceptions import WorkerShutdown
from celery.worker import state
from kombu.transport.virtual import QoS

TAKE_NOTHING = -1  # Celery takes 0 for the pool's size
BACK_AGAIN = 1_000_000_000
"""The limit of a worker that has just closed: it reads one more message, and puts it back."""
LOOK_EVERY_S = 0.05
HEAR_WITHIN_S = 30.0  # longer than any answer of the broker's is waited for


class Consumption(Protocol):
    """How a worker takes messages. Safe to use from any thread."""

    def admit(self, messages: int) -> None:
        """Hold at most so many messages from now on; 0 takes none."""
        ...

    def end(self, status: int) -> None:
        """Take nothing any more, and have the worker shut down with this exit status."""
        ...

    def has_room(self) -> bool:
        """Whether it would take one more message now."""
        ...

    def taken(self) -> int:
        """How many messages it took so far."""
        ...

    def queues(self) -> Sequence[str]:
        """The queues that it takes messages from; none while it is not connected."""
        ...

    def restart(self) -> bool:
        """Have it connect anew, and return when it has let go of its connection; false when it does not."""
        ...


class CeleryConsumption:
    """Consumption of a Celery worker (its `WorkController`)."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._ended = False
        self._wanted = 0

    def admit(self, messages: int) -> None:
        """See Consumption."""
        self._wanted = messages
        if not messages:
            self._set_limit()  # before another message is read
        # It opens in the hub's thread, which may just close behind a message that it puts back; and it wakes the hub,
        # which asleep would look up to a second late.
        self._worker.hub.call_soon(self._set_limit)

    def end(self, status: int) -> None:
        """See Consumption."""
        self._ended = True
        self.admit(0)
        self._worker.hub.call_soon(_shut_down, status)

    def has_room(self) -> bool:
        """See Consumption."""
        limit = self._worker.max_concurrency or self._worker.pool.num_processes
        return bool(limit != BACK_AGAIN and len(state.reserved_requests) < limit)

    def taken(self) -> int:
        """See Consumption."""
        return int(state.all_total_count[0])

    def queues(self) -> Sequence[str]:
        """See Consumption; without those whose consumer an operator has cancelled."""
        consumer = self._worker.consumer
        taking = consumer.task_consumer
        if consumer.connection is None or taking is None:
            return ()
        return tuple(queue.name for queue in taking.queues)

    def _set_limit(self) -> None:
        if self._wanted and not self._ended:
            self._worker.max_concurrency = self._wanted
        elif self._worker.max_concurrency != TAKE_NOTHING:
            self._worker.max_concurrency = BACK_AGAIN

    def restart(self) -> bool:
        """See Consumption. Celery's consumer takes what is raised in its loop for a lost connection."""
        consumer = self._worker.consumer
        seen = consumer.restart_count

        def lose_connection() -> None:
            if consumer.restart_count == seen:
                raise ConnectionResetError("the consumer had stalled")

        def begins_anew() -> bool:
            return consumer.connection is None or bool(consumer.restart_count != seen)

        until_s = time.monotonic() + HEAR_WITHIN_S
        self._worker.hub.call_soon(lose_connection)
        while not begins_anew() and time.monotonic() < until_s:
            time.sleep(LOOK_EVERY_S)  # to let go of a connection that does not answer takes some seconds
        return begins_anew()


def put_back(message: Any) -> None:
    """Undo the taking of a message: it is the next again, while `requeue` would put it behind all others.

    Its tag stays with it wherever it is taken next, so that it is forgotten here alone, and not acknowledged.
    """
    qos, tag = message.channel.qos, message.delivery_tag
    qos.restore_by_tag(tag)
    QoS.ack(qos, tag)


def _shut_down(status: int) -> None:
    raise WorkerShutdown(status)
