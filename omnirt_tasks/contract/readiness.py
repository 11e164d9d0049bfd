"""What a gateway says of itself and of what stands behind it."""

from pydantic import Field

from omnirt_tasks.contract.base import Answer
from omnirt_tasks.contract.request import Priority


class QueueReadiness(Answer):
    """How many live workers serve a queue, and how many of its jobs wait and run.

    `waiting_by_priority` tells those that wait apart, by the priority that they count as by now, where some do.
    """

    workers: int
    waiting: int
    running: int
    waiting_by_priority: dict[Priority, int] = Field(default_factory=dict)


class Readiness(Answer):
    """Whether jobs are accepted.

    `queues` are those that hold a job or that a worker serves, by their names without tags: jobs and workers with
    tags count for the plain name.
    """

    ok: bool
    job_store_backend: str
    remote_worker_count: int
    queues: dict[str, QueueReadiness]
