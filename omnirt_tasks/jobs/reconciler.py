"""Mends what stalls: jobs of dead workers, lost messages, jobs whose time is over.

A Reconciler runs in every gateway and worker; a lock lets one of them act per period. Everything that it does is
safe to do twice: the store's steps are atomic, and a message that is sent once too often is dropped at its claim.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic
from typing import Any

import redis
from redis.exceptions import LockError

from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.housekeeping import Chore, ExpirySweep, Housekeeper, Turn, everyones_turn
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Reconciled, StoredJob, WakeUp

log = logging.getLogger(__name__)

ROUND_LIMIT_S = 3.0
"""How long a round may hold the lock before another process takes over: one that was killed delays the others so."""
BACKOFF_MAX_S = 5.0


class Reconciler:
    """A thread that reconciles every `every_s`, as long as the process lives, and another one for housekeeping.

    `resend` sends a job's message. `waiting_in_broker` tells which messages are in the broker's queue; that of a job
    which has come to a higher priority since is another one. `turn` is entered for each round. After an outage of the
    store, though it only hung, and while `store_age_s` says that it has only just come up, no lease expires for
    `lease_ttl_s`, so that the holders can renew theirs first.

    `remove_files` removes what an expired job left in storage, `sweep_turn` is entered for that; `chores` are done
    beside it.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        every_s: float,
        unclaimed_after_s: float,
        resend: Callable[[WakeUp], None],
        waiting_in_broker: Callable[[str], AbstractSet[WakeUp]],
        remove_files: Callable[[StoredJob], None],
        turn: Turn,
        sweep_turn: Turn = everyones_turn,
        chores: Sequence[Chore] = (),
        lease_ttl_s: float = 0.0,
        store_age_s: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        self._store = store
        self._every_s = every_s
        self._unclaimed_after_ms = round(unclaimed_after_s * 1000)
        self._resend = resend
        self._waiting_in_broker = waiting_in_broker
        self._turn = turn
        self._lease_ttl_s = lease_ttl_s
        self._store_age_s = store_age_s
        self._was_away = False
        self._spare_until: float | None = None  # not known before the first round
        sweep = Chore("Removing expired jobs", ExpirySweep(store, remove_files), every_s, sweep_turn)
        self._housekeeper = Housekeeper((sweep, *chores))
        self._closing = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start the threads. Call it once, after any fork."""
        self._thread = Thread(target=self._run, name="omnirt-reconciler", daemon=True)
        self._thread.start()
        self._housekeeper.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after what is in hand, waiting at most `timeout_s`. Idempotent."""
        self._closing.set()
        until = monotonic() + timeout_s
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._housekeeper.close(max(0.0, until - monotonic()))

    def round(self) -> bool:
        """Reconcile once, if it is this process's turn; whether it was. Raises what stops it."""
        asked_at, answered = monotonic(), False
        try:
            with self._turn() as mine:
                # A store that hung was away for the holders of leases too, though nobody was refused.
                self._was_away |= monotonic() - asked_at > self._lease_ttl_s / 3
                spare_leases = self._spares_leases()
                found = self._reconciled(spare_leases) if mine else Reconciled()
                answered = True
                self._send(found)
                return mine
        except StoreUnavailable:
            self._was_away |= not answered  # what is away otherwise is the broker, where it is another Redis
            raise

    def _spares_leases(self) -> bool:
        """Whether the holders of leases may not have had time to renew them since the store can be reached."""
        if self._spare_until is None:
            self._spare_until = monotonic() + self._lease_ttl_s - self._store_age_s()
        if self._was_away:
            self._was_away = False
            self._spare_until = monotonic() + self._lease_ttl_s
        return monotonic() < self._spare_until

    def _run(self) -> None:
        failures = 0
        while not self._closing.wait(min(self._every_s * 2**failures, max(BACKOFF_MAX_S, self._every_s))):
            try:
                self.round()
            except StoreUnavailable as error:
                if not failures:
                    log.warning("nothing is reconciled while the store is away: %s", error)
                failures = min(failures + 1, 10)
            except Exception:  # the one boundary of this thread: it mends the rest, and must outlive any fault
                if not failures:
                    log.exception("a round of reconciling failed; further failures in a row are not logged")
                failures = min(failures + 1, 10)
            else:
                if failures:
                    log.info("reconciling works again")
                failures = 0

    def _reconciled(self, spare_leases: bool) -> Reconciled:
        found = self._store.reconcile(unclaimed_after_ms=self._unclaimed_after_ms, spare_leases=spare_leases)
        for job_id in found.expired:
            log.warning("a lease expired: what ran the job is gone", extra={"job_id": job_id})
        for job_id in found.overdue:
            log.info("a job failed, since its deadline passed while it waited", extra={"job_id": job_id})
        return found

    def _send(self, found: Reconciled) -> None:
        queues = {wake_up.queue for wake_up in found.resend}
        still_waiting = {queue: self._waiting_in_broker(queue) for queue in queues}
        for wake_up in found.resend:
            if wake_up not in still_waiting[wake_up.queue]:
                self._resend(wake_up)


def redis_turn(
    client: redis.Redis, *, prefix: str, every_s: float, what: str = "reconciler", limit_s: float | None = None
) -> Turn:
    """A turn at `what` among many processes: at most one acts at a time, and one per period of `every_s`.

    One that does not come to its end loses its turn after `limit_s` (`ROUND_LIMIT_S` by default), or two periods.
    """

    @contextmanager
    def turn() -> Iterator[bool]:
        longest_s = max(ROUND_LIMIT_S if limit_s is None else limit_s, 2 * every_s)
        with reaching_store():
            lock = client.lock(f"{prefix}:{what}", timeout=longest_s, blocking=False)
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


def redis_age(client: redis.Redis) -> Callable[[], float]:
    """A `store_age_s`: for how many seconds this Redis has been up."""
    server: Any = client

    def age_s() -> float:
        with reaching_store():
            return float(server.info("server")["uptime_in_seconds"])

    return age_s
