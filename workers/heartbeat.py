"""The heartbeat: one thread that keeps the worker's capability record alive."""

import logging
import threading
from collections.abc import Callable

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.fleet import Fleet

logger = logging.getLogger(__name__)

BEATS_PER_TTL = 3


class Heartbeat:
    """Publishes what `capability` says every `every_s`; the record lapses after three missed beats."""

    def __init__(self, fleet: Fleet, capability: Callable[[], WorkerCapability], *, every_s: float) -> None:
        self._fleet = fleet
        self._capability = capability
        self._every_s = every_s
        self._guard = threading.Lock()  # a beat in flight must not outlive the withdrawal
        self._closed = threading.Event()
        self._store_away = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin, with a first beat at once. Idempotent."""
        if self._thread.ident is None:
            self._publish()
            self._thread.start()

    def withdraw(self) -> None:
        """Take the record back: no new job is routed here. Idempotent."""
        with self._guard:
            if self._closed.is_set():
                return
            self._closed.set()
            try:
                self._fleet.withdraw(self._capability().worker_id)
            except StoreUnavailable as error:
                logger.warning("The capability record will lapse by itself: %s", error)

    def close(self) -> None:
        """Withdraw and end. Idempotent."""
        self.withdraw()
        if self._thread.ident is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._closed.wait(self._every_s):
            self._publish()

    def _publish(self) -> None:
        with self._guard:
            if self._closed.is_set():
                return
            try:
                self._fleet.publish(self._capability(), ttl_ms=round(BEATS_PER_TTL * self._every_s * 1000))
            except StoreUnavailable as error:
                if not self._store_away:
                    logger.warning("Nobody hears of this worker while the store is away: %s", error)
                self._store_away = True
                return
            except Exception:  # a beat that fails must not end the thread that makes the next one
                logger.exception("The capability record could not be published.")
                return
        if self._store_away:
            logger.warning("The store is back; this worker is heard of again.")
            self._store_away = False
