"""The gateway as processes: gunicorn, started from Python, with a thread for each stream.

arbiter ─fork─► worker: create_app ─► services.start ─► requests…        each worker has its own connections
"""

import contextlib
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.gthread import TConn, ThreadWorker

from omnirt_tasks.errors import Internal, OmnirtError, TooLarge
from omnirt_tasks.graces import GATEWAY_GRACE_S
from omnirt_tasks.observability import logs, tracing
from omnirt_tasks.settings import Settings
from web.app import create_app
from web.errors import answer_malformed, envelope, malformed
from web.services import EXTENSION, WAITS_MAX, Services, build

SERVICE = "omnirt-gateway"
KEEPALIVE_S = 30
LINGER_S = 2.0
SOCKET_TIMEOUT_S = 30
"""How long a client may take to send the next bytes of a request, or to take the next of an answer."""
REQUEST_THREADS = 64
"""Threads for requests that neither stream nor wait, so that these are served however many watch."""
IDLE_CONNECTIONS = 1_000
LINE_BYTES_MAX = 8_190

log = logging.getLogger(__name__)


def make_app(settings: Settings) -> Flask:
    """The app for gunicorn, with its threads running: call it in the process that serves. Raises ConfigurationError."""
    app = create_app(settings, build(settings, tracing.start(settings, service=SERVICE)))
    app.register_error_handler(ParseException, answer_malformed)
    app.extensions[EXTENSION].start()
    return app


def serve(
    settings: Settings,
    on_ready: Callable[[str], None] | None = None,
    *,
    load: Callable[[Settings], Flask] = make_app,
) -> None:
    """Run the gateway until it is asked to stop (SIGTERM or SIGINT), then exit this process.

    Prints `listening on URL` and calls `on_ready` with the URL once connections are accepted; port 0 takes a free one.
    `load` makes the app in each worker process, after the fork.
    Raises ConfigurationError for settings that cannot be used, before anything is started.
    """
    logs.configure(settings)
    build(settings)  # each worker builds its own; what is wrong with the settings is told here, once
    _Gateway(settings, on_ready, load).run()


class GatewayWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's thread worker, which outlives clients that stall, and ends its streams when it is asked to stop."""

    def handle(self, conn: TConn) -> Any:
        """Serve a request in a thread of the pool."""
        _bound_in_time(conn.sock)
        kept = super().handle(conn)
        if kept is False:
            # What comes next would wait for the client's close in the thread that accepts connections.
            _linger(conn.sock)
        return kept

    def handle_exit(self, sig: int, frame: object) -> None:
        """SIGTERM: no new connections; requests in hand are finished, and streams end so that clients resume.

        Who waits for a job is answered 503 with its id: the job was accepted, and goes on.
        """
        self._end_streams()
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: object) -> None:
        """SIGQUIT, and SIGINT at a terminal: at once."""
        self._end_streams()
        super().handle_quit(sig, frame)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer what is no HTTP, or what failed outside of the app, in the project's envelope."""
        error: OmnirtError
        if isinstance(exc, LimitRequestLine | LimitRequestHeaders):
            error = TooLarge("The address or the headers are too long.", "Shorten them.")
        elif isinstance(exc, ParseException):
            error = malformed()
        else:
            error = Internal("The gateway failed on this request.", "Try again; the gateway's log has the cause.")
        if isinstance(error, Internal):
            log.error("a request failed outside of the app", exc_info=exc)
        else:
            log.info("a request was no HTTP: %s", type(exc).__name__)  # its text may hold a header, and so a key
        body = json.dumps(envelope(error)).encode()
        head = f"HTTP/1.1 {error.http_status} Refused\r\nConnection: close\r\nContent-Type: application/json\r\n"
        try:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        except OSError:
            log.debug("the client was gone before its answer")

    def _end_streams(self) -> None:
        parts = self.wsgi.extensions.get(EXTENSION) if isinstance(self.wsgi, Flask) else None
        if isinstance(parts, Services):
            # A signal handler must not wait, and this does, for the threads that it ends.
            threading.Thread(target=parts.leave, name="omnirt-leaving", daemon=True).start()


class GatewayLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's log as a part of the project's own."""

    def setup(self, cfg: Any) -> None:
        """Leave the writing to the root logger."""
        super().setup(cfg)
        self.error_log.propagate = True

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """A stack for a failure; a line for a client that was too slow."""
        if isinstance(sys.exception(), BlockingIOError | TimeoutError):
            log.info("a client took nothing, or sent nothing, for %d s, and is dropped", SOCKET_TIMEOUT_S)
        else:
            super().exception(msg, *args, **kwargs)


class _Gateway(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's view of the gateway: its configuration, and the app of each worker."""

    def __init__(
        self, settings: Settings, on_ready: Callable[[str], None] | None, load: Callable[[Settings], Flask]
    ) -> None:
        self._settings = settings
        self._on_ready = on_ready
        self._load = load
        super().__init__()

    def load_config(self) -> None:
        threads = self._settings.max_streams + WAITS_MAX + REQUEST_THREADS
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        memory = Path("/dev/shm")  # noqa: S108  # heartbeats of workers, which must not wait for a disk
        values = {
            "bind": f"{host}:{self._settings.port}",
            "workers": self._settings.gateway_processes,
            "worker_class": GatewayWorker,
            "logger_class": GatewayLogger,
            "errorlog": None,
            "loglevel": self._settings.log_level.lower(),
            "threads": threads,  # made when they are needed
            "worker_connections": threads + IDLE_CONNECTIONS,
            "keepalive": KEEPALIVE_S,
            "graceful_timeout": GATEWAY_GRACE_S,
            "limit_request_line": LINE_BYTES_MAX,
            "worker_tmp_dir": str(memory) if os.access(memory, os.W_OK) else None,
            "control_socket_disable": True,
            "proc_name": "omnirt-gateway",
            "when_ready": self._tell,
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """The app of this worker, with its threads running: called after the fork."""
        return self._load(self._settings)

    def _tell(self, arbiter: Arbiter) -> None:
        host, port = arbiter.LISTENERS[0].sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        sys.stdout.write(f"listening on {url}\n")
        sys.stdout.flush()
        if self._on_ready is not None:
            self._on_ready(url)


def _bound_in_time(connection: socket.socket) -> None:
    """Let no call on the socket wait longer than `SOCKET_TIMEOUT_S`, whatever the server sets on it later."""
    limit = struct.pack("ll", SOCKET_TIMEOUT_S, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _linger(connection: socket.socket) -> None:
    """Say that no more comes, wait a little for the client to close, and end both directions (RFC 9112, 9.6)."""
    with contextlib.suppress(OSError):  # the client was faster, or never closes
        connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_S
        while (left_s := deadline - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(65_536):
                break
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
