"""From a finished job to its result or its error."""

from omnirt_tasks.contract import GenerateResult, JobRecord, JobState
from omnirt_tasks.errors import Internal, JobCancelled, error_from


def result_of(job: JobRecord) -> GenerateResult:
    """The result of a job that is over. Raises the job's own error if it failed, JobCancelled if it was cancelled."""
    if job.state is JobState.CANCELLED:
        raise JobCancelled(f"The job {job.id} was cancelled.")
    if job.error is not None:
        raise error_from(job.error)
    if job.result is None:
        raise Internal(f"The job {job.id} is {job.state} and has no result.")
    return job.result
