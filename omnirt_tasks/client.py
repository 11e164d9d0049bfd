"""Client: the gateway's HTTP API from Python.

client = Client("http://127.0.0.1:8000")
job = client.submit(requests.text2image(model="shapes", prompt="a red star"))
for event in client.events(job.id): ...
client.download_all(client.wait(job.id), Path("out"))
"""

import contextlib
import hashlib
import json
import math
import random
import secrets
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from omnirt_tasks.contract import (
    Artifact,
    CancelOutcome,
    ErrorInfo,
    Event,
    EventName,
    GenerateRequest,
    GenerateResult,
    JobRecord,
    JobState,
    Problem,
    Readiness,
    ResolvedRequest,
    Task,
)
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import (
    GatewayUnreachable,
    JobTimeout,
    OmnirtError,
    StorageError,
    StoreUnavailable,
    TooManyStreams,
    error_from,
)
from omnirt_tasks.local_files import data_url, with_files
from omnirt_tasks.results import result_of
from omnirt_tasks.validation import Finding, Resolution

PAGE_JOBS = 100
CHUNK_BYTES = 256 * 1024
# The gateway sends a keep-alive comment at least every 15 s, so this long a silence is a dead connection.
STREAM_SILENCE_S = 45.0
# A submit to a gateway that cannot be reached is given up sooner than one that may have reached it.
FIRST_REACH_S = 3.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0

_NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout)
_BROKEN_OFF = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
_AWAY = frozenset({httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT})
_PROBLEMS = TypeAdapter(tuple[Problem, ...])


