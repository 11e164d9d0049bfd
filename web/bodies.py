"""Reading what a request carries, within its limits."""

import logging
from typing import BinaryIO, cast

from flask import request

from omnirt_tasks.errors import TooLarge

DISCARD_BYTES_MAX = 64 * 1024 * 1024
CHUNK_BYTES = 256 * 1024

log = logging.getLogger(__name__)


def read_body() -> bytes:
    """The whole body. Raises TooLarge past the app's limit, whether the request says its length or not."""
    body = request.get_data(cache=False)
    limit = request.max_content_length
    # A body of unknown length is cut off at the limit, in silence.
    if limit is not None and request.content_length is None and len(body) >= limit:
        raise TooLarge(f"The body is larger than {limit} bytes.", "Send less; files go to POST /v1/uploads.")
    return body


def discard_body() -> None:
    """Read what a refused request still sends, so that its client sees the answer instead of a broken connection."""
    stream = cast(BinaryIO, request.environ["wsgi.input"])
    discarded = 0
    try:
        while discarded < DISCARD_BYTES_MAX and (chunk := stream.read(CHUNK_BYTES)):
            discarded += len(chunk)
    except Exception as error:  # noqa: BLE001  # each server has errors of its own for a client that is gone or sends nonsense
        log.debug("the rest of a refused body cannot be read: %s", type(error).__name__)
