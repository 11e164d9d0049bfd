"""Every error of the project, in one tree.

    OmnirtError
    ├── CallerError          the caller can mend it: nothing was queued
    │   ├── InvalidJson, ValidationFailed, BackendUnsupported, InsufficientMemory, TooLarge, UnsupportedMediaType
    │   ├── IdempotencyMismatch
    │   ├── Unauthorized, ModelTierDisabled, OriginRefused, StubDisabled
    │   ├── NotFound ── ModelNotFound, JobNotFound, ArtifactNotFound, UploadNotFound
    │   ├── MethodNotAllowed, RangeNotSatisfiable
    │   └── QueueFull, TooManyStreams, RateLimited
    ├── JobError             the job ended without a result
    │   └── ModelFailed, NonFiniteOutput, OutOfMemory, JobTimeout, WorkerLost, JobCancelled, Internal
    └── OperatorError        the installation must be mended
        └── StoreUnavailable, StorageError, ConfigurationError, GatewayUnreachable (raised by the client alone)

Each class carries the stable code a client sees, the HTTP status, whether a retry can help, and whether the worker
tries again by itself, so the gateway and the worker translate without a table. A message names the value, the rule and
the remedy; it never holds a prompt, a path of the server or a secret, since clients read it.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from omnirt_tasks.contract import ErrorInfo, Problem


class OmnirtError(Exception):
    """Base of all errors of the project.

    `message` is for the client; `hint` says what to do; the message does not repeat it.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    tried_again: ClassVar[bool] = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)  # both in args, so that the error survives Celery's JSON
        self.message = message
        self.hint = hint
        self.details: tuple[Problem, ...] = ()
        self.retry_after_s: int | None = None

    def __str__(self) -> str:
        """Message and hint in one, as a log, a terminal or an HTTP answer shows it."""
        return self.message if self.hint is None else f"{self.message} {self.hint}"

    def info(self) -> ErrorInfo:
        """The error as the data that a job record holds."""
        return ErrorInfo(code=self.code, message=self.message, retryable=self.retryable, hint=self.hint)


class CallerError(OmnirtError):
    """The caller can mend it."""


class InvalidJson(CallerError):
    """The body is not JSON, or holds NaN or Infinity."""

    code = "invalid_json"
    http_status = 400


class ValidationFailed(CallerError):
    """The request breaks rules; `details` has every one of them with its place."""

    code = "validation_failed"
    http_status = 422

    def __init__(self, problems: Sequence[Problem] | str, hint: str | None = None) -> None:
        details = () if isinstance(problems, str) else tuple(problems)
        message = problems if isinstance(problems, str) else _summary(details)
        super().__init__(message, hint)
        self.details = details


class BackendUnsupported(CallerError):
    """No backend that exists could ever run the model."""

    code = "backend_unsupported"
    http_status = 422


class InsufficientMemory(CallerError):
    """The request could never fit: on no device of the fleet, or not on the one that was to run it."""

    code = "insufficient_memory"
    http_status = 422


class IdempotencyMismatch(CallerError):
    """The idempotency key came before, with another body."""

    code = "idempotency_mismatch"
    http_status = 422


class TooLarge(CallerError):
    """The body or a part of it is larger than allowed."""

    code = "too_large"
    http_status = 413


class UnsupportedMediaType(CallerError):
    """The upload is neither a picture nor audio that is accepted."""

    code = "unsupported_media_type"
    http_status = 415


class Unauthorized(CallerError):
    """No key, or not one of ours."""

    code = "unauthorized"
    http_status = 401


class ModelTierDisabled(CallerError):
    """The operator has switched the model's tier off."""

    code = "model_tier_disabled"
    http_status = 403


class OriginRefused(CallerError):
    """A browser's Origin is neither the server's own nor on the operator's list."""

    code = "origin_refused"
    http_status = 403


class StubDisabled(CallerError):
    """The stub backend is closed over HTTP."""

    code = "stub_disabled"
    http_status = 403


