"""The one way in which a job is accepted, whatever door it came through.

    check: validate ─► look up inputs ─► route           /v1/validate stops here, and nothing is written
    submit: check ─► keep inputs ─► split ─► record ─► message, or one for each part
    submit_once: came before? ─► submit                  under a key of the caller's, which stands for one job

A job is accepted once its record is written; a message that could not be sent is sent by the reconciler.
"""

import base64
import hashlib
import io
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from omnirt_tasks.contract import MEDIA_INPUTS, GenerateRequest, Inputs, JobState, Problem, ResolvedRequest
from omnirt_tasks.errors import (
    ArtifactNotFound,
    CallerError,
    JobNotFound,
    NotFound,
    StorageError,
    StoreUnavailable,
    ValidationFailed,
)
from omnirt_tasks.jobs.fleet import LiveWorkers
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Idempotency, NewJob, StoredJob, WakeUp
from omnirt_tasks.registry.catalog import Catalog
from omnirt_tasks.registry.spec import ModelSpec
from omnirt_tasks.registry.work import count_pictures
from omnirt_tasks.room import pictures_that_fit
from omnirt_tasks.routing import Route, choose, judge, settle
from omnirt_tasks.splitting import pictures_per_part, split
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import DATA_URL, Door, Finding, Resolution, failure, parse_request, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """The job that a key stands for; `replayed` says that it was accepted before, and nothing was done now."""

    job: StoredJob
    replayed: bool


