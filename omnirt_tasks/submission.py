"""The one way in which a job is accepted, whatever door it came through.

    check: validate ─► look up inputs ─► route           /v1/validate stops here, and nothing is written
    submit: check ─► keep inputs ─► record ─► message

A job is accepted once its record is written; a message that could not be sent is sent by the reconciler.
"""

import base64
import io
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from omnirt_tasks.contract import MEDIA_INPUTS, GenerateRequest, JobState, Problem, ResolvedRequest
from omnirt_tasks.errors import ArtifactNotFound, CallerError, JobNotFound, NotFound, StoreUnavailable, ValidationFailed
from omnirt_tasks.jobs.fleet import LiveWorkers
from omnirt_tasks.jobs.store import JobStore, NewJob, StoredJob
from omnirt_tasks.registry.catalog import Catalog
from omnirt_tasks.routing import Route, choose, judge, settle
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import DATA_URL, Door, Finding, Resolution, failure, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """Accepts jobs. Holds no state of its own, so threads share it.

    `send` puts a message (job id, queue) on the broker; it may raise StoreUnavailable. `queue_limit` bounds how many
    jobs wait in one queue.
    """

    store: JobStore
    catalog: Catalog
    fleet: LiveWorkers
    uploads: UploadStorage
    send: Callable[[str, str], None]
    door: Door
    queue_limit: int | None = None

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
        resolution, chosen = self._check(request, owner)
        if chosen is None:
            raise failure(resolution.findings)
        resolved, _ = resolution.unwrap()
        kept = self._keep_inputs(resolved, owner)
        written = request.model_dump(mode="json")
        written["inputs"] |= kept.inputs.model_dump(include=MEDIA_INPUTS.keys() & request.inputs.keys())
        job = self.store.create(
            NewJob(
                id=str(uuid.uuid4()),
                owner=owner,
                queue=chosen.queue,
                request=written,
                resolved=settle(kept, chosen),
                trace_id=trace_id,
                traceparent=traceparent,
            ),
            queue_limit=self.queue_limit,
        )
        try:
            self.send(job.record.id, chosen.queue)
        except StoreUnavailable as error:
            # Accepted all the same: the record is written, and the reconciler sends what has no message.
            log.warning("job %s: the message waits for the reconciler: %s", job.record.id, error)
        return job

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
        if job.owner != owner or job.record.state is not JobState.SUCCEEDED or result is None:
            raise missing
        for artifact in result.outputs:
            if artifact.name == name:
                return artifact.mime
        raise missing

    def _keep_inputs(self, request: ResolvedRequest, owner: str) -> ResolvedRequest:
        """The request with each data URL replaced by an upload of the owner's."""
        kept = {
            name: f"upload:{self.uploads.put(owner, _decoded(reference)).id}"
            for name in MEDIA_INPUTS
            if (reference := getattr(request.inputs, name)) is not None and DATA_URL.match(reference)
        }
        return request.model_copy(update={"inputs": request.inputs.model_copy(update=kept)}) if kept else request


def _decoded(data_url: str) -> io.BytesIO:
    start = DATA_URL.match(data_url)
    try:
        return io.BytesIO(base64.b64decode(data_url[start.end() if start else 0 :], validate=True))
    except ValueError:  # binascii.Error is one, and so is what is not ASCII
        raise ValidationFailed("The data URL is not base64.", "Encode the file in base64.") from None
