"""POST /v1/uploads: pictures and recordings that requests refer to as `upload:ID`."""

from typing import BinaryIO, cast

from flask import Blueprint, Response, request

from omnirt_tasks.contract import Problem
from omnirt_tasks.contract.base import Answer
from omnirt_tasks.errors import StorageError, TooLarge, UnsupportedMediaType, ValidationFailed
from web.answers import json_answer
from web.auth import current_owner
from web.operations import documented
from web.services import services

FORM_OVERHEAD_BYTES = 64 * 1024
FIELD = "file"

blueprint = Blueprint("uploads", __name__)


class UploadAnswer(Answer):
    """A stored upload; requests name it `upload:{id}` until it expires."""

    id: str
    mime: str
    size_bytes: int
    sha256: str
    expires_at_ms: int


@blueprint.post("/v1/uploads")
@documented(
    "Upload a picture or a recording: multipart `file`, or the raw bytes",
    {201: UploadAnswer},
    errors=(TooLarge, UnsupportedMediaType, ValidationFailed, StorageError),
    body="application/octet-stream",
)
def upload() -> Response:
    """What it is, is told from its bytes."""
    parts = services()
    request.max_content_length = parts.settings.max_upload_bytes + FORM_OVERHEAD_BYTES
    kept = parts.uploads.put(current_owner(), _sent())
    answer = UploadAnswer(
        id=kept.id, mime=kept.mime, size_bytes=kept.size_bytes, sha256=kept.sha256, expires_at_ms=kept.expires_at_ms
    )
    return json_answer(answer, 201)


def _sent() -> BinaryIO:
    """The bytes that were sent. Raises ValidationFailed for a form without the one file."""
    if request.mimetype != "multipart/form-data":
        return cast(BinaryIO, request.stream)
    files = request.files.getlist(FIELD)
    if len(files) != 1 or len(list(request.files.values())) != 1:
        told = f"The form must hold exactly one file, in the field {FIELD!r}."
        raise ValidationFailed([Problem(loc=FIELD, rule="required", message=told)])
    return cast(BinaryIO, files[0].stream)
