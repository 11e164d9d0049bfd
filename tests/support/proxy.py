"""A TCP proxy before a Redis, whose connections can be made to fail, with an error or without."""

import contextlib
import selectors
import socket
import threading
from enum import StrEnum
from typing import Self

POP = b"BRPOP"
CHUNK_BYTES = 64 * 1024
WAKE_EVERY_S = 0.02


class Stall(StrEnum):
    """How a consuming connection fails."""

    SILENT = "silent"
    """It stays open, and nothing passes any more: what a firewall that forgets a connection leaves."""
    ELSEWHERE = "elsewhere"
    """It is in good health, and finds nothing in its lists: what a server that is no more the leader answers."""


class Proxy:
    """Forwards connections to a port of this host until told otherwise: a context manager.

    `stalled` is set once a connection that pops messages has failed as `stall` wants; connections made after that are
    sound, unless it is for good. `cut` is set once all were closed, as `cut_at` wants; from then on none is made, until
    `mend`.
    """

    def __init__(self, port: int) -> None:
        self.stalled = threading.Event()
        self.cut = threading.Event()
        self._target = ("127.0.0.1", port)
        self._stall: Stall | None = None
        self._for_good = False
        self._cut_at: bytes | None = None
        self._cuts = 0
        self._down = False
        self._closing = threading.Event()
        self._guard = threading.Lock()
        self._popping: set[threading.Thread] = set()
        self._failing: set[threading.Thread] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAKE_EVERY_S)
        self.port: int = self._listener.getsockname()[1]

    def stall(self, how: Stall, *, for_good: bool = False) -> None:
        """Let every connection that pops messages now fail; `for_good` also those to come."""
        with self._guard:
            self._failing, self._stall, self._for_good = set(self._popping), how, for_good

    def cut_at(self, word: bytes) -> None:
        """Close every connection before the word is forwarded, and whatever is opened after that."""
        with self._guard:
            self._cut_at = word

    def mend(self) -> None:
        """Let connections be made again."""
        with self._guard:
            self._down = False

    def __enter__(self) -> Self:
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with self._guard:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._listener.close()

    def _begin(self, work: object, *arguments: object) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments, name="proxy", daemon=True)
        with self._guard:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                with self._guard:
                    down = self._down
                if down:
                    client.close()
                else:
                    self._begin(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        me = threading.current_thread()
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            cuts_before = self._cuts
            watched = selectors.DefaultSelector()
            watched.register(client, selectors.EVENT_READ, server)
            watched.register(server, selectors.EVENT_READ, client)
            with watched:
                while not self._closing.is_set() and self._cuts == cuts_before:
                    for key, _ in watched.select(WAKE_EVERY_S):
                        source, target = key.fileobj, key.data
                        assert isinstance(source, socket.socket)
                        if self._is(me, Stall.SILENT):
                            self.stalled.set()
                            self._closing.wait()  # what comes is never read
                            return
                        chunk = source.recv(CHUNK_BYTES)
                        if not chunk or (source is client and self._is_cut_by(chunk)):
                            return
                        target.sendall(self._seen(me, chunk) if source is client else chunk)

    def _is_cut_by(self, chunk: bytes) -> bool:
        with self._guard:
            if self._cut_at is None or self._cut_at not in chunk:
                return False
            self._cut_at = None
            self._cuts += 1
            self._down = True
        self.cut.set()
        return True

    def _is(self, thread: threading.Thread, how: Stall) -> bool:
        with self._guard:
            return self._stall is how and thread in self._failing

    def _seen(self, thread: threading.Thread, chunk: bytes) -> bytes:
        if POP not in chunk:
            return chunk
        with self._guard:
            self._popping.add(thread)
            if self._for_good:
                self._failing.add(thread)
        if not self._is(thread, Stall.ELSEWHERE):
            return chunk
        self.stalled.set()
        return chunk.replace(b"celery:", b"nobody:")  # as long, and nobody's
