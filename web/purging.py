"""Removing all that is kept of a job."""

from omnirt_tasks.contract import CancelOutcome
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.values import StoredJob
from web.services import Services


def remove(parts: Services, job: StoredJob) -> None:
    """Cancel the job if need be, and remove its files, its Celery results, and the record with all that leads to it.

    The record goes last but for what a running attempt may still write: whoever dies before can do it again. Raises
    StorageError and StoreUnavailable.
    """
    job_id = job.record.id
    outcome = parts.store.cancel(job_id)
    parts.stores.remove_files(job)
    with reaching_store():
        for task_id in (job_id, *job.parts):
            parts.celery.backend.forget(task_id)
    parts.store.purge(job_id)
    if outcome is CancelOutcome.REQUESTED:
        # Attempts that were running may have published in the meantime; from here on their commits are refused.
        for attempted in job.parts or (job_id,):
            parts.artifacts.remove_job(attempted)
