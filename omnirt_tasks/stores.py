"""Everything that outlives a process, opened alike by gateway and worker.

settings ─open_stores─► Redis: jobs, live events, fleet, the broker's lists · fsspec: artifacts, uploads
"""

from collections.abc import Callable
from dataclasses import dataclass

import redis

from omnirt_tasks.artifacts import NO_ATTEMPT, ArtifactStorage
from omnirt_tasks.broker_lists import celery_waiting
from omnirt_tasks.celery_app import broker_prefix
from omnirt_tasks.contract import JobState
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.fleet import RedisFleet
from omnirt_tasks.jobs.housekeeping import Chore, Turn
from omnirt_tasks.jobs.reconciler import Reconciler, redis_age, redis_turn
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.values import StoredJob, WakeUp
from omnirt_tasks.settings import Settings
from omnirt_tasks.uploads import UploadStorage

UPLOAD_SWEEP_EVERY_S = 60.0
SWEEP_LIMIT_S = 60.0
"""How long the removing of expired jobs, or orphaned files, may take before another process takes its turn."""


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

    def reconciler(self, resend: Callable[[WakeUp], None]) -> Reconciler:
        """A reconciler of these stores, not yet started; `resend` sends a job's message."""
        settings = self.settings

        def turn(what: str, every_s: float, limit_s: float | None = None) -> Turn:
            return redis_turn(self.client, prefix=settings.key_prefix, every_s=every_s, what=what, limit_s=limit_s)

        return Reconciler(
            self.jobs,
            every_s=settings.reconcile_every_s,
            unclaimed_after_s=settings.unclaimed_after_s,
            resend=resend,
            waiting_in_broker=celery_waiting(self.broker, prefix=broker_prefix(settings)),
            remove_files=self.remove_files,
            turn=turn("reconciler", settings.reconcile_every_s),
            sweep_turn=turn("sweeper", settings.reconcile_every_s, SWEEP_LIMIT_S),
            chores=(
                Chore(
                    "Removing expired uploads",
                    self.uploads.sweep,
                    UPLOAD_SWEEP_EVERY_S,
                    turn("upload-sweeper", UPLOAD_SWEEP_EVERY_S),
                ),
                Chore(
                    "Removing orphaned files",
                    self._sweep_orphans,
                    settings.orphan_sweep_every_s,
                    turn("orphan-sweeper", settings.orphan_sweep_every_s, SWEEP_LIMIT_S),
                ),
            ),
            lease_ttl_s=settings.lease_ttl_s,
            store_age_s=redis_age(self.client),
        )

    def remove_files(self, job: StoredJob) -> None:
        """Remove what the job has in storage: outputs, checkpoints, and the inputs that came inside its request."""
        for job_id in (job.record.id, *job.parts):
            self.artifacts.remove_job(job_id)
        self.uploads.remove_inputs(job.record.id, job.resolved.inputs)

    def _sweep_orphans(self) -> int:
        return self.artifacts.sweep_orphans(self._attempt_that_counts, older_than_s=self.settings.job_ttl_s)

    def _attempt_that_counts(self, job_id: str) -> int | None:
        """What counts of a job or part: a part's files count once the whole job has succeeded."""
        job = self.jobs.get(job_id)
        whole = job if job.part is None else self.jobs.get(job.part.job_id)
        if not whole.record.finished:
            return None
        return job.record.attempt if whole.record.state is JobState.SUCCEEDED else NO_ATTEMPT

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
        jobs=RedisJobStore(
            client,
            prefix=prefix,
            job_ttl_s=settings.job_ttl_s,
            deaths_max=settings.deaths_max,
            promote_after_s=settings.promote_after_s,
        ),
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
