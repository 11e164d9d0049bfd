"""Whether a job whose attempt failed is tried again, where and when: decided here, done elsewhere."""

from dataclasses import dataclass

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.errors import JobTimeout, OutOfMemory, error_from
from omnirt_tasks.jobs.values import Requeue

GROWTH = 4
LEFT_TO_OTHERS_S = 15.0
"""How long a worker leaves a job to the others: long enough for one that has just taken up another to come back."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a job is tried again after an error that another attempt may not meet, and how long it waits first.

    Each further retry waits four times as long as the one before.
    """

    retries_max: int = 2
    backoff_s: float = 1.0


@dataclass(frozen=True)
class Failure:
    """An attempt that failed: what the decision rests on.

    `retries` is how often the job was tried again already, `accompanied` whether the attempt shared its device with
    others, `elsewhere` whether another live worker could run the job. `part_unproven` says that it is a part of a job
    that was split, and was not yet tried with a device to itself.
    """

    error: ErrorInfo
    retries: int
    accompanied: bool
    elsewhere: bool
    part_unproven: bool = False


def requeue_after(failure: Failure, policy: RetryPolicy) -> Requeue | None:
    """How the job goes back to its queue; None where nothing would come of it, and it has failed.

    A part of a job is not given up, and all the others with it, before it was tried alone, whatever its error says.
    """
    error = failure.error
    if error_from(error).tried_again and failure.retries < policy.retries_max:
        return Requeue(
            error.code,
            retry=True,
            delay_ms=round(policy.backoff_s * 1000 * GROWTH**failure.retries),
            avoid_ms=round(LEFT_TO_OTHERS_S * 1000) if failure.elsewhere else 0,
        )
    lacked_room = failure.accompanied and error.code == OutOfMemory.code
    unproven = failure.part_unproven and error.code != JobTimeout.code
    return Requeue(error.code, alone=True) if lacked_room or unproven else None
