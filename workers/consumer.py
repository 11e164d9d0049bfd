"""The consumer of a worker of this project, named to Celery by `worker_consumer`."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery.worker.consumer import Consumer

from workers.consumption import BACK_AGAIN, TAKE_NOTHING, put_back

UNSOUND = (ValueError, TypeError, AttributeError, RecursionError)
"""What kombu and Celery raise over an item that is no message, or one with headers of the wrong kind."""


class SoundConsumer(Consumer):
    """Celery's consumer, which outlives whatever lies in its lists.

    Celery's own ends its worker over an item that is no message. This one connects anew, and the item, which was taken
    off its list, is gone; a message that cannot be handled is refused.

    A worker that takes nothing may still be given a message, by a pop that was under way. It puts it back where it was,
    so that another worker has it next.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        consumer: Any = self  # whose stubs know little of it
        consumer.connection_errors += UNSOUND

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Let go of a connection that broke, also while a message is not acknowledged yet.

        Kombu then fails to put the message back, over a connection that is gone; its job is sent again in any case.
        """
        with suppress(AttributeError):
            super().on_connection_error_after_connected(exc)

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
        """What takes each message; one that it stumbles over would come back for ever."""
        handle = super().create_task_handler(*arguments, **options)
        consumer: Any = self
        worker = consumer.controller

        def handle_or_refuse(message: Any) -> Any:
            if worker.max_concurrency in {BACK_AGAIN, TAKE_NOTHING}:
                worker.max_concurrency = TAKE_NOTHING
                return put_back(message)
            try:
                return handle(message)
            except UNSOUND as error:
                return self.on_invalid_task(None, message, error)

        return handle_or_refuse
