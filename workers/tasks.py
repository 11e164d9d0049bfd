"""The Celery task: a thin shell around an attempt, which tells Celery the truth about how it ended.

Celery imports this module, by the app's `include`, in worker processes alone; with it come the worker's own steps.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery.exceptions import Ignore, InvalidTaskError
from celery.worker.strategy import default as default_strategy

from omnirt_tasks.chunking import ChunkingTask
from omnirt_tasks.contract import JobState
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import StoreUnavailable, WorkerLost
from omnirt_tasks.jobs.values import StoredJob, WakeUp
from workers.attempts import AttemptRunner
from workers.attempts.endings import LEAVING, NO_ROOM, AttemptEnd

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


class GenerateTask(ChunkingTask):
    """`omnirt.generate`: runs the job with the given id, or the part of one.

    Flower and `celery result ID` see it as SUCCESS with the outputs' addresses, as FAILURE with the job's error, as
    REVOKED when it was cancelled, and as RETRY while it waits for its next attempt. They see so each part of a job that
    was split, and the whole once it is over.
    """

    Strategy = f"{__name__}:strategy"
    runner: AttemptRunner | None = None
    to_front: Callable[[WakeUp], object] | None = None  # lets a message that was sent be the next one to be taken

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
        if end.whole is not None and not _ended_by_another(end, end.whole):
            with _telling(end.whole.record.id):
                self.tell_whole(end.whole)
        return self._told(end)

    def _told(self, end: AttemptEnd) -> JsonObject:
        record = end.job.record
        match record.state:
            case JobState.SUCCEEDED | JobState.FAILED:
                return self.outcome(end.job)
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
                    self._send(end)
        raise Ignore

    def _send(self, end: AttemptEnd) -> None:
        try:
            self.send(end.job)
            if end.requeue == NO_ROOM and self.to_front is not None:  # it had come to its turn
                for wake_up in end.job.wake_ups:
                    self.to_front(wake_up)
        except StoreUnavailable as error:
            logger.warning("Job %s: the message waits for the reconciler: %s", end.job.record.id, error)

    def _tell_started(self) -> None:
        with _telling(self.request.id):
            self.update_state(state="STARTED", meta={"pid": os.getpid(), "hostname": self.request.hostname})


def _ended_by_another(end: AttemptEnd, whole: StoredJob) -> bool:
    """Whether the whole job succeeded with another part: those that shared their last forward pass end at once."""
    finished_at_ms = end.job.record.finished_at_ms
    return whole.record.state is JobState.SUCCEEDED and finished_at_ms != whole.record.finished_at_ms


@contextmanager
def _telling(job_id: str | None) -> Iterator[None]:
    """Whatever Celery's result backend or event stream raises, the job's record is the truth, and stands."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        logger.warning("How job %s stands could not be told to Celery: %s", job_id, error)