class NotFound(CallerError):
    """Nothing lives at this address."""

    code = "not_found"
    http_status = 404


class ModelNotFound(NotFound):
    """No registered model has this id or alias; the message has the nearest names."""

    code = "model_not_found"


class JobNotFound(NotFound):
    """No job of the caller's has this id."""

    code = "job_not_found"


class ArtifactNotFound(NotFound):
    """The job has no such output, or not yet."""

    code = "artifact_not_found"


class UploadNotFound(NotFound):
    """No upload of the caller's has this id, or it has expired."""

    code = "upload_not_found"


class MethodNotAllowed(CallerError):
    """The route exists, but not for this method."""

    code = "method_not_allowed"
    http_status = 405


class RangeNotSatisfiable(CallerError):
    """The byte range lies outside the artifact."""

    code = "range_not_satisfiable"
    http_status = 416


class QueueFull(CallerError):
    """The queue holds as many jobs as the operator allows."""

    code = "queue_full"
    http_status = 429
    retryable = True


class TooManyStreams(CallerError):
    """The key, or the process, watches as many jobs as allowed."""

    code = "too_many_streams"
    http_status = 429
    retryable = True


class RateLimited(CallerError):
    """The key has sent too many requests."""

    code = "rate_limited"
    http_status = 429
    retryable = True


class JobError(OmnirtError):
    """A job ended without a result."""


class ModelFailed(JobError):
    """The model's code raised."""

    code = "model_failed"
    http_status = 500


class NonFiniteOutput(JobError):
    """The model's output holds NaN or infinity."""

    code = "non_finite_output"
    http_status = 500


class OutOfMemory(JobError):
    """The device has too little memory for the job, even alone."""

    code = "out_of_memory"
    http_status = 500


class Internal(JobError):
    """A fault of ours; the log has the whole story."""

    code = "internal"
    http_status = 500
    tried_again = True  # another worker may be in better health


class WorkerLost(JobError):
    """The worker died or vanished with the job, as often as is allowed."""

    code = "worker_lost"
    http_status = 503
    retryable = True


class JobTimeout(JobError):
    """The job ran longer than its limit, or the caller waited longer than his."""

    code = "timeout"
    http_status = 504
    retryable = True


class JobCancelled(JobError):
    """The job was cancelled."""

    code = "job_cancelled"
    http_status = 409


class OperatorError(OmnirtError):
    """The installation must be mended, not the request."""


class StoreUnavailable(OperatorError):
    """Redis does not answer, or takes no writes."""

    code = "store_unavailable"
    http_status = 503
    retryable = True


class StorageError(OperatorError):
    """An artifact or an upload could not be written or read."""

    code = "storage_error"
    http_status = 503
    retryable = True
    tried_again = True


class GatewayUnreachable(OperatorError):
    """No gateway answers at the client's URL. No answer over HTTP has this code."""

    code = "gateway_unreachable"
    http_status = 503
    retryable = True


class ConfigurationError(OperatorError):
    """A setting is wrong, or a part cannot start with it; `str()` says which and what to change."""

    code = "internal"


def error_from(info: ErrorInfo) -> OmnirtError:
    """The error that a record or an answer tells of; a code that this version does not know becomes `Internal`."""
    kind = _BY_CODE.get(info.code, Internal)
    if issubclass(kind, ValidationFailed):
        return ValidationFailed(info.message, info.hint)
    return kind(info.message, info.hint)


def _summary(problems: Sequence[Problem]) -> str:
    first = f"{problems[0].loc}: {problems[0].message}"
    more = len(problems) - 1
    return first if not more else f"{first} (and {more} more problem{'s' if more > 1 else ''})"


def _descendants(kind: type[OmnirtError]) -> Iterable[type[OmnirtError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


_BY_CODE = {kind.code: kind for kind in _descendants(OmnirtError)} | {"internal": Internal}
