"""POST /v1/validate: what a request would come to, with nothing written or queued."""

from flask import Blueprint, Response

from omnirt_tasks.contract import GenerateRequest, Problem, ResolvedRequest
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import CallerError, InvalidJson, TooLarge
from web.answers import json_answer
from web.auth import current_owner
from web.operations import documented
from web.services import services
from web.submitting import read_request

blueprint = Blueprint("validate", __name__)


class Validation(Answer):
    """Every problem of a request, or what will run."""

    ok: bool
    errors: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    request: ResolvedRequest | None = None


@blueprint.post("/v1/validate")
@documented("Check a request", {200: Validation}, errors=(InvalidJson, TooLarge), body=GenerateRequest)
def validate() -> Response:
    """200 also for a request that is wrong in every field; only unreadable JSON is 400."""
    try:
        wanted = read_request()
    except (InvalidJson, TooLarge):
        raise
    except CallerError as error:
        return json_answer(Validation(ok=False, errors=error.details or (_lone(error),)))
    resolution = services().submission.check(wanted, current_owner())
    if resolution.request is None:
        return json_answer(Validation(ok=False, errors=resolution.problems))
    return json_answer(Validation(ok=True, warnings=resolution.request.warnings, request=resolution.request))


def _lone(error: CallerError) -> Problem:
    return Problem(loc="body", rule=error.code, message=error.message)
