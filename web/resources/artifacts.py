"""GET an artifact: its bytes, whole or a range of them."""

from typing import Any

from flask import Blueprint, Response, request
from werkzeug.wsgi import wrap_file

from omnirt_tasks.contract import Artifact, JobState
from omnirt_tasks.errors import ArtifactNotFound, JobNotFound, RangeNotSatisfiable, StorageError
from web.answers import own_job
from web.auth import current_owner
from web.operations import Parameter, documented
from web.services import services

# What a browser may show as what it is; anything else is a download of bytes.
SHOWN = frozenset(
    {
        "image/png",
        "image/jpeg",
        "image/webp",
        "video/mp4",
        "audio/wav",
        "audio/mpeg",
        "audio/flac",
        "audio/ogg",
        "text/plain",
    }
)
HEADERS = (
    Parameter("Range", "Bytes to answer, as `bytes=0-99`: 206.", where="header"),
    Parameter("If-None-Match", "An ETag that is known: 304 if it still holds.", where="header"),
)

blueprint = Blueprint("artifacts", __name__)


@blueprint.get("/v1/jobs/<job_id>/artifacts/<name>")
@documented(
    "An artifact's bytes",
    {200: "application/octet-stream", 206: "application/octet-stream", 304: None},
    errors=(JobNotFound, ArtifactNotFound, RangeNotSatisfiable, StorageError),
    parameters=HEADERS,
)
def fetch_artifact(job_id: str, name: str) -> Response:
    """There is nothing until the job has succeeded, and then only what its result names."""
    job = own_job(job_id, current_owner())
    artifact = _named(job.record.result.outputs if job.record.result else (), name)
    if job.record.state is not JobState.SUCCEEDED or artifact is None:
        raise ArtifactNotFound(
            f"The job has no artifact {name[:80]!r}.", "Its result names what it has, once it succeeded."
        )
    storage, origin = services().artifacts, job.origins[name]
    size_bytes = storage.stat(origin.job_id, origin.attempt, name)
    stream = storage.open(origin.job_id, origin.attempt, name)
    response = Response(wrap_file(request.environ, stream), mimetype=_safe_type(artifact.mime), direct_passthrough=True)
    response.call_on_close(stream.close)
    response.content_length = size_bytes
    response.set_etag(artifact.sha256)
    response.headers["Content-Disposition"] = f'inline; filename="{artifact.name}"'
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    response.headers["Cache-Control"] = "private, no-cache"
    try:
        response.make_conditional(_understood_conditions(), accept_ranges=True, complete_length=size_bytes)
    except BaseException:
        response.close()  # a range that does not fit answers without this response
        raise
    return response


def _understood_conditions() -> dict[str, Any]:
    """The request as it stands without what is not answered here.

    An artifact never changes, so preconditions for changing it mean nothing; a range that is not one range of bytes is
    ignored, as RFC 9110 (14.2) has it.
    """
    ignored = {"HTTP_IF_MATCH", "HTTP_IF_UNMODIFIED_SINCE"}
    asked = request.range
    if asked is None or asked.units != "bytes" or len(asked.ranges) != 1:
        ignored.add("HTTP_RANGE")
    return {name: value for name, value in request.environ.items() if name not in ignored}


def _named(outputs: tuple[Artifact, ...], name: str) -> Artifact | None:
    return next((artifact for artifact in outputs if artifact.name == name), None)


def _safe_type(mime: str) -> str:
    return mime if mime in SHOWN else "application/octet-stream"
