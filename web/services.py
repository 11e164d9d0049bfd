"""What the gateway is made of, as one frozen value that every view reaches through `services()`.

settings ─build─► Services ─start─► the reconciler's thread        (after the fork: nothing here connects before)
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from celery import Celery
from flask import current_app

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.celery_app import make_app
from omnirt_tasks.contract import QueueReadiness, QueueStatus
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.fleet import LiveWorkers
from omnirt_tasks.jobs.reconciler import Reconciler
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.subscription import EventFeed
from omnirt_tasks.jobs.values import QueueDepth, StoredJob
from omnirt_tasks.observability import tracing
from omnirt_tasks.registry import Catalog, discover
from omnirt_tasks.routing import plain_name
from omnirt_tasks.settings import Settings
from omnirt_tasks.stores import Stores, open_stores
from omnirt_tasks.submission import Submission
from omnirt_tasks.tasks import send_job
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door
from web.auth import Gate, load_keys, make_gate
from web.expectations import Expectations
from web.publishing import publish_cheaply
from web.recent import RecentCheck, RecentFleet
from web.slots import Slots

EXTENSION = "omnirt"
WAITS_MAX = 1_000
"""How many synchronous requests wait at once in a process; each holds a thread, as a stream does."""
READY_MS = 60_000


@dataclass(frozen=True)
class Services:
    """The parts of one gateway process. Every part is safe to share between threads.

    `check_writes` raises StoreUnavailable unless the store takes writes: one that has no memory left still answers.
    """

    settings: Settings
    catalog: Catalog
    store: JobStore
    feed: EventFeed
    fleet: LiveWorkers
    artifacts: ArtifactStorage
    uploads: UploadStorage
    submission: Submission
    gate: Gate
    streams: Slots
    waits: Slots
    reconciler: Reconciler
    tracing: tracing.Tracing
    stores: Stores
    celery: Celery
    check_writes: Callable[[], None]
    expectations: Expectations

    def start(self) -> None:
        """Start the threads that work beside requests. Call it once, in the process that serves."""
        self.reconciler.start()

    def leave(self) -> None:
        """End every stream, and stop the threads; requests in hand still reach the store. Idempotent."""
        self.feed.close()
        self.reconciler.close()
        self.tracing.close()

    def close(self) -> None:
        """Leave, and close the connections, which no request may be using then. Idempotent."""
        self.leave()
        self.stores.close()

    def queues(self) -> dict[str, QueueReadiness]:
        """Every queue that holds a job or that a live worker serves, by name. Raises StoreUnavailable.

        Jobs and workers with tags count for the plain name: tags are the callers' own words, and without end.
        """
        workers = Counter(name for worker in self.fleet.live() for name in set(map(plain_name, worker.queues)))
        depths = dict.fromkeys(workers, QueueDepth(0, 0))
        for queue in self.store.queues():
            name = plain_name(queue)
            depths[name] = depths.get(name, QueueDepth(0, 0)) + self.store.depth(queue)
        return {
            name: QueueReadiness(
                workers=workers[name],
                waiting=depth.waiting,
                running=depth.running,
                waiting_by_priority=dict(depth.by_priority),
            )
            for name, depth in sorted(depths.items())
        }

    def queue_status(self, job: StoredJob) -> QueueStatus:
        """Where a queued job waits, and how long it may take. Raises StoreUnavailable."""
        model = job.resolved.model
        workers = [worker for worker in self.fleet.live() if job.queue in worker.queues and model in worker.models]
        position = self.store.position(job.record.id) if job.position is None else job.position
        eta = None if position is None else self.expectations.eta(job, position, workers)
        return QueueStatus(
            name=job.queue,
            workers=len(workers),
            position=position,
            eta_s=None if eta is None else round(eta.p50_s, 3),
            eta_p90_s=None if eta is None else round(eta.p90_s, 3),
        )


def services() -> Services:
    """The services of the current app."""
    found = current_app.extensions[EXTENSION]
    assert isinstance(found, Services)
    return found


def build(settings: Settings, tracer: tracing.Tracing | None = None) -> Services:
    """Compose a gateway's services; `tracer` is closed with them (None: ids alone).

    Connects to nothing. Raises ConfigurationError for keys that cannot be read.
    """
    stores = open_stores(settings)
    catalog = discover()
    fleet = RecentFleet(stores.fleet)
    celery = publish_cheaply(make_app(settings))
    send = partial(send_job, celery)
    return Services(
        settings=settings,
        catalog=catalog,
        store=stores.jobs,
        feed=stores.feed,
        fleet=fleet,
        artifacts=stores.artifacts,
        uploads=stores.uploads,
        submission=Submission(
            store=stores.jobs,
            catalog=catalog,
            fleet=fleet,
            uploads=stores.uploads,
            send=send,
            door=Door(allow_stub=settings.allow_stub, disabled_tiers=settings.disabled_tiers),
            queue_limit=settings.queue_limit,
            idempotency_ttl_s=settings.idempotency_ttl_s,
            max_batch_size=settings.max_batch_size,
        ),
        gate=make_gate(load_keys(settings.api_keys_file), settings.allowed_origins),
        streams=Slots(per_owner=settings.max_streams_per_key, total=settings.max_streams, what="streams"),
        waits=Slots(per_owner=WAITS_MAX, total=WAITS_MAX, what="waiting requests"),
        reconciler=stores.reconciler(send),
        tracing=tracer or tracing.ids_only(),
        stores=stores,
        celery=celery,
        check_writes=RecentCheck(partial(_write, stores)),  # anybody may ask for it, and it reaches the disk
        expectations=Expectations(stores.jobs),
    )


def _write(stores: Stores) -> None:
    with reaching_store():
        stores.client.set(f"{stores.settings.key_prefix}:ready", 1, px=READY_MS)
