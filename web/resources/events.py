"""GET /v1/jobs/{id}/events: a job's events as they happen, as server-sent events."""

import logging
from collections.abc import Iterator

from flask import Blueprint, Response, request

from omnirt_tasks.contract import Event
from omnirt_tasks.errors import JobNotFound, StoreUnavailable, TooManyStreams
from omnirt_tasks.jobs.watch import watch
from web.answers import own_job
from web.auth import current_owner
from web.operations import Parameter, documented
from web.services import Services, services
from web.watching import resume_point

PARAMETERS = (
    Parameter("after", "Only events with a greater seq.", {"type": "integer", "minimum": 0}),
    Parameter("Last-Event-ID", "The same, as browsers send it when they connect again; it wins.", where="header"),
)
KEEPALIVE = b": keep-alive\n\n"

log = logging.getLogger(__name__)
blueprint = Blueprint("events", __name__)


@blueprint.get("/v1/jobs/<job_id>/events")
@documented(
    "Watch a job: server-sent events, ending with the terminal one",
    {200: "text/event-stream", 204: None},
    errors=(JobNotFound, TooManyStreams),
    parameters=PARAMETERS,
)
def stream_events(job_id: str) -> Response:
    """204 tells a browser that connects again to stop: it has seen everything, and the job is over."""
    parts = services()
    owner = current_owner()
    job = own_job(job_id, owner)
    after = resume_point(request.headers.get("Last-Event-ID", request.args.get("after")))
    if job.record.finished and after >= job.last_seq:
        return Response(status=204)
    slot = parts.streams.take(owner)
    # Beyond the end means: from the end as it is now, not as it will be when the stream begins.
    response = Response(_told(parts, job_id, min(after, job.last_seq)), mimetype="text/event-stream")
    # Not in the generator: one that was never begun has no `finally`.
    response.call_on_close(slot.release)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _told(parts: Services, job_id: str, after: int) -> Iterator[bytes]:
    """The stream's bytes. Closing it ends the subscription, as when the client vanishes."""
    events = watch(parts.store, parts.feed, job_id, after=after, keepalive_s=parts.settings.sse_keepalive_s)
    try:
        yield b": watching\n\n"  # headers and this reach the client at once, however long the job waits
        for event in events:
            yield KEEPALIVE if event is None else as_sse(event)
    except JobNotFound:
        log.info("a watched job was purged", extra={"job_id": job_id})
    except StoreUnavailable as error:
        # The stream ends without the terminal event, so that the client connects again and goes on where it was.
        log.info("a stream ends before its job: %s", error, extra={"job_id": job_id})
    finally:
        events.close()


def as_sse(event: Event) -> bytes:
    """One event in the form of server-sent events."""
    return f"id: {event.seq}\nevent: {event.event}\ndata: {event.model_dump_json()}\n\n".encode()
