"""Mends what stalls: jobs of dead workers, lost messages, records whose time is over.

A Reconciler runs in every gateway and worker; a lock lets one of them act per period. Everything that it does is
safe to do twice: the store's steps are atomic, and a message that is sent once too often is dropped at its claim.
"""

import json
import logging
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Event, Thread
from time import monotonic
from typing import Any

import redis
from redis.exceptions import LockError

from omnirt_tasks.errors import OmnirtError
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.store import JobStore, StoredJob

log = logging.getLogger(__name__)

ROUND_LIMIT_S = 15.0
"""How long a round may hold the lock before another process takes over."""
BACKOFF_MAX_S = 10.0
HOUSEKEEPING_EVERY_S = 60.0
SWEEP_LIMIT = 100
"""The most expired jobs that one round removes; the rest follows in the next."""

# kombu spreads a queue over one list per priority: the plain name, then these ends.
_PRIORITY_ENDS = ("", "\x06\x163", "\x06\x166", "\x06\x169")


class Reconciler:
    """A thread that reconciles every `every_s`, as long as the process lives.

    `resend` sends a job's message (job id, queue). `waiting_in_broker` tells which job ids have a message in the
    broker's queue. `remove_files` removes what a job left in storage. `turn` is entered for each round, and yields
    whether this process is to act. `housekeeping` is called about once a minute by whoever acts. What fails of the
    removing is logged and tried again; the recovery of jobs never waits for it.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        every_s: float,
        unclaimed_after_s: float,
        resend: Callable[[str, str], None],
        waiting_in_broker: Callable[[str], AbstractSet[str]],
        remove_files: Callable[[StoredJob], None],
        turn: Callable[[], AbstractContextManager[bool]],
        housekeeping: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._every_s = every_s
        self._unclaimed_after_ms = round(unclaimed_after_s * 1000)
        self._resend = resend
        self._waiting_in_broker = waiting_in_broker
        self._remove_files = remove_files
        self._turn = turn
        self._housekeeping = housekeeping
        self._housekeeping_at = monotonic()
        self._passed_over = 0  # expired jobs, oldest first, whose files could not be removed
        self._failing: set[str] = set()  # the chores that failed when last done
        self._closing = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start the thread. Call it once, after any fork."""
        self._thread = Thread(target=self._run, name="omnirt-reconciler", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the round in hand, waiting at most `timeout_s`. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def round(self) -> bool:
        """Reconcile and sweep once, if it is this process's turn; whether it was. Raises what stops the reconciling."""
        with self._turn() as mine:
            if mine:
                self._reconcile()
                self._do("removing expired jobs", self._sweep)
                if monotonic() >= self._housekeeping_at:
                    self._housekeeping_at = monotonic() + HOUSEKEEPING_EVERY_S
                    self._do("housekeeping", self._housekeeping)
            return mine

    def _do(self, chore: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception:  # a boundary: whatever is wrong with storage must not slow the recovery of jobs
            if chore not in self._failing:
                log.exception("%s failed; further failures in a row are not logged", chore)
            self._failing.add(chore)
        else:
            if chore in self._failing:
                log.info("%s works again", chore)
            self._failing.discard(chore)

    def _run(self) -> None:
        failures = 0
        while not self._closing.wait(min(self._every_s * 2**failures, max(BACKOFF_MAX_S, self._every_s))):
            try:
                self.round()
            except Exception:  # the one boundary of this thread: it mends the rest, and must outlive any fault
                if not failures:
                    log.exception("a round of reconciling failed; further failures in a row are not logged")
                failures = min(failures + 1, 10)
            else:
                if failures:
                    log.info("reconciling works again")
                failures = 0

    def _reconcile(self) -> None:
        found = self._store.reconcile(unclaimed_after_ms=self._unclaimed_after_ms)
        for job_id in found.expired:
            log.warning("a lease expired; the job is queued again", extra={"job_id": job_id})
        still_waiting = {queue: self._waiting_in_broker(queue) for queue in {queue for _, queue in found.resend}}
        for job_id, queue in found.resend:
            if job_id not in still_waiting[queue]:
                self._resend(job_id, queue)

    def _sweep(self) -> None:
        jobs = self._store.expired(SWEEP_LIMIT, skip=self._passed_over)
        failures: list[OmnirtError] = []
        for job in jobs:
            try:
                self._remove_files(job)
                self._store.purge(job.record.id)
            except OmnirtError as error:  # its files stay findable by its record, and the others' turn comes too
                failures.append(error)
        # Those that failed stay first in line: they are passed over until all others had their turn.
        self._passed_over = self._passed_over + len(failures) if len(jobs) == SWEEP_LIMIT else 0
        if failures:
            raise failures[-1]


def redis_turn(client: redis.Redis, *, prefix: str, every_s: float) -> Callable[[], AbstractContextManager[bool]]:
    """A `turn` for many processes: at most one acts at a time, and one per period of `every_s`."""

    @contextmanager
    def turn() -> Iterator[bool]:
        with reaching_store():
            lock = client.lock(f"{prefix}:reconciler", timeout=max(ROUND_LIMIT_S, 2 * every_s), blocking=False)
            mine = lock.acquire()
        if not mine:
            yield False
            return
        try:
            yield True
        finally:
            # It is held to the end of the period, so that the other processes find nothing to do until then. A round
            # that took too long has lost it, which harms nothing.
            with reaching_store(), suppress(LockError):
                lock.extend(0.9 * every_s, replace_ttl=True)

    return turn


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
            for end in _PRIORITY_ENDS:
                pipeline.lrange(prefix + queue + end, 0, -1)
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
    except (ValueError, KeyError, TypeError):
        return None
