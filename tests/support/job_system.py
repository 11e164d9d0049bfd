"""A system without a gateway: its store, fleet, feed and Celery app, to send jobs and see what becomes of them."""

from functools import partial
from pathlib import Path
from typing import Any

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.broker_lists import lists_of
from omnirt_tasks.celery_app import broker_prefix, make_app
from omnirt_tasks.contract import Event, EventName, JobRecord
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.feed import RedisFeed
from omnirt_tasks.jobs.fleet import RedisFleet
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.values import WakeUp
from omnirt_tasks.jobs.watch import wait_finished
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Settings
from omnirt_tasks.submission import Submission
from omnirt_tasks.tasks import send_job
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door, parse_request
from tests.support.waiting import eventually

STUB_QUEUE = "cpu-stub-stub"


class JobSystem:
    """Sends jobs as a gateway does, and looks at what the workers make of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app = make_app(settings)
        self.redis: Any = connect(settings.redis_url)
        self.store = RedisJobStore(self.redis, prefix=settings.key_prefix, job_ttl_s=settings.job_ttl_s)
        self.fleet = RedisFleet(self.redis, prefix=settings.key_prefix)
        self.feed = RedisFeed(self.redis, prefix=settings.key_prefix)
        self.feed.on_cancel(lambda job_id: None)  # starts its thread, which is the fixture's and not a test's
        self.artifacts = ArtifactStorage(settings.storage_url)
        self.submission = Submission(
            store=self.store,
            catalog=discover(),
            fleet=self.fleet,
            uploads=UploadStorage(settings.storage_url, ttl_s=600, max_bytes=10**6, max_pixels=10**6),
            send=partial(send_job, self.app),
            door=Door(),
        )

    def send(self, job_id: str, queue: str = STUB_QUEUE) -> None:
        """Put a message of a job, or of a part, on a queue (again)."""
        send_job(self.app, WakeUp(job_id, queue))

    def submit(self, *, prompt: str = "a red circle", steps: int = 2, **config: object) -> str:
        """A job for the stub; its id."""
        body = {
            "task": "text2image",
            "model": "stub",
            "backend": "cpu-stub",
            "inputs": {"prompt": prompt},
            "config": {"num_inference_steps": steps, **config},
        }
        return self.submission.submit(parse_request(body), owner="").record.id

    def job(self, job_id: str) -> JobRecord:
        """The job as it stands."""
        return self.store.get(job_id).record

    def finished(self, job_id: str, timeout_s: float = 30.0) -> JobRecord:
        """The job once it is over."""
        job = wait_finished(self.store, self.feed, job_id, timeout_s=timeout_s)
        assert job is not None, f"not over after {timeout_s} s: {self.store.get(job_id)}"
        return job.record

    def events(self, job_id: str, *names: EventName) -> list[Event]:
        """The job's events of these names; all of them without any."""
        return [event for event in self.store.events(job_id) if not names or event.event in names]

    def seen(self, job_id: str, name: EventName, timeout_s: float = 20.0) -> Event:
        """The job's first event of this name, waited for."""
        return eventually(lambda: self.events(job_id, name), timeout_s, told=lambda: str(self.events(job_id)))[0]

    def celery_state(self, job_id: str) -> str:
        """What Celery says of the job."""
        return str(self.app.AsyncResult(job_id).state)

    def messages(self, queue: str = STUB_QUEUE) -> list[str]:
        """The raw messages that wait in the broker, those of a higher priority first."""
        lists = lists_of(queue, prefix=broker_prefix(self.settings))
        return [str(message) for name in lists for message in self.redis.lrange(name, 0, -1)]

    def local_file(self, job: JobRecord, name: str = "0.png") -> Path | None:
        """Where the job's output lies."""
        return self.artifacts.local_path(job.id, job.attempt, name)

    def close(self) -> None:
        """Let go of every connection."""
        self.feed.close()
        self.redis.close()
        self.app.close()
