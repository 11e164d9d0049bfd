"""What Celery tells of its tasks while a block runs: the events that Flower lives on."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

from celery import Celery

TIMEOUT_S = 20.0
TASK_EVENTS = ("received", "started", "succeeded", "failed", "revoked", "retried", "rejected")


class TaskEvents:
    """Listens to the broker's events of tasks from the beginning of the block; nothing is missed."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._heard: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._undo = contextlib.ExitStack()
        self._consumer: Any = None

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """The events of a task, in order."""
        return self._heard[task_id]

    @property
    def all(self) -> list[dict[str, Any]]:
        """Every event that was heard, each task's in order."""
        return [event for events in self._heard.values() for event in events]

    def names(self, task_id: str) -> list[str]:
        """The names of a task's events, in order."""
        return [event["type"] for event in self.of(task_id)]

    def times_s(self, task_id: str) -> list[float]:
        """When each event of a task was, in Unix seconds."""
        return [event["timestamp"] for event in self.of(task_id)]

    def until(self, told: Callable[[], bool]) -> None:
        """Listen until that is true."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not told():
            assert time.monotonic() < deadline_s, dict(self._heard)
            self._listen(0.5)

    def _listen(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            self._consumer.drain_events(timeout=timeout_s)

    def __enter__(self) -> Self:
        connection = self._undo.enter_context(self._app.connection())
        handlers = {f"task-{name}": lambda event: self._heard[event["uuid"]].append(event) for name in TASK_EVENTS}
        receiver = self._app.events.Receiver(connection, handlers=handlers)
        self._consumer, *_ = self._undo.enter_context(receiver.consumer_context())
        self._listen(0.5)  # from here on nothing is missed
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
