"""Who may: API keys, and the origins that a browser may come from.

    request ─► origin ─► key ─► owner          a WebSocket's key is checked after its handshake, to close it with 4401

The owner of a job is the name of the key that sent it; without keys there is one owner, "", and loopback alone.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, Request, current_app, g, request

from omnirt_tasks.errors import ConfigurationError, OriginRefused, Unauthorized
from web.operations import operation_of

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
SUBPROTOCOL = "omnirt"
SUBPROTOCOL_KEY = "key."

_KEY = re.compile(r"[!-~]+")  # what a header carries unchanged


@dataclass(frozen=True)
class KeyRing:
    """The keys of an installation as (SHA-256 of the key, its name). Empty means that no key is asked for."""

    entries: tuple[tuple[bytes, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries)

    def owner_of(self, key: str) -> str | None:
        """The name of the key, or None if it is not one of ours; takes equally long either way."""
        digest = _digest(key)
        owner = None
        for known, name in self.entries:
            if hmac.compare_digest(known, digest):
                owner = name
        return owner


def load_keys(file: Path | None) -> KeyRing:
    """The keys in a file of lines `name:key`, where `#` begins a comment; None has none.

    Several keys may share a name, to replace one without a gap. Raises ConfigurationError when the file cannot be
    read, a line is malformed, a key stands twice, or there is none: a file without keys must not open the gateway.
    """
    if file is None:
        return KeyRing()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"The API keys in {str(file)!r} cannot be read: {type(error).__name__}.", "Mend OMNIRT_API_KEYS_FILE."
        ) from error
    entries: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, mark, key = (part.strip() for part in text.partition(":"))
        if not (name and mark and key) or not _KEY.fullmatch(key):
            # Never the line itself: it may hold a key.
            raise ConfigurationError(
                f"Line {number} of the API keys file is not `name:key`.", "A key is printable ASCII without spaces."
            )
        if _digest(key) in entries:
            raise ConfigurationError(
                f"The key in line {number} of the API keys file stands there twice.", "Remove one."
            )
        entries[_digest(key)] = name
    if not entries:
        raise ConfigurationError("The API keys file holds no key.", "Add a line `name:key`, or unset the setting.")
    return KeyRing(tuple(entries.items()))


@dataclass(frozen=True)
class Gate:
    """Decides on each request; `allowed_origins` are those besides the server's own."""

    keys: KeyRing
    allowed_origins: frozenset[str] = frozenset()

    def check_origin(self, asked: Request, *, websocket: bool) -> None:
        """Raise OriginRefused for a browser that comes from elsewhere, or by a name that is not ours.

        Without keys the address of the caller is all that guards the gateway. A page that rebinds its own name to
        127.0.0.1 has an Origin equal to its Host, so then the Host must be a loopback name.
        """
        origin = asked.headers.get("Origin")
        if not self.keys and _host_name(f"//{asked.host}") not in LOOPBACK_HOSTS | self._allowed_hosts():
            raise OriginRefused("Without API keys the gateway answers to loopback names only.", "Use http://127.0.0.1.")
        if origin is None or (asked.method in SAFE_METHODS and not websocket):
            return
        if origin.lower() not in {f"{asked.scheme}://{asked.host}".lower(), _http_form(asked)} | self.allowed_origins:
            raise OriginRefused(
                f"Requests from the origin {origin[:100]!r} are refused.",
                "The operator allows it by OMNIRT_ALLOWED_ORIGINS.",
            )

    def owner(self, asked: Request, *, page: bool = False) -> str:
        """The owner that the request's key stands for. Raises Unauthorized."""
        if not self.keys:
            return ""
        for key in _keys_sent(asked, page=page):
            if (owner := self.keys.owner_of(key)) is not None:
                return owner
        raise Unauthorized("A valid API key is needed.", "Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.")

    def _allowed_hosts(self) -> frozenset[str]:
        return frozenset(name for origin in self.allowed_origins if (name := _host_name(origin)))


def make_gate(keys: KeyRing, origins: Iterable[str]) -> Gate:
    """A gate with the origins in the form that browsers send: lower case, without a slash at the end."""
    return Gate(keys, frozenset(origin.lower().rstrip("/") for origin in origins))


def guard(app: Flask, gate: Gate) -> None:
    """Let no request of the app past without a known key and an accepted origin."""

    def check() -> None:
        view = current_app.view_functions.get(request.endpoint) if request.endpoint else None
        websocket = request.url_rule is not None and request.url_rule.websocket
        operation = operation_of(view)
        if operation is not None and operation.open:
            return
        gate.check_origin(request, websocket=websocket)
        if not websocket:
            g.owner = gate.owner(request, page=operation is not None and operation.page)

    app.before_request(check)


def current_owner() -> str:
    """The owner that the current request acts for."""
    owner: str = g.owner
    return owner


def _keys_sent(asked: Request, *, page: bool) -> Iterable[str]:
    if key := asked.headers.get("x-api-key"):
        yield key.strip()
    scheme, _, rest = asked.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield rest.strip()
    elif page and asked.authorization is not None and asked.authorization.password:
        yield asked.authorization.password
    for offered in _subprotocols(asked):
        if offered.startswith(SUBPROTOCOL_KEY):
            yield offered.removeprefix(SUBPROTOCOL_KEY)


def _subprotocols(asked: Request) -> list[str]:
    """What a WebSocket offers, if it offers ours: a key alone, without `omnirt`, is not ours to read."""
    offered = [name.strip() for name in asked.headers.get("Sec-WebSocket-Protocol", "").split(",")]
    return offered if SUBPROTOCOL in offered else []


def _http_form(asked: Request) -> str:
    """The server's own origin, as a browser names it that opens a WebSocket (ws:// has the page's http://)."""
    return f"{asked.scheme.replace('ws', 'http', 1)}://{asked.host}".lower()


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
