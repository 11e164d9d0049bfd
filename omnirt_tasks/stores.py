"""Everything that outlives a process, opened alike by gateway and worker.

settings ─open_stores─► Redis: jobs, live events, fleet, the broker's lists · fsspec: artifacts, uploads
"""

from collections.abc import Callable
from dataclasses import dataclass

import redis

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.fleet import RedisFleet
from omnirt_tasks.jobs.reconciler import Reconciler, celery_waiting, redis_turn
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.settings import Settings
from omnirt_tasks.uploads import UploadStorage


@dataclass(frozen=True)
class Stores:
    """The stores of one process. Every part is safe to share between threads.

    `client` speaks to the job store's database, `broker` to the Celery broker's.
    """

    settings: Settings
    client: redis.Redis
    broker: redis.Redis
    jobs: RedisJobStore
    feed: RedisFeed
    fleet: RedisFleet
    artifacts: ArtifactStorage
    uploads: UploadStorage

    def reconciler(self, resend: Callable[[str, str], None]) -> Reconciler:
        """A reconciler of these stores, not yet started; `resend` sends a job's message (job id, queue)."""
        settings = self.settings
        return Reconciler(
            self.jobs,
            every_s=settings.reconcile_every_s,
            unclaimed_after_s=settings.unclaimed_after_s,
            resend=resend,
            waiting_in_broker=celery_waiting(self.broker, prefix=broker_prefix(settings)),
            remove_files=lambda job: self.artifacts.remove_job(job.record.id),
            turn=redis_turn(self.client, prefix=settings.key_prefix, every_s=settings.reconcile_every_s),
            housekeeping=self.uploads.sweep,
        )

    def close(self) -> None:
        """End the feed, whose watchers see its end, then the connections. Idempotent."""
        self.feed.close()
        self.client.close()
        self.broker.close()


def open_stores(settings: Settings) -> Stores:
    """The stores that the settings name. Connects to nothing, so it may come before a fork."""
    client, prefix = connect(settings.redis_url), settings.key_prefix
    return Stores(
        settings=settings,
        client=client,
        broker=connect(settings.celery_url),
        jobs=RedisJobStore(client, prefix=prefix, job_ttl_s=settings.job_ttl_s),
        feed=RedisFeed(client, prefix=prefix),
        fleet=RedisFleet(client, prefix=prefix),
        artifacts=ArtifactStorage(settings.storage_url),
        uploads=UploadStorage(
            settings.storage_url,
            ttl_s=settings.upload_ttl_s,
            max_bytes=settings.max_upload_bytes,
            max_pixels=settings.max_image_pixels,
        ),
    )
