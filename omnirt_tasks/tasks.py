"""How a job reaches a worker: a Celery message that carries its id, and nothing else of it."""

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from omnirt_tasks.errors import StoreUnavailable

GENERATE = "omnirt.generate"


def send_job(app: Celery, job_id: str, queue: str, *, traceparent: str | None = None) -> None:
    """Put the job's message on the queue. Safe to repeat: a worker drops a message whose job is not waiting.

    The Celery task has the job's id. `traceparent` (W3C) lets the worker join the caller's trace.
    Raises StoreUnavailable when the broker does not take it; the reconciler sends it later.
    """
    headers = {} if traceparent is None else {"traceparent": traceparent}
    try:
        # The two steps of `send_task` without what a submit does not need and would pay for with half its time: looking
        # a route up and declaring a queue (its workers do; the default exchange reaches it by name), and subscribing
        # this process to the result of every job it ever sends.
        args = [job_id]
        message = app.amqp.create_task_message(job_id, GENERATE, args, {}, argsrepr=repr(args), kwargsrepr="{}")
        with app.producer_or_acquire() as producer:
            app.amqp.send_task_message(producer, GENERATE, message, queue=Queue(queue), declare=(), headers=headers)
    except (OperationalError, OSError) as error:
        raise StoreUnavailable("The broker does not take messages.", "Try again shortly.") from error
