"""Whether the process serves, and whether the system behind it does."""

from flask import Blueprint, Response

from omnirt_tasks.contract import Readiness
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import StoreUnavailable
from web.answers import json_answer
from web.operations import documented
from web.services import services

blueprint = Blueprint("health", __name__)


class Health(Answer):
    """That the process serves."""

    ok: bool


@blueprint.get("/healthz")
@documented("Whether the process serves", {200: Health}, open=True)
def healthz() -> Response:
    """Asks nobody."""
    return json_answer(Health(ok=True))


@blueprint.get("/readyz")
@documented("Whether jobs are accepted, and by which queues", {200: Readiness, 503: Readiness}, open=True)
def readyz() -> Response:
    """503 when Redis is away, or takes no writes; no workers is no failure."""
    parts = services()
    try:
        parts.check_writes()
        workers, queues = len(parts.fleet.live()), parts.queues()
    except StoreUnavailable:
        away = Readiness(ok=False, job_store_backend="redis", remote_worker_count=0, queues={})
        return json_answer(away, 503, {"Retry-After": "1"})
    return json_answer(Readiness(ok=True, job_store_backend="redis", remote_worker_count=workers, queues=queues))
