"""Which workers live, and what each can do."""

from collections.abc import Callable
from threading import Lock
from typing import Protocol

import redis

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.jobs.scripting import Scripts


class LiveWorkers(Protocol):
    """Which workers live. Safe to share between threads."""

    def live(self) -> tuple[WorkerCapability, ...]:
        """The workers whose record has not run out, sorted by worker_id. Raises StoreUnavailable."""
        ...


class Fleet(LiveWorkers, Protocol):
    """The workers' capability records, each kept alive by its worker. Safe to share between threads.

    Every method raises StoreUnavailable when the store cannot be reached.
    """

    def publish(self, capability: WorkerCapability, *, ttl_ms: int) -> None:
        """Make the record known, in place of the worker's earlier one, for `ttl_ms` from now."""
        ...

    def withdraw(self, worker_id: str) -> None:
        """Forget the worker at once. Idempotent."""
        ...


class RedisFleet:
    """Fleet in Redis: {prefix}:fleet ZSET worker id → when its record runs out, {prefix}:workers HASH id → record."""

    def __init__(self, client: redis.Redis, *, prefix: str) -> None:
        self._scripts = Scripts(client, prefix)

    def publish(self, capability: WorkerCapability, *, ttl_ms: int) -> None:
        """See Fleet."""
        self._scripts.run("fleet_publish", "", capability.worker_id, capability.model_dump_json(), ttl_ms)

    def withdraw(self, worker_id: str) -> None:
        """See Fleet."""
        self._scripts.run("fleet_withdraw", "", worker_id)

    def live(self) -> tuple[WorkerCapability, ...]:
        """See Fleet."""
        records = (WorkerCapability.model_validate_json(text) for text in self._scripts.run("fleet_live", ""))
        return tuple(sorted(records, key=lambda capability: capability.worker_id))


class MemoryFleet:
    """Fleet in this process. `now_ms` is the clock."""

    def __init__(self, *, now_ms: Callable[[], int] = unix_ms) -> None:
        self._now_ms = now_ms
        self._lock = Lock()
        self._records: dict[str, tuple[int, WorkerCapability]] = {}

    def publish(self, capability: WorkerCapability, *, ttl_ms: int) -> None:
        """See Fleet."""
        with self._lock:
            self._records[capability.worker_id] = (self._now_ms() + ttl_ms, capability)

    def withdraw(self, worker_id: str) -> None:
        """See Fleet."""
        with self._lock:
            self._records.pop(worker_id, None)

    def live(self) -> tuple[WorkerCapability, ...]:
        """See Fleet."""
        with self._lock:
            now_ms = self._now_ms()
            self._records = {name: record for name, record in self._records.items() if record[0] > now_ms}
            return tuple(capability for _, (_, capability) in sorted(self._records.items()))
