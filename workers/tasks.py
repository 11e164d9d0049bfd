"""The Celery task: a thin shell around an attempt, which tells Celery the truth about how it ended.

Celery imports this module, by the app's `include`, in worker processes alone; with it come the worker's own steps.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from celery import Task
from celery.exceptions import Ignore, InvalidTaskError
from celery.worker.strategy import default as default_strategy

from omnirt_tasks.contract import JobState
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import Internal, OmnirtError, StoreUnavailable, WorkerLost, error_from
from omnirt_tasks.jobs.store import StoredJob
from omnirt_tasks.tasks import GENERATE, send_job
from workers.attempts import AttemptRunner

logger = logging.getLogger(__name__)


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """How a worker takes a message of this task: as Celery does, but one without an id is refused.

    Celery takes the missing id for a lost connection, puts the message back, and meets it again for ever.
    """
    take = default_strategy(task, app, consumer)

    def take_if_sound(message: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(message.headers.get("id"), str):
            raise InvalidTaskError("the message has no id")
        return take(message, *arguments, **options)

    return take_if_sound


class GenerateTask(Task):  # type: ignore[type-arg]  # the stubs' parameters do not exist at run time
    """`omnirt.generate`: runs the job with the given id.

    Flower and `celery result ID` see it as SUCCESS with the outputs' addresses, as FAILURE with the job's error, as
    REVOKED when it was cancelled, and as RETRY while it waits for another worker.
    """

    name = GENERATE
    # The message of a job that is over, or that runs elsewhere, must not touch what is stored: so `run` itself tells
    # that a job has started, once the device has it.
    track_started = False
    throws = (OmnirtError,)  # in the log a line, without a traceback
    Strategy = f"{__name__}:strategy"
    runner: AttemptRunner | None = None

    def run(self, job_id: str) -> JsonObject:
        """The outcome of the job as a small value; its record has the rest."""
        if self.runner is None or not isinstance(job_id, str):
            raise Ignore
        try:
            job = self.runner.run(job_id, on_begun=self._tell_started)
        except StoreUnavailable as error:
            logger.warning("Job %s was not begun; it will be sent again. %s", job_id, error)
            raise Ignore from error
        if job is None:
            raise Ignore
        return self._told(job)

    def _told(self, job: StoredJob) -> JsonObject:
        record = job.record
        match record.state:
            case JobState.SUCCEEDED if record.result is not None:
                urls = [output.url for output in record.result.outputs]
                return {"job_id": record.id, "state": str(record.state), "outputs": list(urls)}
            case JobState.FAILED:
                raise Internal("The job failed.") if record.error is None else error_from(record.error)
            case JobState.CANCELLED:
                self.backend.mark_as_revoked(record.id, "cancelled", request=self.request)
                self.send_event("task-revoked", terminated=True, signum=None, expired=False)
            case JobState.QUEUED:
                # Stored before the message goes out: another worker may be quick.
                self.backend.mark_as_retry(record.id, WorkerLost("The worker is leaving."), request=self.request)
                self.send_event("task-retried", exception="the worker is leaving", traceback="")
                send_job(self.app, record.id, job.queue, traceparent=job.traceparent)
        raise Ignore

    def _tell_started(self) -> None:
        meta: dict[str, Any] = {"pid": os.getpid(), "hostname": self.request.hostname}
        try:
            self.update_state(state="STARTED", meta=meta)
        except Exception as error:  # noqa: BLE001  # whatever the result backend raises, the job itself can run
            logger.warning("That a job has started could not be told to Celery: %s", error)
