"""Chunking, from the side of Celery: jobs that share forward passes, and jobs of parts, are tasks like any other.

    split: request for n pictures ─► parts (splitting), each a message and a Celery task of its own
    merge: tasks that run at once share the device's calls, inside the device side (workers/chunks)

A part's Celery task has the part's id, "{job id}.{number}". The job's own id is a task to Celery too, which nobody
runs: `ChunkingTask.tell_whole` tells how it ended.
"""

import celery
from celery.states import READY_STATES

from omnirt_tasks.celery_app import TasksApp
from omnirt_tasks.contract import JobRecord, JobState
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import Internal, OmnirtError, error_from
from omnirt_tasks.jobs.values import StoredJob
from omnirt_tasks.settings import Settings
from omnirt_tasks.tasks import GENERATE, send_job


class ChunkingTask(celery.Task):  # type: ignore[type-arg]  # the stubs' parameters do not exist at run time
    """The Celery base of `omnirt.generate`: each member of a chunk, and each part of a job, is a task of its own.

    `celery inspect registered max_batch_size batch_window_ms` shows what its worker was told of sharing.
    """

    name = GENERATE
    # The message of a job that is over, or that runs elsewhere, must not touch what is stored: so `run` itself tells
    # that a job has started, once the device has it.
    track_started = False
    throws = (OmnirtError,)  # in the log a line, without a traceback

    @property
    def _settings(self) -> Settings:
        app = self.app
        assert isinstance(app, TasksApp), "the task belongs to an app of this project"
        return app.settings

    @property
    def max_batch_size(self) -> int | None:
        """The most jobs that share a forward pass; None: as many as pays, as measured."""
        return self._settings.max_batch_size

    @property
    def batch_window_ms(self) -> float:
        """How long a job waits for others to share its first forward pass with."""
        return self._settings.batch_window_ms

    def send(self, job: StoredJob) -> None:
        """Put the job's message on its queue, or those of its parts. Raises StoreUnavailable."""
        for wake_up in job.wake_ups:
            send_job(self.app, wake_up, traceparent=job.traceparent)

    def outcome(self, job: StoredJob) -> JsonObject:
        """What Celery is told of a job, or part, that is over. Raises the job's error if it failed."""
        record = job.record
        if record.state is JobState.FAILED:
            raise _error_of(record)
        outputs = () if record.result is None else record.result.outputs
        told: JsonObject = {"state": str(record.state), "outputs": [output.url for output in outputs]}
        if job.part is None:
            return {"job_id": record.id, **told}
        return {"job_id": job.part.job_id, "part": job.part.number, **told}

    def tell_whole(self, whole: StoredJob) -> None:
        """Tell Celery how a job that was split ended: its result backend, and by one event, as of this worker.

        Whoever sees the end of a part may call it: Celery is told once, but for calls of the same moment. Nothing is
        told of a job that is not over. Raises whatever backend and broker raise.
        """
        record = whole.record
        if self.backend.get_state(record.id) in READY_STATES:
            return
        match record.state:
            case JobState.SUCCEEDED:
                outcome = self.outcome(whole)
                self.backend.mark_as_done(record.id, outcome)
                self._send_event_of(whole, "task-succeeded", result=repr(outcome))
            case JobState.FAILED:
                error = _error_of(record)
                self.backend.mark_as_failure(record.id, error)
                self._send_event_of(whole, "task-failed", exception=repr(error), traceback="")
            case JobState.CANCELLED:
                self.backend.mark_as_revoked(record.id, "cancelled")
                self._send_event_of(whole, "task-revoked", terminated=True, signum=None, expired=False)

    def _send_event_of(self, whole: StoredJob, event: str, **fields: object) -> None:
        """As Celery's own events of a task, with the times of its record; no worker told of an earlier one."""
        record = whole.record
        sent_s, started_s, ended_s = map(_seconds, (record.enqueued_at_ms, record.started_at_ms, record.finished_at_ms))
        with self.app.events.default_dispatcher(hostname=self.request.hostname) as dispatcher:
            dispatcher.send(
                event,
                uuid=record.id,
                name=self.name,
                args=repr([record.id]),
                kwargs="{}",
                sent=sent_s,
                received=started_s,
                started=started_s,
                timestamp=ended_s,
                retry=True,
                retry_policy=self.app.conf.task_publish_retry_policy,
                **fields,
            )


def _error_of(record: JobRecord) -> OmnirtError:
    return Internal("The job failed.") if record.error is None else error_from(record.error)


def _seconds(unix_ms: int | None) -> float | None:
    return None if unix_ms is None else unix_ms / 1000
