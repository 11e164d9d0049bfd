"""The lease keeper: one thread that holds the leases of every run of this process."""

import logging
import threading
from collections.abc import Callable

from omnirt_tasks.errors import JobNotFound, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from workers.attempts.runs import Run
from workers.host import InterruptReason

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3


class LeaseKeeper:
    """Renews the leases three times per lease time, and says when a run is to stop: cancelled, or its lease lost.

    `stop_run` is called from the keeper's thread and must not block for long. While the store is away nothing is
    lost yet, since nobody else can take the job then either.
    """

    def __init__(
        self, store: JobStore, *, lease_ttl_s: float, stop_run: Callable[[Run, InterruptReason], None]
    ) -> None:
        self._store = store
        self._lease_ttl_ms = round(lease_ttl_s * 1000)
        self._every_s = lease_ttl_s / RENEWALS_PER_TTL
        self._stop_run = stop_run
        self._runs: dict[Run, None] = {}
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self._store_away = False
        self._thread = threading.Thread(target=self._keep, name="lease-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop renewing. Idempotent."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def hold(self, run: Run) -> None:
        """Renew the run's lease from now on."""
        with self._guard:
            self._runs[run] = None

    def release(self, run: Run) -> None:
        """Renew it no longer. Idempotent."""
        with self._guard:
            self._runs.pop(run, None)

    def _keep(self) -> None:
        while not self._closed.wait(self._every_s):
            with self._guard:
                runs = list(self._runs)
            for run in runs:
                try:
                    self._renew(run)
                except Exception:  # the other runs' leases must not lapse with it
                    logger.exception("The lease of job %s could not be renewed.", run.lease.job_id)

    def _renew(self, run: Run) -> None:
        try:
            renewal = self._store.renew(run.lease, lease_ttl_ms=self._lease_ttl_ms)
        except JobNotFound:  # purged while it ran
            self._lose(run)
            return
        except StoreUnavailable as error:
            if not self._store_away:
                logger.warning("Leases cannot be renewed while the store is away: %s", error)
            self._store_away = True
            return
        if self._store_away:
            logger.warning("The store is back; leases are renewed again.")
            self._store_away = False
        if not renewal.held:
            self._lose(run)
        elif renewal.cancel_requested:
            self._stop_run(run, InterruptReason.CANCEL)

    def _lose(self, run: Run) -> None:
        with self._guard:
            if self._runs.pop(run, 0) == 0:
                return  # it ended meanwhile, and so did its lease
        self._stop_run(run, InterruptReason.LEASE_LOST)
