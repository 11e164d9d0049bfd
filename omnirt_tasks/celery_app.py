"""The Celery app: everything that a bare `celery -A omnirt_tasks worker -Q cpu-shapes` needs is set here.

Importing this module, and making an app, connects to nothing. What a worker does beyond Celery's own is named by
`include` and imported by Celery in worker processes alone: gateway, Flower, `inspect` and `result` never see it.
"""

from typing import Any

from celery import Celery

from omnirt_tasks.settings import Settings

PRIORITY_STEPS = (0, 3, 6, 9)
"""The priorities for which a queue has a list of its own in Redis; what lies between counts as the one before."""
TASK_MODULES = ("workers.tasks", "workers.bootsteps")
MESSAGE_VISIBILITY_S = 60
CONNECT_TIMEOUT_S = 5
SOCKET_TIMEOUT_S = 10  # longer than the second that a blocking pop may wait
HEALTH_CHECK_S = 10


def broker_prefix(settings: Settings) -> str:
    """What begins every key of Celery's in Redis, so that systems with different prefixes share a server."""
    return f"{settings.key_prefix}:celery:"


class TasksApp(Celery):
    """A Celery app that knows the settings it was made from."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("omnirt_tasks", set_as_current=False, include=[*TASK_MODULES])
        self.settings = settings
        self.conf.update(_settings_of_celery(settings))


def make_app(settings: Settings) -> TasksApp:
    """A Celery app for these settings. Connects to nothing.

    Threads pool: every job stays an ordinary Celery task while many share the device of one process. Messages are
    acknowledged when the worker takes them, since a message only wakes a worker up: the job record is the truth.
    """
    return TasksApp(settings)


def _settings_of_celery(settings: Settings) -> dict[str, Any]:
    prefix = broker_prefix(settings)
    connection = {
        "global_keyprefix": prefix,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
    }
    return {
        "broker_url": settings.celery_url,
        "broker_transport_options": connection
        | {
            # Only what a worker took and did not begin is ever unacknowledged.
            "visibility_timeout": MESSAGE_VISIBILITY_S,
            "unacked_restore_throttle": 1,
            "priority_steps": list(PRIORITY_STEPS),
            # What has a higher priority goes first in whichever queue; of one priority, the queues take turns.
            "queue_order_strategy": "round_robin",
            # How long a publisher tries before it reports that the broker is away.
            "max_retries": 2,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.2,
        },
        "broker_connection_timeout": CONNECT_TIMEOUT_S,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a worker waits for its broker as long as it takes
        "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2},
        "result_backend": settings.celery_url,
        "result_backend_transport_options": {
            "global_keyprefix": prefix,
            "retry_policy": {"timeout": CONNECT_TIMEOUT_S},
        },
        "redis_socket_connect_timeout": CONNECT_TIMEOUT_S,
        "redis_socket_timeout": SOCKET_TIMEOUT_S,
        "redis_socket_keepalive": True,
        "redis_backend_health_check_interval": HEALTH_CHECK_S,
        "result_expires": int(settings.job_ttl_s),
        "result_extended": False,
        # JSON alone: a pickled message is refused before anything in it runs.
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "result_accept_content": ["json"],
        "task_acks_late": False,
        "task_track_started": True,
        "task_send_sent_event": False,  # it would halve the rate of submits; Flower sees a job when a worker takes it
        "worker_send_task_events": True,
        "worker_consumer": "workers.consumer:SoundConsumer",
        "worker_pool": "threads",
        "worker_concurrency": settings.concurrency,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,  # a worker takes a message only when it can begin the job
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_prefetch_count_reduction": False,  # nothing is prefetched that could be reduced
        "worker_detect_quorum_queues": False,
        "worker_redirect_stdouts": False,
    }
