"""The connection to Redis: how it is made, and how its failures are told."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from pydantic import SecretStr
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

from omnirt_tasks.errors import StoreUnavailable

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
HEALTH_CHECK_EVERY_S = 15
CONNECTIONS_MAX = 50
RETRY_AFTER_S = 2

# What a server says when it is there but takes no work now, beside the errors that redis-py has classes for.
_TRANSIENT_CODES = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "UNKILLABLE", "BUSY")
_TRANSIENT_ERRORS = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
)


def connect(url: str | SecretStr) -> redis.Redis:
    """A client of the Redis at this URL; answers are text. Connects at its first command, and threads may share it.

    It opens at most `CONNECTIONS_MAX` connections; more threads than that wait their turn. A command that fails on
    the network is sent again once: every script of the store may run twice.
    """
    address = url.get_secret_value() if isinstance(url, SecretStr) else url
    keepalive = {} if address.startswith("unix:") else {"socket_keepalive": True}
    pool = redis.BlockingConnectionPool.from_url(
        address,
        max_connections=CONNECTIONS_MAX,
        timeout=ANSWER_TIMEOUT_S,
        decode_responses=True,
        encoding_errors="replace",  # ours is sound; what others left in a broker's list must not stop us
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        health_check_interval=HEALTH_CHECK_EVERY_S,
        retry=Retry(ConstantBackoff(0.05), 1),
        **keepalive,
    )
    return redis.Redis.from_pool(pool)


def subscriber_of(client: redis.Redis) -> redis.Redis:
    """A client of the same server for a subscriber, which must learn of every lost connection: nothing is retried."""
    pool = client.connection_pool
    quiet = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0), "health_check_interval": 0}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **quiet))


@contextmanager
def reaching_store() -> Iterator[None]:
    """Turns every failure to reach Redis, or to write to it, into StoreUnavailable; other errors are faults of ours."""
    try:
        yield
    except _TRANSIENT_ERRORS as error:
        raise _unavailable() from error
    except redis.ResponseError as error:
        if not str(error).startswith(_TRANSIENT_CODES):
            raise
        raise _unavailable() from error


def _unavailable() -> StoreUnavailable:
    told = StoreUnavailable("The job store does not answer or takes no writes.", "Try again in a few seconds.")
    told.retry_after_s = RETRY_AFTER_S
    return told
