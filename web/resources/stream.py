"""WS /v1/jobs/{id}/stream: a job's events and a few actions over one WebSocket."""

import json
import logging
from contextlib import closing
from dataclasses import dataclass

from flask import Blueprint, request
from flask_sock import Sock
from simple_websocket import ConnectionClosed, Server

from omnirt_tasks.contract import CancelOutcome, Problem
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import (
    InvalidJson,
    JobNotFound,
    OmnirtError,
    OriginRefused,
    TooManyStreams,
    Unauthorized,
    ValidationFailed,
)
from omnirt_tasks.jobs.subscription import EventSource, Subscription
from omnirt_tasks.jobs.watch import watch
from omnirt_tasks.validation import parse_json
from web.answers import own_job
from web.errors import envelope
from web.operations import Parameter, documented
from web.services import Services, services
from web.watching import resume_point
from web.websocket import Bell, take_socket

CLOSE_NORMAL = 1000
CLOSE_RESTART = 1012  # try again: the store is away, or the gateway is leaving
CLOSE_TIMEOUT_S = 2
CLOSE_REASON_BYTES = 120
CLOSE_CODES: dict[type[OmnirtError], int] = {Unauthorized: 4401, JobNotFound: 4404, TooManyStreams: 4429}

log = logging.getLogger(__name__)
blueprint = Blueprint("stream", __name__)
sock = Sock()


@blueprint.before_request
def _own_the_socket() -> None:
    take_socket()


@sock.route("/v1/jobs/<job_id>/stream", bp=blueprint)  # type: ignore[untyped-decorator]  # flask-sock has no types
@documented(
    "Watch a job and act on it, over a WebSocket",
    {101: None},
    errors=(OriginRefused,),
    parameters=(Parameter("after", "Only events with a greater seq.", {"type": "integer", "minimum": 0}),),
    description=(
        'Each message is an event as JSON. Takes `{"action": "cancel"}`, `{"action": "resume", "after": N}` and '
        '`{"action": "ping"}`; browsers send the key as the subprotocol pair `omnirt`, `key.KEY`.'
    ),
)
def stream_job(ws: Server, job_id: str) -> None:
    """Send each event as JSON; answer each message; close 1000 after the terminal event."""
    parts = services()
    ws.sock.backlog = lambda: len(ws.input_buffer)
    try:
        code, why = _hold(ws, parts, job_id)
        ws.close(code, why[:CLOSE_REASON_BYTES])
    except ConnectionClosed:
        log.debug("a watcher left", extra={"job_id": job_id})
    except OSError as error:
        log.info("a watcher was too slow, and is dropped: %s", error, extra={"job_id": job_id})
    finally:
        # The client's own close ends the reader; one that sends none is not waited for, here or by the server.
        ws.sock.end_answers()
        ws.thread.join(CLOSE_TIMEOUT_S)
        ws.sock.close()


def _hold(ws: Server, parts: Services, job_id: str) -> tuple[int, str]:
    """Serve the connection to its end, and tell with which code and words it ends."""
    try:
        owner = parts.gate.owner(request)
        own_job(job_id, owner)
        with parts.streams.held(owner):
            _Conversation(ws, parts, job_id).run(resume_point(request.args.get("after")))
    except OmnirtError as error:
        return CLOSE_CODES.get(type(error), CLOSE_RESTART), error.message
    return CLOSE_NORMAL, ""


@dataclass(frozen=True)
class _Action:
    """What a message asks for; `after` is set for a resume alone."""

    name: str
    after: int | None = None


class _TappedFeed:
    """Live events that the bell interrupts: it wakes whoever waits for the next one."""

    def __init__(self, feed: EventSource, bell: Bell) -> None:
        self._feed = feed
        self._bell = bell

    def subscribe(self, job_id: str) -> Subscription:
        """See EventSource."""
        subscription = self._feed.subscribe(job_id)
        self._bell.ring = subscription.wake
        subscription.wake()  # for what came before there was anybody to wake
        return subscription


class _Conversation:
    """Both directions of one WebSocket, in one thread."""

    def __init__(self, ws: Server, parts: Services, job_id: str) -> None:
        self._ws = ws
        self._parts = parts
        self._job_id = job_id
        self._feed = _TappedFeed(parts.feed, ws.event)

    def run(self, after: int) -> None:
        """Send the events after `after`, and answer messages, until the job is over. Raises ConnectionClosed."""
        resume: int | None = after
        while resume is not None:
            resume = self._follow(resume)

    def _follow(self, after: int) -> int | None:
        """Send events until the job is over, or until the client wants them from elsewhere: the number after which."""
        parts = self._parts
        keepalive_s = parts.settings.sse_keepalive_s
        with closing(watch(parts.store, self._feed, self._job_id, after=after, keepalive_s=keepalive_s)) as events:
            for event in events:
                if event is not None:
                    self._ws.send(event.model_dump_json())
                if (resume := self._answer_messages()) is not None:
                    return resume
        return None

    def _answer_messages(self) -> int | None:
        """Answer what has come; where to resume, if a message asked for it (the last one counts)."""
        resume: int | None = None
        while (message := self._ws.receive(timeout=0)) is not None:
            try:
                action = _parsed(message)
                done = self._act(action)
            except OmnirtError as error:
                answer: JsonObject = {"event": "error", **envelope(error, self._job_id)}
            else:
                answer = {"event": "control_ack", "action": action.name, "ok": done, "job_id": self._job_id}
                resume = action.after if action.after is not None else resume
            self._ws.send(json.dumps(answer, ensure_ascii=False))
        self._ws.sock.make_room()
        return resume

    def _act(self, action: _Action) -> bool:
        """Whether what the action asks for is done. Raises StoreUnavailable."""
        if action.name == "cancel":
            return self._parts.store.cancel(self._job_id) is not CancelOutcome.ALREADY_FINISHED
        return True


def _parsed(message: str | bytes) -> _Action:
    """The action that a message asks for. Raises InvalidJson and ValidationFailed."""
    if not isinstance(message, str):
        raise InvalidJson("The message is binary.", "Send JSON as text.")
    match parse_json(message):
        case {"action": "ping" | "cancel" as name, **rest} if not rest:
            return _Action(name)
        case {"action": "resume", "after": int(after), **rest} if (
            not rest and not isinstance(after, bool) and after >= 0
        ):
            return _Action("resume", resume_point(after))
        case _:
            told = 'It is no known message; send {"action": "cancel"}, "resume" with "after": N, or "ping".'
            raise ValidationFailed([Problem(loc="action", rule="choice", message=told)])
