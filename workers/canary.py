"""The canary: notices that a worker with room leaves messages waiting, and restarts its consumer.

    heads of its lists ─► Stall: the same message, room all the time, nothing taken ─► restart ─► … ─► give up

A connection to the broker can die without an error, and a consumer can come back from an outage without its place.
What counts is what comes of it, whatever the cause: a message that nobody takes.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis

from omnirt_tasks.broker_lists import lists_of
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.connection import reaching_store
from workers.consumption import Consumption

logger = logging.getLogger(__name__)

LOOKS_PER_STALL = 4
LOOK_EVERY_MAX_S = 1.0
RESTARTS_MAX = 3
CLOSE_TIMEOUT_S = 2.0

Heads = Mapping[str, str]
"""The message that is to be taken next, by the list that it waits in; an empty list is not named."""


class Stall:
    """Whether nothing is taken although something could be, told from one look to the next.

    A message that another worker took, or one of ours, is no stall, nor is a full worker.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self.forget()

    def forget(self) -> None:
        """What was seen counts no longer."""
        self._since_s: float | None = None
        self._taken = 0
        self._heads: Heads = {}

    def seen(self, heads: Heads, taken: int, *, now_s: float) -> bool:
        """Whether one of these heads has waited for `after_s` while nothing was taken."""
        same = {name: head for name, head in heads.items() if self._heads.get(name) == head}
        if self._since_s is None or taken != self._taken or not same:
            self._since_s, self._taken, self._heads = now_s, taken, heads
            return False
        self._heads = same
        return now_s - self._since_s >= self._after_s


class Canary:
    """A thread that looks at the heads of a worker's lists and restarts its consumer when it stalls.

    After `RESTARTS_MAX` restarts that changed nothing, or one that was not even heard of, `on_lost` is called once,
    from the thread, with whether the consumer still hears: the worker is of no use any more.
    """

    def __init__(
        self,
        consumption: Consumption,
        heads: Callable[[Sequence[str]], Heads],
        *,
        stall_after_s: float,
        on_lost: Callable[[bool], object],
    ) -> None:
        self._consumption = consumption
        self._heads = heads
        self._stall_after_s = stall_after_s
        self._stall = Stall(stall_after_s)
        self._on_lost = on_lost
        self._restarts = 0
        self._taken_at_restart = 0
        self._failing = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="canary", daemon=True)

    def start(self) -> None:
        """Begin to look. Idempotent, also once closed."""
        if self._thread.ident is None and not self._closed.is_set():
            self._thread.start()

    def close(self) -> None:
        """Look no more; from any thread, the canary's own too. Idempotent."""
        self._closed.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)  # it may wait for a consumer that hears nothing

    def _watch(self) -> None:
        while not self._closed.wait(min(self._stall_after_s / LOOKS_PER_STALL, LOOK_EVERY_MAX_S)):
            try:
                if self._stalls():
                    self._mend()
            except StoreUnavailable:  # told by others; a broker that is away gives nothing to take
                self._stall.forget()
            except Exception:  # a boundary: the canary outlives what it watches
                self._stall.forget()
                if not self._failing:
                    logger.exception("The canary could not look; it goes on, and says so no more.")
                self._failing = True

    def _stalls(self) -> bool:
        queues = self._consumption.queues()
        if not queues or not self._consumption.has_room():
            self._stall.forget()
            return False
        taken = self._consumption.taken()
        if taken != self._taken_at_restart:
            self._restarts = 0
        return self._stall.seen(self._heads(queues), taken, now_s=time.monotonic())

    def _mend(self) -> None:
        self._stall.forget()
        self._taken_at_restart = self._consumption.taken()
        if self._restarts < RESTARTS_MAX:
            self._restarts += 1
            logger.warning(
                "A message has waited for %.1f s although this worker had room; its consumer is restarted (%d of %d).",
                self._stall_after_s,
                self._restarts,
                RESTARTS_MAX,
            )
            if self._consumption.restart() or self._closed.is_set():
                return
            hears = False
        else:
            hears = True
        self._closed.set()
        self._on_lost(hears)


def heads_in_broker(client: redis.Redis, *, prefix: str) -> Callable[[Sequence[str]], Heads]:
    """A `heads` for Celery's lists in Redis; `client` speaks to the broker's database.

    `prefix` begins every key of Celery's: `celery_app.broker_prefix`. Raises StoreUnavailable.
    """
    broker: Any = client

    def heads(queues: Sequence[str]) -> Heads:
        names = [name for queue in queues for name in lists_of(queue, prefix=prefix)]
        pipeline = broker.pipeline(transaction=False)
        for name in names:
            pipeline.lindex(name, -1)
        with reaching_store():
            found = pipeline.execute()
        return {name: head for name, head in zip(names, found, strict=True) if head is not None}

    return heads