@dataclass(frozen=True)
class Submission:
    """Accepts jobs. Holds no state of its own, so threads share it.

    `send` puts a message on the broker; it may raise StoreUnavailable. `queue_limit` bounds how many jobs wait in one
    queue. For `idempotency_ttl_s` a caller's key stands for the job that it came with. No part of a job that is split
    has more than `max_batch_size` pictures (None: as many as share a forward pass well, as the workers measured).
    """

    store: JobStore
    catalog: Catalog
    fleet: LiveWorkers
    uploads: UploadStorage
    send: Callable[[WakeUp], None]
    door: Door
    queue_limit: int | None = None
    idempotency_ttl_s: float = 24 * 3600
    max_batch_size: int | None = None

    def check(self, request: GenerateRequest, owner: str) -> Resolution:
        """Everything that can be told of a request without writing: what will run, or every problem at once."""
        resolution, chosen = self._check(request, owner)
        if resolution.request is None or chosen is None:
            return resolution
        return replace(resolution, request=settle(resolution.request, chosen))

    def submit(
        self,
        request: GenerateRequest,
        *,
        owner: str,
        trace_id: str | None = None,
        traceparent: str | None = None,
    ) -> StoredJob:
        """Accept a job: durable in the store when this returns.

        Raises what `check` found (a CallerError; nothing is queued), QueueFull, StorageError and StoreUnavailable.
        """
        return self._accept(request, owner=owner, trace_id=trace_id, traceparent=traceparent).job

    def submit_once(
        self,
        request: GenerateRequest,
        key: str,
        *,
        owner: str,
        trace_id: str | None = None,
        traceparent: str | None = None,
    ) -> Submitted:
        """Accept a job unless the owner's key stands for one already, which is then returned as it stands.

        So it may be repeated, at the same time too and through other gateways. A repeat is not checked again: what can
        be run may have changed since. Raises like `submit`, and IdempotencyMismatch for a key that came with another
        request.
        """
        named = Idempotency(key, _fingerprint(request), round(self.idempotency_ttl_s * 1000))
        if (earlier := self.store.submitted(owner, named)) is not None:
            return Submitted(earlier, replayed=True)
        return self._accept(request, owner=owner, trace_id=trace_id, traceparent=traceparent, idempotency=named)

    def _accept(
        self,
        request: GenerateRequest,
        *,
        owner: str,
        trace_id: str | None,
        traceparent: str | None,
        idempotency: Idempotency | None = None,
    ) -> Submitted:
        resolution, chosen = self._check(request, owner)
        if chosen is None:
            raise failure(resolution.findings)
        resolved, spec = resolution.unwrap()
        settled = settle(resolved, chosen)
        part_pictures = self._pictures_per_part(settled, spec, chosen)  # it may raise, so before anything is kept
        job_id = str(uuid.uuid4())
        kept = self._keep_inputs(settled, owner, job_id)
        written = request.model_dump(mode="json")
        written["inputs"] |= kept.inputs.model_dump(include=MEDIA_INPUTS.keys() & request.inputs.keys())
        new = NewJob(
            id=job_id,
            owner=owner,
            queue=chosen.queue,
            request=written,
            resolved=kept,
            trace_id=trace_id,
            traceparent=traceparent,
            idempotency=idempotency,
            parts=split(kept, part_pictures),
        )
        try:
            job = self.store.create(new, queue_limit=self.queue_limit)
        except CallerError:
            self._drop_inputs(job_id, kept.inputs)
            raise
        except StoreUnavailable:
            if not self._may_exist(job_id):
                self._drop_inputs(job_id, kept.inputs)
            raise
        if job.record.id != new.id:  # the same submit came a moment earlier
            self._drop_inputs(job_id, kept.inputs)
            return Submitted(job, replayed=True)
        try:
            for wake_up in job.wake_ups:
                self.send(wake_up)
        except StoreUnavailable as error:
            # Accepted all the same: the record is written, and the reconciler sends what has no message.
            log.warning("job %s: what was not sent waits for the reconciler: %s", new.id, error)
        return Submitted(job, replayed=False)

    def _pictures_per_part(self, request: ResolvedRequest, spec: ModelSpec, chosen: Route) -> int:
        """How many pictures of the request are run as one, if it is split. Raises StoreUnavailable."""
        if count_pictures(request) == 1:
            return 1
        fleet = self.fleet.live()
        limits = (self.max_batch_size, spec.max_batch_size, pictures_that_fit(request, spec, chosen.queue, fleet))
        limit = min(filter(None, limits), default=None)
        return pictures_per_part(fleet, chosen.queue, request, limit)

    def _check(self, request: GenerateRequest, owner: str) -> tuple[Resolution, Route | None]:
        resolution = resolve(request, self.catalog, door=self.door)
        wrong = {problem.loc for problem in resolution.problems}
        references = {
            name: reference
            for name in MEDIA_INPUTS
            if isinstance(reference := request.inputs.get(name), str)
            and not wrong & {f"inputs.{name}", "model", "task"}
        }
        if missing := tuple(self._check_references(references, owner)):
            return replace(resolution, request=None, findings=(*resolution.findings, *missing)), None
        if resolution.request is None or resolution.spec is None:
            return resolution, None
        outlook = judge(resolution.request, resolution.spec, self.fleet.live())
        if outlook.findings:
            return replace(resolution, request=None, findings=outlook.findings), None
        queues = [prospect.queue for prospect in outlook.prospects]
        waiting = {queue: self.store.depth(queue).waiting for queue in queues} if len(queues) > 1 else {}
        return resolution, choose(outlook.prospects, waiting)

    def _check_references(self, references: Mapping[str, str], owner: str) -> Iterable[Finding]:
        for name, reference in references.items():
            kind = MEDIA_INPUTS[name]
            try:
                mime = self._mime(reference, owner)
            except CallerError as error:
                lone = error if isinstance(error, NotFound) else None
                yield Finding(Problem(loc=f"inputs.{name}", rule=error.code, message=str(error)), lone)
                continue
            if not mime.startswith(kind):
                told = f"It holds {mime}; send {kind.rstrip('/')}."
                yield Finding(Problem(loc=f"inputs.{name}", rule="media_type", message=told))

    def _mime(self, reference: str, owner: str) -> str:
        if DATA_URL.match(reference):
            return self.uploads.inspect(_decoded(reference))
        kind, _, address = reference.partition(":")
        if kind == "upload":
            return self.uploads.find(owner, address).mime
        job_id, _, name = address.partition("/")
        missing = ArtifactNotFound("There is no such artifact.", "Name one of a succeeded job's: artifact:JOB/NAME.")
        try:
            job = self.store.get(job_id)
        except JobNotFound:
            raise missing from None
        result = job.record.result
        if job.owner != owner or job.part is not None or job.record.state is not JobState.SUCCEEDED or result is None:
            raise missing
        for artifact in result.outputs:
            if artifact.name == name:
                return artifact.mime
        raise missing

    def _keep_inputs(self, request: ResolvedRequest, owner: str, job_id: str) -> ResolvedRequest:
        """The request with each data URL replaced by an upload of the job's own; where one fails, none stays.

        What another job brought goes with that one, so this one gets a copy.
        """
        kept: dict[str, str] = {}
        try:
            for name in MEDIA_INPUTS:
                reference = getattr(request.inputs, name) or ""
                if DATA_URL.match(reference):
                    kept[name] = f"upload:{self.uploads.put(owner, _decoded(reference), job_id=job_id).id}"
                elif reference.startswith("upload:"):
                    upload = self.uploads.find(owner, reference.removeprefix("upload:"))
                    if upload.job_id is not None:
                        kept[name] = f"upload:{self.uploads.copy(upload, job_id=job_id).id}"
        except BaseException:
            self._drop_inputs(job_id, Inputs(**kept))
            raise
        return request.model_copy(update={"inputs": request.inputs.model_copy(update=kept)}) if kept else request

    def _may_exist(self, job_id: str) -> bool:
        """Whether a job may have been written by a call that failed: one of a full store has not, and reads work."""
        try:
            self.store.get(job_id)
        except JobNotFound:
            return False
        except StoreUnavailable:
            return True
        return True

    def _drop_inputs(self, job_id: str, inputs: Inputs) -> None:
        try:
            self.uploads.remove_inputs(job_id, inputs)
        except StorageError as error:
            log.warning("the inputs of a job that was not accepted stay until their time is over: %s", error)


def request_again(job: StoredJob) -> GenerateRequest:
    """The request that makes a job once more: as it was accepted, with the seed that was drawn for it.

    Raises ValidationFailed when it is none any more.
    """
    request = parse_request(job.record.request)
    seed = job.resolved.config.get("seed")
    return request if seed is None else request.model_copy(update={"config": {**request.config, "seed": seed}})


def _fingerprint(request: GenerateRequest) -> str:
    """Tells one request from another, however it is written and however its caller waits for it."""
    body = request.model_dump(mode="json", exclude={"async_run"})
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _decoded(data_url: str) -> io.BytesIO:
    start = DATA_URL.match(data_url)
    try:
        return io.BytesIO(base64.b64decode(data_url[start.end() if start else 0 :], validate=True))
    except ValueError:  # binascii.Error is one, and so is what is not ASCII
        raise ValidationFailed("The data URL is not base64.", "Encode the file in base64.") from None
