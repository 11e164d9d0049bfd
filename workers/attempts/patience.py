"""Patience with a store that is away: a call is made again until it is back."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from omnirt_tasks.errors import StoreUnavailable

logger = logging.getLogger(__name__)

STORE_PATIENCE_S = 300.0
LEAVING_PATIENCE_S = 10.0
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0

T = TypeVar("T")


class Patience:
    """Waits for the store, five minutes at most, and ten seconds once the worker is `leaving`."""

    def __init__(self, leaving: threading.Event) -> None:
        self._leaving = leaving

    def __call__(self, call: Callable[[], T], what: str) -> T:
        """The call's value; `what` says in the log what was to be done with a job. Raises StoreUnavailable."""
        started_s, backoff_s = time.monotonic(), BACKOFF_FIRST_S
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                patience_s = LEAVING_PATIENCE_S if self._leaving.is_set() else STORE_PATIENCE_S
                if time.monotonic() - started_s > patience_s:
                    raise
                if backoff_s == BACKOFF_FIRST_S:
                    logger.warning("A job cannot be %s while the store is away: %s", what, error)
                time.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
