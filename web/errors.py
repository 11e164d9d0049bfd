"""The one place where an error becomes an answer: `{"error": {code, message, type, param, details, job_id}}`."""

import json
import logging
from collections.abc import Mapping

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import (
    HTTPException,
    RequestedRangeNotSatisfiable,
    RequestEntityTooLarge,
)
from werkzeug.exceptions import (
    MethodNotAllowed as WrongMethod,
)
from werkzeug.exceptions import (
    NotFound as NoRoute,
)
from werkzeug.routing.exceptions import WebsocketMismatch

from omnirt_tasks.contract import Problem
from omnirt_tasks.contract.base import Answer, JsonObject
from omnirt_tasks.errors import (
    CallerError,
    Internal,
    MethodNotAllowed,
    NotFound,
    OmnirtError,
    OperatorError,
    RangeNotSatisfiable,
    StoreUnavailable,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
    ValidationFailed,
)
from web.bodies import discard_body
from web.operations import operation_of

DETAILS_MAX = 50
RETRY_AFTER_S = 1

log = logging.getLogger(__name__)


class ErrorBody(Answer):
    """Why there is no answer; `param` is the first place in `details`, `details_omitted` counts those beyond 50."""

    code: str
    message: str
    type: str
    param: str | None = None
    details: tuple[Problem, ...] = ()
    details_omitted: int | None = None
    job_id: str | None = None


class ErrorEnvelope(Answer):
    """The form of every answer of 4xx and 5xx."""

    error: ErrorBody


def register(app: Flask) -> None:
    """Answer every error of the app in the envelope."""
    app.register_error_handler(OmnirtError, _answer_own)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unknown)


def envelope(error: OmnirtError, job_id: str | None = None) -> JsonObject:
    """The error as the data that a client is sent."""
    shown = error.details[:DETAILS_MAX]
    body = ErrorBody(
        code=error.code,
        message=str(error),
        type=_kind(error),
        param=shown[0].loc if shown else None,
        details=shown,
        details_omitted=len(error.details) - len(shown) or None,
        job_id=job_id,
    )
    data: JsonObject = body.model_dump(mode="json")
    if body.details_omitted is None:
        del data["details_omitted"]
    return {"error": data}


def answer(error: OmnirtError, *, job_id: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """The error as an answer."""
    body = json.dumps(envelope(error, job_id), ensure_ascii=False)
    response = Response(body, error.http_status, headers, mimetype="application/json")
    if isinstance(error, Unauthorized):
        asked = operation_of(current_app.view_functions.get(request.endpoint or ""))
        response.headers["WWW-Authenticate"] = 'Bearer realm="omnirt"'
        if asked is not None and asked.page:
            response.headers.add("WWW-Authenticate", 'Basic realm="omnirt", charset="UTF-8"')
    if error.retryable and error.http_status in {429, 503}:
        response.headers["Retry-After"] = str(error.retry_after_s or RETRY_AFTER_S)
    return response


def answer_malformed(error: Exception) -> Response:
    """The answer to a request that turned out to be no HTTP while its body was read."""
    log.info("a request was no HTTP: %s", type(error).__name__)
    return answer(malformed())


def malformed() -> ValidationFailed:
    """What is said of a request that is no HTTP."""
    return ValidationFailed("The request is not well-formed HTTP.", "Check its first line, its headers and its body.")


def _kind(error: OmnirtError) -> str:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        409: "conflict_error",
        429: "rate_limit_error",
    }
    return kinds.get(error.http_status, "invalid_request_error" if isinstance(error, CallerError) else "server_error")


def _answer_own(error: OmnirtError) -> Response:
    if isinstance(error, TooLarge):
        discard_body()
    if isinstance(error, OperatorError) and not isinstance(error, StoreUnavailable):  # of that the threads tell, once
        log.warning("%s: %s", error.code, error, exc_info=error.__cause__)
    return answer(error)


def _answer_http(error: HTTPException) -> Response:
    if error.code is None or error.code < 400:  # a redirect is an exception too
        return Response(status=error.code or 500, headers=[h for h in error.get_headers() if h[0] == "Location"])
    headers = {name: value for name, value in error.get_headers() if name in {"Allow", "Content-Range"}}
    translated = _translated(error)
    if isinstance(translated, TooLarge):
        discard_body()
    return answer(translated, headers=headers)


def _translated(error: HTTPException) -> OmnirtError:
    match error:
        case WebsocketMismatch():
            return NotFound("This address speaks WebSocket only.", "Connect with ws:// or wss://.")
        case NoRoute():
            return NotFound("Nothing lives at this address.", "GET /openapi.json lists every route.")
        case WrongMethod(valid_methods=methods):
            allowed = ", ".join(sorted(methods or ())) or "another method"
            return MethodNotAllowed("The route does not take this method.", f"Use {allowed}.")
        case RequestEntityTooLarge():
            return TooLarge("The body is larger than is accepted.", "Send less; files go to POST /v1/uploads.")
        case RequestedRangeNotSatisfiable():
            return RangeNotSatisfiable("The range lies outside the artifact.", "Ask for bytes that it has.")
        case HTTPException(code=415):
            return UnsupportedMediaType(
                "The body's media type is not accepted.", "Send JSON, or a file to /v1/uploads."
            )
        case HTTPException(code=code) if code is not None and code < 500:
            return malformed()
        case _:
            return _unknown(error)


def _answer_unknown(error: Exception) -> Response:
    return answer(_unknown(error))


def _unknown(error: Exception) -> Internal:
    # The type and the stack are for the log; the text of an unknown error may hold anything.
    log.error("unhandled %s", type(error).__name__, exc_info=error)
    return Internal("The gateway failed on this request.", "Try again; the gateway's log has the cause.")
