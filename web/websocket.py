"""One WebSocket of flask-sock with what it lacks: whole frames from two threads, bounds, and a bell.

    client ──► reader thread (simple-websocket) ──► messages ──bell──► the view's thread ──► client

The reader answers pings and closes, the view sends events and answers: both write, so each frame goes out under a
lock. The view waits on the job's events; the bell wakes it when a message came or the client left.
"""

import socket
from collections.abc import Callable
from threading import Event, Lock
from typing import Any

from flask import request

MESSAGE_BYTES_MAX = 4_096
PING_EVERY_S = 20
SEND_TIMEOUT_S = 20
BACKLOG_MAX = 32
"""Messages that may wait to be answered; beyond it nothing is read until they are. One read may hold a few hundred."""


class Bell(Event):
    """The event that simple-websocket sets for each message and at the end; `ring` is called too."""

    def __init__(self) -> None:
        super().__init__()
        self.ring: Callable[[], None] | None = None

    def set(self) -> None:
        """Set the event, and wake the view."""
        super().set()
        if self.ring is not None:
            self.ring()


SOCKET_OPTIONS: dict[str, Any] = {
    "subprotocols": ["omnirt"],
    "ping_interval": PING_EVERY_S,
    "max_message_size": MESSAGE_BYTES_MAX,
    "event_class": Bell,
}


class FrameSocket:
    """The connection's socket as simple-websocket uses it; the server keeps it and closes it.

    A frame is sent whole or the connection ends: a client that takes nothing for `SEND_TIMEOUT_S` is gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = Lock()
        self._room = Event()
        self._answering = True
        self.backlog: Callable[[], int] = lambda: 0
        connection.settimeout(SEND_TIMEOUT_S)

    def send(self, frame: bytes) -> int:
        """Send the whole frame."""
        with self._sending:
            self._connection.sendall(frame)
        return len(frame)

    def recv(self, count: int) -> bytes:
        """Receive, once what came before is answered; the end, if it is not."""
        self._room.clear()
        if self.backlog() > BACKLOG_MAX and not (self._answering and self._room.wait(SEND_TIMEOUT_S)):
            return b""
        return self._connection.recv(count)

    def make_room(self) -> None:
        """Tell the reader that the messages so far are answered."""
        self._room.set()

    def end_answers(self) -> None:
        """Tell the reader that nothing is answered any more, so that it waits for nobody."""
        self._answering = False
        self._room.set()

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._connection.fileno()

    def close(self) -> None:
        """End both directions; the server that accepted the connection closes it."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client was faster


def take_socket() -> None:
    """Put a FrameSocket in place of the current request's socket, for flask-sock to find."""
    name = next((name for name in ("gunicorn.socket", "werkzeug.socket") if name in request.environ), None)
    if name is not None:
        request.environ[name] = FrameSocket(request.environ[name])
