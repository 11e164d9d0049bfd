"""The Celery task: a thin shell around an attempt, which tells Celery the truth about how it ended.

Celery imports this module, by the app's `include`, in worker processes alone; with it come the worker's own steps.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from workers.attempts.endings import LEAVING, AttemptEnd

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
    REVOKED when it was cancelled, and as RETRY while it waits for its next attempt.
    """

    name = GENERATE
    # The message of a job that is over, or that runs elsewhere, must not touch what is stored: so `run` itself tells
    # that a job has started, once the device has it.
    track_started = False
    throws = (OmnirtError,)  # in the log a line, without a traceback
    Strategy = f"{__name__}:strategy"
    runner: AttemptRunner | None = None

    def run(self, job_id: object) -> JsonObject:
        """The outcome of the job as a small value; its record has the rest."""
        if not isinstance(job_id, str):
            logger.warning("A message names no job; it is dropped.")
            raise Ignore
        if self.runner is None:
            logger.error("Job %s came to a worker that serves no device; it will be sent again.", job_id)
            raise Ignore
        try:
            end = self.runner.run(job_id, on_begun=self._tell_started)
        except StoreUnavailable as error:
            logger.warning("Job %s was not begun; it will be sent again. %s", job_id, error)
            raise Ignore from error
        if end is None:
            raise Ignore
        return self._told(end)

    def _told(self, end: AttemptEnd) -> JsonObject:
        record = end.job.record
        match record.state:
            case JobState.SUCCEEDED if record.result is not None:
                urls = [output.url for output in record.result.outputs]
                return {"job_id": record.id, "state": str(record.state), "outputs": list(urls)}
            case JobState.FAILED:
                raise Internal("The job failed.") if record.error is None else error_from(record.error)
            case JobState.CANCELLED:
                with _telling(record.id):
                    self.backend.mark_as_revoked(record.id, "cancelled", request=self.request)
                    self.send_event("task-revoked", terminated=True, signum=None, expired=False)
            case JobState.QUEUED:
                # Stored before the message goes out: another worker may be quick.
                reason = (end.requeue or LEAVING).reason
                with _telling(record.id):
                    again = WorkerLost(f"The job is back in its queue: {reason}.")
                    self.backend.mark_as_retry(record.id, again, request=self.request)
                    self.send_event("task-retried", exception=reason, traceback="")
                if end.to_send:
                    self._send(end.job)
        raise Ignore

    def _send(self, job: StoredJob) -> None:
        try:
            send_job(self.app, job.record.id, job.queue, traceparent=job.traceparent)
        except StoreUnavailable as error:
            logger.warning("Job %s: the message waits for the reconciler: %s", job.record.id, error)

    def _tell_started(self) -> None:
        with _telling(self.request.id):
            self.update_state(state="STARTED", meta={"pid": os.getpid(), "hostname": self.request.hostname})


@contextmanager
def _telling(job_id: str | None) -> Iterator[None]:
    """Whatever Celery's result backend or event stream raises, the job's record is the truth, and stands."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        logger.warning("How job %s stands could not be told to Celery: %s", job_id, error)
