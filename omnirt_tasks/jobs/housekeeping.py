"""What is done from time to time: removing what nobody needs any more.

It has a thread of its own, since storage may be slow or away, and the recovery of jobs must not wait for it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from time import monotonic

from omnirt_tasks.errors import OmnirtError, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import StoredJob

log = logging.getLogger(__name__)

SWEEP_LIMIT = 100
"""The most expired jobs that are removed at once; the rest follows the next time."""

Turn = Callable[[], AbstractContextManager[bool]]
"""Entered before something that one of many processes is to do; yields whether it is this one."""


def everyones_turn() -> AbstractContextManager[bool]:
    """The turn of a process that has no others beside it."""
    return nullcontext(True)


@dataclass(frozen=True)
class Chore:
    """Something to do every `every_s`, if it is this process's turn; `name` begins a sentence of the log."""

    name: str
    do: Callable[[], object]
    every_s: float
    turn: Turn = everyones_turn


class Housekeeper:
    """A thread that does the chores, each in its time, the first time at once.

    A chore that fails is logged, once in a row, and tried again when its time comes again.
    """

    def __init__(self, chores: Sequence[Chore]) -> None:
        self._due_at = dict.fromkeys(chores, float("-inf"))
        self._failing: set[str] = set()  # the chores that failed when last done
        self._closing = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start the thread. Call it once, after any fork."""
        self._thread = Thread(target=self._run, name="omnirt-housekeeper", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the chore in hand, waiting at most `timeout_s`. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def round(self) -> None:
        """Do what is due."""
        for chore in self._due_at:
            if monotonic() >= self._due_at[chore] and not self._closing.is_set():
                self._due_at[chore] = monotonic() + chore.every_s
                self._do(chore)

    def _run(self) -> None:
        while not self._closing.wait(max(0.0, min(self._due_at.values()) - monotonic())):
            self.round()

    def _do(self, chore: Chore) -> None:
        try:
            with chore.turn() as mine:
                if mine:
                    chore.do()
        except StoreUnavailable:
            return  # the reconciler tells of that
        except Exception:  # the one boundary of this thread
            if chore.name not in self._failing:
                log.exception("%s failed; further failures in a row are not logged", chore.name)
            self._failing.add(chore.name)
        else:
            if mine and chore.name in self._failing:
                log.info("%s works again", chore.name)
                self._failing.discard(chore.name)


class ExpirySweep:
    """Removes the jobs whose time is over: first the files, then the record that leads to them."""

    def __init__(self, store: JobStore, remove_files: Callable[[StoredJob], None]) -> None:
        self._store = store
        self._remove_files = remove_files
        self._passed_over = 0  # expired jobs, oldest first, whose files could not be removed

    def __call__(self) -> None:
        """Remove as many as `SWEEP_LIMIT`. Raises the last error, when all the others have had their turn."""
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
