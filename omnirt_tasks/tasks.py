"""How a job reaches a worker: a Celery message that carries its id, and nothing else of it."""

from collections.abc import Mapping
from types import MappingProxyType

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from omnirt_tasks.contract import Priority
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.values import WakeUp

GENERATE = "omnirt.generate"
CELERY_PRIORITIES: Mapping[Priority, int] = MappingProxyType({Priority.HIGH: 0, Priority.NORMAL: 3, Priority.LOW: 6})
"""Celery's number for each priority: on Redis 0 goes first."""


def send_job(app: Celery, wake_up: WakeUp, *, traceparent: str | None = None) -> None:
    """Put the message of a job, or of a part of one, on its queue. Safe to repeat: a worker drops one that is not due.

    The Celery task has the id of the job or part. `traceparent` (W3C) lets the worker join the caller's trace.
    Raises StoreUnavailable when the broker does not take it; the reconciler sends it later.
    """
    headers = {} if traceparent is None else {"traceparent": traceparent}
    try:
        # The two steps of `send_task` without what a submit does not need and would pay for with half its time: looking
        # a route up and declaring a queue (its workers do; the default exchange reaches it by name), and subscribing
        # this process to the result of every job it ever sends.
        args = [wake_up.job_id]
        message = app.amqp.create_task_message(wake_up.job_id, GENERATE, args, {}, argsrepr=repr(args), kwargsrepr="{}")
        priority = CELERY_PRIORITIES[wake_up.priority]
        with app.producer_or_acquire() as producer:
            app.amqp.send_task_message(
                producer,
                GENERATE,
                message,
                queue=Queue(wake_up.queue),
                declare=(),
                headers=headers,
                priority=priority,
            )
    except (OperationalError, OSError) as error:
        raise StoreUnavailable("The broker does not take messages.", "Try again shortly.") from error
