"""What the gateway is made of, as one frozen value that every view reaches through `services()`.

settings ─build─► Services ─start─► the reconciler's thread        (after the fork: nothing here connects before)
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import redis
from flask import current_app

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.celery_app import broker_prefix, make_app
from omnirt_tasks.contract import QueueStatus
from omnirt_tasks.errors import JobNotFound
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.fleet import Fleet, RedisFleet
from omnirt_tasks.jobs.reconciler import Reconciler, celery_waiting, redis_turn
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.store import EventFeed, JobStore, StoredJob
from omnirt_tasks.observability import tracing
from omnirt_tasks.registry import Catalog, discover
from omnirt_tasks.settings import Settings
from omnirt_tasks.submission import Submission
from omnirt_tasks.tasks import send_job
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door
from web.auth import Gate, load_keys, make_gate
from web.publishing import publish_cheaply
from web.recent import RecentFleet
from web.slots import Slots

EXTENSION = "omnirt"
WAITS_MAX = 1_000
"""How many synchronous requests wait at once in a process; each holds a thread, as a stream does."""


@dataclass(frozen=True)
class Services:
    """The parts of one gateway process. Every part is safe to share between threads."""

    settings: Settings
    catalog: Catalog
    store: JobStore
    feed: EventFeed
    fleet: Fleet
    artifacts: ArtifactStorage
    uploads: UploadStorage
    submission: Submission
    gate: Gate
    streams: Slots
    waits: Slots
    reconciler: Reconciler
    tracing: tracing.Tracing
    connections: tuple[redis.Redis, ...] = ()

    def start(self) -> None:
        """Start the threads that work beside requests. Call it once, in the process that serves."""
        self.reconciler.start()

    def close(self) -> None:
        """End every stream, and stop the threads. Idempotent."""
        self.feed.close()
        self.reconciler.close()
        self.tracing.close()
        for connection in self.connections:
            connection.close()

    def count_workers(self) -> dict[str, int]:
        """Live workers by the full name of each queue that they serve. Raises StoreUnavailable."""
        return dict(Counter(queue for worker in self.fleet.live() for queue in worker.queues))

    def queue_status(self, job: StoredJob) -> QueueStatus:
        """Where a queued job waits. Raises StoreUnavailable."""
        model = job.resolved.model
        workers = sum(job.queue in worker.queues and model in worker.models for worker in self.fleet.live())
        position = self.store.position(job.record.id) if job.position is None else job.position
        return QueueStatus(name=job.queue, workers=workers, position=position)

    @staticmethod
    def missing_job(job_id: str) -> JobNotFound:
        """What is said of a job that is not there, or not the caller's."""
        return JobNotFound(f"There is no job {job_id[:64]!r}.", "It may have expired, or been purged.")


def services() -> Services:
    """The services of the current app."""
    found = current_app.extensions[EXTENSION]
    assert isinstance(found, Services)
    return found


def build(settings: Settings, tracer: tracing.Tracing | None = None) -> Services:
    """Compose a gateway's services; `tracer` is closed with them (None: ids alone).

    Connects to nothing. Raises ConfigurationError for keys that cannot be read.
    """
    client = connect(settings)
    broker = connect(settings.model_copy(update={"redis_url": settings.broker_url or settings.redis_url}))
    prefix = settings.key_prefix
    catalog = discover()
    store = RedisJobStore(client, prefix=prefix, job_ttl_s=settings.job_ttl_s)
    fleet = RecentFleet(RedisFleet(client, prefix=prefix))
    artifacts = ArtifactStorage(settings.storage_url)
    uploads = UploadStorage(
        settings.storage_url,
        ttl_s=settings.upload_ttl_s,
        max_bytes=settings.max_upload_bytes,
        max_pixels=settings.max_image_pixels,
    )
    send = partial(send_job, publish_cheaply(make_app(settings)))
    return Services(
        settings=settings,
        catalog=catalog,
        store=store,
        feed=RedisFeed(client, prefix=prefix),
        fleet=fleet,
        artifacts=artifacts,
        uploads=uploads,
        submission=Submission(
            store=store,
            catalog=catalog,
            fleet=fleet,
            uploads=uploads,
            send=send,
            door=Door(allow_stub=settings.allow_stub, disabled_tiers=settings.disabled_tiers),
            queue_limit=settings.queue_limit,
        ),
        gate=make_gate(load_keys(settings.api_keys_file), settings.allowed_origins),
        streams=Slots(per_owner=settings.max_streams_per_key, total=settings.max_streams, what="streams"),
        waits=Slots(per_owner=WAITS_MAX, total=WAITS_MAX, what="waiting requests"),
        reconciler=Reconciler(
            store,
            every_s=settings.reconcile_every_s,
            unclaimed_after_s=settings.unclaimed_after_s,
            resend=send,
            waiting_in_broker=celery_waiting(broker, prefix=broker_prefix(settings)),
            remove_files=lambda job: artifacts.remove_job(job.record.id),
            turn=redis_turn(client, prefix=prefix, every_s=settings.reconcile_every_s),
            housekeeping=uploads.sweep,
        ),
        tracing=tracer or tracing.ids_only(),
        connections=(client, broker),
    )
