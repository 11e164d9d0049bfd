"""The event flusher: one thread that writes the events of every run of this process to the store, in batches.

run's thread ─► EventBuffer.put (never blocks) ─► flusher thread ─► store.append
"""

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from omnirt_tasks.contract import EventName
from omnirt_tasks.errors import JobNotFound, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import EventDraft, Lease

logger = logging.getLogger(__name__)

BUFFERED_EVENTS_MAX = 512  # per run
BATCH_EVENTS_MAX = 128
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0


@dataclass(frozen=True)
class Batch:
    """Events that are written together. One whose answer was lost is written again as it was, and counts once."""

    call: str
    drafts: tuple[EventDraft, ...]


class EventBuffer:
    """The events of one run that are not written yet, in order. Made by `EventFlusher.open`.

    When the store is slow or away, the newest preview replaces an older one, and past the bound the oldest progress
    goes first: it is told again with the next step. What begins and ends a stage stays.
    """

    def __init__(self, lease: Lease, changed: threading.Condition, enqueue: Callable[["EventBuffer"], None]) -> None:
        self.lease = lease
        self.lost = False
        self._changed = changed
        self._enqueue = enqueue
        self._waiting: deque[EventDraft] = deque()
        self._batch: Batch | None = None  # taken, and not known to be written

    def put(self, draft: EventDraft) -> None:
        """Take the event, to be written soon. Never blocks on the store."""
        with self._changed:
            if self.lost:
                return
            preview = draft.event is EventName.PREVIEW
            if preview:
                self._drop_oldest(EventName.PREVIEW)
            if len(self._waiting) >= BUFFERED_EVENTS_MAX:
                if preview:
                    return
                if not (self._drop_oldest(EventName.PREVIEW) or self._drop_oldest(EventName.STAGE_PROGRESS)):
                    self._waiting.popleft()
            self._waiting.append(draft)
            self._enqueue(self)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was put is written, or of no use since the lease is lost; false after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self.lost or not (self._waiting or self._batch), timeout_s)

    def discard(self) -> None:
        """Forget what is not written, and take no more."""
        with self._changed:
            self.lost = True
            self._waiting.clear()
            self._batch = None
            self._changed.notify_all()

    def take(self) -> Batch | None:
        """The next batch, the last one if it is not written, or None. For the flusher, which holds the condition."""
        if self._batch is None and self._waiting:
            size = min(len(self._waiting), BATCH_EVENTS_MAX)
            self._batch = Batch(secrets.token_hex(8), tuple(self._waiting.popleft() for _ in range(size)))
        return self._batch

    def settle(self, *, written: bool) -> bool:
        """Note what became of the batch; true when more waits. For the flusher, which holds the condition."""
        if written:
            self._batch = None
        return bool(self._waiting or self._batch)

    def _drop_oldest(self, name: EventName) -> bool:
        for place, draft in enumerate(self._waiting):
            if draft.event is name:
                del self._waiting[place]
                return True
        return False


class EventFlusher:
    """Writes buffered events to the store. Safe to share between threads.

    `on_lost` is called from its thread when the store says that a lease is no longer held.
    """

    def __init__(self, store: JobStore, *, on_lost: Callable[[Lease], None]) -> None:
        self._store = store
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._dirty: dict[EventBuffer, None] = {}  # in the order in which they are served
        self._closed = False
        self._backoff_s = 0.0
        self._thread = threading.Thread(target=self._flush, name="event-flusher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def open(self, lease: Lease) -> EventBuffer:
        """A buffer for the events of the lease's run."""
        return EventBuffer(lease, self._changed, self._enqueue)

    def close(self) -> None:
        """Stop; what is not written by now is dropped. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _enqueue(self, buffer: EventBuffer) -> None:
        self._dirty[buffer] = None

    def _flush(self) -> None:
        while True:
            with self._changed:
                if self._backoff_s:
                    self._changed.wait_for(lambda: self._closed, self._backoff_s)
                self._changed.wait_for(lambda: self._closed or self._dirty)
                if self._closed:
                    return
                buffer = next(iter(self._dirty))
                del self._dirty[buffer]
                batch = buffer.take()
            if batch is not None:
                self._write(buffer, batch)

    def _write(self, buffer: EventBuffer, batch: Batch) -> None:
        written = held = True
        try:
            held = self._store.append(buffer.lease, batch.drafts, call=batch.call)
            self._backoff_s = 0.0
        except JobNotFound:  # purged while it ran
            held = False
        except StoreUnavailable as error:
            written = False
            if not self._backoff_s:
                logger.warning("Events wait while the store is away: %s", error)
            self._backoff_s = min(max(self._backoff_s * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        except Exception:  # one run's events must not end the thread that serves all
            logger.exception("Events of job %s could not be written.", buffer.lease.job_id)
        if not held:
            buffer.discard()
        with self._changed:
            if buffer.settle(written=written):
                self._dirty[buffer] = None
            self._changed.notify_all()
        if not held:
            self._on_lost(buffer.lease)
