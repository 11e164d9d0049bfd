"""Whether the process serves, and whether the system behind it does."""

from flask import Blueprint, Response

from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import StoreUnavailable
from web.answers import json_answer
from web.operations import documented
from web.services import Services, services

blueprint = Blueprint("health", __name__)


class Health(Answer):
    """That the process serves."""

    ok: bool


class QueueReadiness(Answer):
    """A queue's live workers, and its jobs."""

    workers: int
    waiting: int
    running: int


class Readiness(Answer):
    """Whether jobs are accepted; `queues` are those that hold a job or that a worker serves, by full name."""

    ok: bool
    job_store_backend: str
    remote_worker_count: int
    queues: dict[str, QueueReadiness]


@blueprint.get("/healthz")
@documented("Whether the process serves", {200: Health}, open=True)
def healthz() -> Response:
    """Asks nobody."""
    return json_answer(Health(ok=True))


@blueprint.get("/readyz")
@documented("Whether jobs are accepted, and by which queues", {200: Readiness}, errors=(StoreUnavailable,), open=True)
def readyz() -> Response:
    """503 when Redis is away; no workers is no failure."""
    try:
        return json_answer(readiness(services()))
    except StoreUnavailable:
        away = Readiness(ok=False, job_store_backend="redis", remote_worker_count=0, queues={})
        return json_answer(away, 503, {"Retry-After": "1"})


def readiness(parts: Services) -> Readiness:
    """What stands behind the gateway now. Raises StoreUnavailable."""
    parts.store.ping()
    fleet = parts.fleet.live()
    # A worker with tags serves a queue for each set of them; only those with jobs are worth a line.
    names = {queue for worker in fleet for queue in worker.queues if "+" not in queue} | set(parts.store.queues())
    queues = {}
    for name in sorted(names):
        depth = parts.store.depth(name)
        workers = sum(name in worker.queues for worker in fleet)
        queues[name] = QueueReadiness(workers=workers, waiting=depth.waiting, running=depth.running)
    return Readiness(ok=True, job_store_backend="redis", remote_worker_count=len(fleet), queues=queues)