class Client:
    """A gateway's API. Safe to share between threads; close it, or use it as a context manager.

    Every method raises the error that the gateway names (`omnirt_tasks.errors`, with `details` and `retry_after_s`),
    and GatewayUnreachable when nothing answers at the URL. `reconnect_s` is how long `events` and `wait` try to get
    back to a gateway that went away, and for how long `submit`, `retry` and `generate` are sent again to one that broke
    off or had no store. What is sent again has the same Idempotency-Key, so no job is made twice.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout_s: float = 30.0, reconnect_s: float = 60.0
    ) -> None:
        self.url = url.rstrip("/")
        self._reconnect_s = reconnect_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            # A proxy of the environment is for the world, not for this host.
            on_this_host = httpx.URL(self.url).host in {"127.0.0.1", "localhost", "::1"}
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=timeout_s,
                limits=httpx.Limits(max_connections=None),  # every watched job holds one
                trust_env=not on_this_host,
            )
        except httpx.InvalidURL as error:
            raise GatewayUnreachable(f"{url!r} is no URL: {error}", "Write it as http://HOST:PORT.") from error

    def submit(self, request: GenerateRequest, *, idempotency_key: str | None = None) -> JobRecord:
        """Queue a job, and return at once.

        Local files among its inputs are uploaded first; with an `idempotency_key`, which tells of the same job whenever
        the same request is submitted under it, they go inside the request, so that it is the same.
        """
        request = with_files(request, self.upload if idempotency_key is None else data_url)
        body = request.model_dump(mode="json", exclude_defaults=True)
        return self._submit("/v1/jobs", idempotency_key or str(uuid.uuid4()), json=body)

    def generate(
        self, request: GenerateRequest, *, timeout_s: float | None = None, idempotency_key: str | None = None
    ) -> GenerateResult:
        """Submit a job and wait for its result.

        Raises the job's own error when it fails (JobCancelled when it is cancelled), and JobTimeout after `timeout_s`
        (None: no limit); the job goes on then.
        """
        return result_of(self.wait(self.submit(request, idempotency_key=idempotency_key).id, timeout_s))

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> JobRecord:
        """Submit a failed or cancelled job anew, and return the new one; the old one is no dead letter any more.

        Repeated, it gives the same new job, unless it is under another `idempotency_key`.
        """
        return self._submit(f"/v1/jobs/{quote(job_id, safe='')}/retry", idempotency_key)

    def validate(self, request: GenerateRequest) -> Resolution:
        """What the gateway would make of the request; nothing is queued. Local files are uploaded first.

        The resolution has no `spec`, and each finding its problem alone.
        """
        request = with_files(request, self.upload)
        body = request.model_dump(mode="json", exclude_defaults=True)
        answer = self._call("POST", "/v1/validate", json=body)
        resolved = answer["request"]
        return Resolution(
            request=None if resolved is None else ResolvedRequest.model_validate(resolved),
            spec=None,
            findings=tuple(Finding(problem) for problem in _PROBLEMS.validate_python(answer["errors"])),
        )

    def job(self, job_id: str) -> JobRecord:
        """The job as it stands."""
        return JobRecord.model_validate(self._call("GET", f"/v1/jobs/{quote(job_id, safe='')}"))

    def jobs(
        self,
        *,
        state: JobState | None = None,
        model: str | None = None,
        task: Task | None = None,
        dead_letters: bool = False,
    ) -> Iterator[JobRecord]:
        """The caller's jobs, newest first and without results; pages are fetched as they are needed.

        `dead_letters` are those that failed because whatever ran them died, until they are retried or purged.
        """
        wanted = {"limit": PAGE_JOBS, "state": state, "model": model, "task": task}
        query: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        if dead_letters:
            query["dead_letters"] = "true"
        while True:
            page = self._call("GET", "/v1/jobs", params=query)
            for record in page["data"]:
                yield JobRecord.model_validate(record)
            if not page["has_more"]:
                return
            query["cursor"] = page["next_cursor"]

    def cancel(self, job_id: str) -> CancelOutcome:
        """Cancel the job: at once if it is queued, within a step if it runs. Idempotent."""
        return CancelOutcome(self._call("DELETE", f"/v1/jobs/{quote(job_id, safe='')}")["cancel"])

    def purge(self, job_id: str) -> None:
        """Cancel the job if need be, and remove its record, events and files."""
        self._call("DELETE", f"/v1/jobs/{quote(job_id, safe='')}", params={"purge": "true"})

    def events(self, job_id: str, *, after: int = 0, timeout_s: float | None = None) -> Iterator[Event]:
        """The job's events with seq > `after`, live, each once and in order; ends after the terminal one.

        A connection that breaks is made again where it broke, for `reconnect_s` at most. Raises JobTimeout when the job
        is not over after `timeout_s` (None: no limit); the job goes on.
        """
        return self._follow(job_id, after, None if timeout_s is None else time.monotonic() + timeout_s)

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobRecord:
        """The record once the job is over, however it ended.

        Raises JobTimeout after `timeout_s` (None: no limit); the job goes on.
        """
        for _ in self.events(job_id, timeout_s=timeout_s):
            pass
        patience = _Patience(self._reconnect_s)
        while True:
            try:
                return self.job(job_id)
            except (GatewayUnreachable, StoreUnavailable) as error:
                patience.bear(error)

    def download(self, artifact: Artifact, folder: Path | str, *, name: str | None = None) -> Path:
        """Fetch an output into `folder` (made if need be) as `name`, its own by default; replaces a file of that name.

        Raises StorageError when the bytes are not those that the gateway told the sum of, and OSError when the file
        cannot be written; nothing is left then.
        """
        if not artifact.path.startswith("/v1/jobs/"):  # never take our key elsewhere
            raise StorageError(f"{artifact.path!r} is no address of an output.")
        target = Path(folder) / Path(name or artifact.name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        digest = hashlib.sha256()
        try:
            with self._stream(artifact.path) as response, partial.open("wb") as stream:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    digest.update(chunk)
                    stream.write(chunk)
            if digest.hexdigest() != artifact.sha256:
                raise StorageError(f"{artifact.name} came with a wrong checksum.", "Fetch it again.")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def download_all(self, job: JobRecord | GenerateResult, folder: Path | str) -> tuple[Path, ...]:
        """Fetch every output of a succeeded job into `folder`, in order."""
        result = job if isinstance(job, GenerateResult) else result_of(job)
        return tuple(self.download(artifact, folder) for artifact in result.outputs)

    def upload(self, path: Path | str) -> str:
        """Upload a picture or a recording, and return the reference (`upload:ID`) that requests use."""
        with Path(path).open("rb") as stream:
            answer = self._call("POST", "/v1/uploads", files={"file": (Path(path).name, stream)})
        return f"upload:{answer['id']}"

    def models(self, *, task: Task | None = None, tier: str | None = None) -> tuple[JsonObject, ...]:
        """The models, as /v1/models tells of them."""
        query = {name: value for name, value in {"task": task, "tier": tier}.items() if value is not None}
        return tuple(self._call("GET", "/v1/models", params=query)["data"])

    def ready(self) -> Readiness:
        """Whether the gateway accepts jobs, and by which queues; `ok` is false while its store is away."""
        with self._translated():
            response = self._http.get("/readyz")
            try:
                return Readiness.model_validate_json(response.content)  # of a 503 too
            except ValidationError as not_ours:
                _raise_for(response)
                raise _no_gateway(response) from not_ours

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        with self._translated():
            response = self._http.request(method, path, **arguments)
            _raise_for(response)
            return response.json() if response.content else None

    def _submit(self, path: str, key: str | None, **arguments: Any) -> JobRecord:
        """Have a job accepted, once, however often it has to be sent: `key` or what stands for it sees to that."""
        headers = {} if key is None else {"Idempotency-Key": key}
        patience = _Patience(min(FIRST_REACH_S, self._reconnect_s))
        reached = False
        while True:
            try:
                return JobRecord.model_validate(self._call("POST", path, headers=headers, **arguments))
            except (GatewayUnreachable, StoreUnavailable) as error:
                if not (isinstance(error.__cause__, _BROKEN_OFF) or error.retry_after_s is not None):
                    raise  # what answers there is no gateway
                if not reached and not isinstance(error.__cause__, _NOT_REACHED):
                    reached = True
                    patience = _Patience(self._reconnect_s)
                patience.bear(error)

    @contextlib.contextmanager
    def _stream(self, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        with self._translated(), self._http.stream("GET", path, **arguments) as response:
            if not response.is_success:
                response.read()
                _raise_for(response)
            yield response

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise GatewayUnreachable(
                f"No gateway answers at {self.url} ({str(error) or type(error).__name__}).",
                "Check the URL, or start one with: omnirt up",
            ) from error
        except json.JSONDecodeError as error:
            raise GatewayUnreachable(
                f"What answers at {self.url} is no gateway: its answer is no JSON.", "Check the URL."
            ) from error

    def _follow(self, job_id: str, after: int, deadline: float | None) -> Iterator[Event]:
        """The events after `after`, over as many connections as it takes."""
        last = after
        connected = False
        patience = _Patience(self._reconnect_s)
        while True:
            remaining_s = math.inf if deadline is None else deadline - time.monotonic()
            if remaining_s <= 0:
                raise JobTimeout(f"The job {job_id} is not over yet; it goes on.", "Wait for it again, or cancel it.")
            # Half of what remains, so that silence cannot carry us past the deadline by more than a blink.
            silence_s = min(STREAM_SILENCE_S, max(remaining_s / 2, 0.05))
            opened_at = time.monotonic()
            try:
                for event in self._one_stream(job_id, last, silence_s):
                    connected = True
                    fresh = event is not None and event.seq > last
                    # A stream that opens and ends at once, over and over, is a gateway in trouble as well.
                    if fresh or time.monotonic() - opened_at > BACKOFF_MAX_S:
                        patience = _Patience(self._reconnect_s)
                    if event is not None and fresh:
                        last = event.seq
                        yield event
                        if event.terminal:
                            return
                    if deadline is not None and deadline - time.monotonic() < silence_s:
                        break
                else:
                    return
            except (GatewayUnreachable, StoreUnavailable, TooManyStreams) as error:
                if isinstance(error.__cause__, httpx.ReadTimeout) and silence_s < STREAM_SILENCE_S:
                    continue  # it is not away: we only look up more often as the deadline comes
                if not connected:  # a gateway that never answered is not waited for
                    raise
                patience.bear(error, remaining_s)

    def _one_stream(self, job_id: str, after: int, silence_s: float) -> Iterator[Event | None]:
        """One connection's events, and None for each sign of life; ends only when the job is over.

        Raises GatewayUnreachable when the connection breaks, or stays silent for `silence_s`.
        """
        path = f"/v1/jobs/{quote(job_id, safe='')}/events"
        timeout = httpx.Timeout(self._http.timeout.connect, read=silence_s)
        with self._stream(path, headers={"Last-Event-ID": str(after)}, timeout=timeout) as response:
            yield None
            if response.status_code == httpx.codes.NO_CONTENT:
                return
            for line in _lines(response):
                if not line.startswith(b"data:"):  # a comment, or `id:` and `event:`, which the data repeat
                    yield None
                    continue
                told = json.loads(line.removeprefix(b"data:"))
                if told["event"] in set(EventName):  # a newer gateway may tell of more
                    yield Event.model_validate(told)
            raise httpx.RemoteProtocolError("the stream ended before the job")


class _Patience:
    """How long a gateway that went away is waited for, with longer and longer pauses; one for each time it is away."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._give_up_at: float | None = None
        self._pause_s = BACKOFF_FIRST_S

    def bear(self, error: OmnirtError, at_most_s: float = math.inf) -> None:
        """Pause, for `at_most_s`; or raise the error, once the limit has passed since the first one."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._limit_s
        if now >= self._give_up_at:
            raise error
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret, only apart from other clients
        time.sleep(min(pause_s, self._give_up_at - now, at_most_s))
        self._pause_s = min(2 * self._pause_s, BACKOFF_MAX_S)


def _lines(response: httpx.Response) -> Iterator[bytes]:
    # Not iter_lines: it also splits at U+2028 and its like, which may stand inside a JSON string.
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        told = response.json()["error"]
        error = error_from(ErrorInfo(code=told["code"], message=told["message"]))
        error.details = _PROBLEMS.validate_python(told.get("details") or ())
    except (ValueError, KeyError, TypeError) as not_ours:
        raise _no_gateway(response) from not_ours
    error.retry_after_s = _retry_after_s(response)
    raise error


def _no_gateway(response: httpx.Response) -> GatewayUnreachable:
    error = GatewayUnreachable(
        f"{response.request.url.host} answered {response.status_code}, and not as a gateway does.",
        "Check the URL, and what stands between here and the gateway.",
    )
    error.retry_after_s = _retry_after_s(response)
    return error


def _retry_after_s(response: httpx.Response) -> int | None:
    """When to ask again, as the answer says, or as one may of a proxy whose gateway is away; None: it is no use."""
    told = response.headers.get("Retry-After", "")
    if told.isdecimal():
        return int(told)
    return 1 if response.status_code in _AWAY else None
