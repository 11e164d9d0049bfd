"""Watching a job: its log and its live events as one stream, and waiting for its end."""

from collections.abc import Generator
from contextlib import closing
from time import monotonic

from omnirt_tasks.contract import Event
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.subscription import EventSource
from omnirt_tasks.jobs.values import StoredJob

RETRY_S = 1.0
"""How long a watcher waits before it asks a store again that was away."""

REREAD_S = 10.0
"""How long a waiter trusts the feed alone. The record is read again then, should Redis have come back empty-handed
or a notice have got lost in a way that the feed cannot see; so a wait ends late at worst, never not at all."""


def watch(
    store: JobStore, feed: EventSource, job_id: str, *, after: int = 0, keepalive_s: float = 15.0
) -> Generator[Event | None, None, None]:
    """The job's events with seq > `after`, in order, without gap or repeat, until the terminal event is told.

    Yields None after at most `keepalive_s` without an event. An `after` at or beyond the end waits for what comes;
    if the job is over there is nothing, and the stream ends at once. What the log has dropped (it keeps the newest
    1,000) is passed over. A store that goes away meanwhile is waited for. Close the generator to stop.

    Raises JobNotFound, at the first step for an unknown job, later for one that is purged unseen; StoreUnavailable
    when the store is away at the first step, or the feed is closed.
    """
    with closing(feed.subscribe(job_id)) as subscription:  # first, so that nothing falls between log and feed
        job = store.get(job_id)
        last = min(after, job.last_seq)
        over = job.record.finished
        behind, missed = True, False
        while True:
            if behind:
                try:
                    if missed and not over:
                        last = _still_logged(store.get(job_id), last)
                    logged = store.events(job_id, after=last)
                except StoreUnavailable:
                    logged = ()
                else:
                    behind = missed = False
                for event in logged:
                    yield event
                    last = event.seq
                    if event.terminal:
                        return
                if over and not behind:
                    return
            signal = subscription.next(RETRY_S if behind else keepalive_s)
            if signal is None:
                yield None
            elif not isinstance(signal, Event) or signal.seq > last + 1:
                behind, missed = True, missed or not isinstance(signal, Event)
            elif signal.seq == last + 1:
                yield signal
                last = signal.seq
                if signal.terminal:
                    return


def _still_logged(job: StoredJob, last: int) -> int:
    """What the log still counts of `last`, which a watcher was told.

    A Redis that lost its newest writes gives their numbers anew. The end, which is told last, was not told yet.
    """
    return min(last, job.last_seq - 1 if job.record.finished else job.last_seq)


def wait_finished(store: JobStore, feed: EventSource, job_id: str, *, timeout_s: float) -> StoredJob | None:
    """The job once it is over, or None if that takes longer than `timeout_s`.

    Raises JobNotFound, and StoreUnavailable when the store is away at the start or at the deadline.
    """
    deadline = monotonic() + timeout_s
    with closing(feed.subscribe(job_id)) as subscription:
        job = store.get(job_id)
        patience_s = REREAD_S
        while not job.record.finished:
            reread_at = min(deadline, monotonic() + patience_s)
            while (left_s := reread_at - monotonic()) > 0:
                signal = subscription.next(left_s)
                if signal is not None and (not isinstance(signal, Event) or signal.terminal):
                    break
            try:
                job = store.get(job_id)
                patience_s = REREAD_S
            except StoreUnavailable:
                if monotonic() >= deadline:
                    raise
                patience_s = RETRY_S
            if monotonic() >= deadline:
                break
        return job if job.record.finished else None
