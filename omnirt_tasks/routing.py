"""Which queue a request goes to: a pure function of the request, the model's spec and what the workers say.

    judge ─► Outlook ─┬─ findings: nothing that lives can run it, and why
                      └─ prospects ─► choose (what waits where) ─► Route ─► settle

A queue is named `{backend}-{queue}`, and `{backend}-{queue}+{tag}+{tag}` for jobs that ask for tags. A worker with
tags serves its queues for every subset of them, so whoever takes such a job has all that it asks for. A device is
asked for in the same way: every worker has the tag of its own ("cuda-1" for "cuda:1").
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from omnirt_tasks.contract import AUTO, TAG_MARK, Backend, ModelAbility, Problem, ResolvedRequest, WorkerCapability
from omnirt_tasks.errors import BackendUnsupported, ConfigurationError
from omnirt_tasks.registry import footprint
from omnirt_tasks.registry.options import ANY_DEVICE
from omnirt_tasks.registry.spec import ModelSpec
from omnirt_tasks.room import lack_of_memory
from omnirt_tasks.validation.findings import Finding, listed

# What a backend computes in while no worker says it: half precision on a CPU is emulated, slowly.
_DTYPE_INSTEAD: Mapping[tuple[str, str], str] = {(Backend.CPU, "fp16"): footprint.FALLBACK_DTYPE}
# Options that, when true, need a feature of the same name on the device.
_FEATURE_OPTIONS = ("compile",)
_DEVICE = re.compile(rf"({'|'.join(Backend)}):(0|[1-9][0-9]{{0,2}})")
_DEVICE_TAG = re.compile(rf"({'|'.join(Backend)})-(0|[1-9][0-9]{{0,2}})")


@dataclass(frozen=True)
class QueueAddress:
    """A queue's name taken apart; `tags` sorted."""

    backend: str
    queue: str
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return TAG_MARK.join((f"{self.backend}-{self.queue}", *self.tags))


@dataclass(frozen=True)
class Judgement:
    """What a worker's record says of a request: `findings` are why it cannot run it, none where it can.

    `serves` is false for one that has not the model. `seconds_per_unit` is how long it takes for a unit of the model's
    work, None where it has not told; `lacking_bytes` how much more memory it would need.
    """

    device: str
    findings: tuple[Finding, ...] = ()
    serves: bool = True
    seconds_per_unit: float | None = None
    lacking_bytes: int = 0


@dataclass(frozen=True)
class Prospect:
    """A queue that the request may go to, and what each live worker that serves it says.

    `dtypes` are those that each of these workers computes in; empty when none has said.
    """

    backend: str
    queue: str
    workers: tuple[Judgement, ...] = ()
    dtypes: tuple[str, ...] = ()

    @property
    def able(self) -> int:
        """How many of its workers can run the request."""
        return sum(not worker.findings for worker in self.workers)

    def expected_wait(self, waiting: int, *, timed: bool) -> float:
        """How long a job would wait behind `waiting` others, in seconds per unit of work if `timed`, else in jobs."""
        if not self.workers:
            return 0.0
        if not timed:
            return waiting / len(self.workers)
        return waiting / sum(1 / worker.seconds_per_unit for worker in self.workers if worker.seconds_per_unit)


@dataclass(frozen=True)
class Outlook:
    """The queues among which the waits decide, in the order of the spec's backends; or why there is none."""

    prospects: tuple[Prospect, ...]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Route:
    """Where a job goes: its backend, its full queue name, and how many live workers serve it now.

    `dtypes` are those that each of these workers computes in; empty when none has said.
    """

    backend: str
    queue: str
    workers: int
    dtypes: tuple[str, ...] = ()


def queue_name(backend: str, queue: str, tags: Sequence[str] = ()) -> str:
    """The full name of the queue for jobs that ask for these tags."""
    return str(QueueAddress(backend, queue, tuple(sorted(set(tags)))))


def parse_queue(name: str) -> QueueAddress:
    """The parts of a full queue name. Raises ConfigurationError when it begins with no backend's name."""
    base, *tags = name.split(TAG_MARK)
    # cpu-stub before cpu: the longest backend name that fits is meant.
    for backend in sorted(Backend, key=len, reverse=True):
        queue = base.removeprefix(f"{backend}-")
        if queue not in {base, ""}:
            return QueueAddress(str(backend), queue, tuple(sorted(tags)))
    raise ConfigurationError(
        f"{name!r} is no queue of this project.",
        f"Queues are named BACKEND-QUEUE, as cpu-shapes or cuda-sdxl; backends are {', '.join(Backend)}.",
    )


def plain_name(name: str) -> str:
    """A full queue name without its tags."""
    return name.partition(TAG_MARK)[0]


def queues_served(base: Sequence[str], tags: Sequence[str]) -> tuple[str, ...]:
    """Every queue that a worker with these tags serves for each of its `base` queues, plain ones first.

    They are 2^n for each base queue, so tags are few: an operator's at most four, and the device's.
    """
    subsets = [subset for size in range(len(tags) + 1) for subset in combinations(sorted(tags), size)]
    addresses = [parse_queue(name) for name in base]
    names = [queue_name(address.backend, address.queue, subset) for subset in subsets for address in addresses]
    return tuple(dict.fromkeys(names))


def device_tag(device: str) -> str:
    """The tag that stands for a device in the names of queues: "cuda-1" for "cuda:1"."""
    return device.replace(":", "-")


def worker_tags(own: Sequence[str], device: str) -> tuple[str, ...]:
    """The tags for whose subsets a worker serves queues: the operator's, and its device's.

    Raises ConfigurationError for a tag of the operator's that is the name of a device: jobs which ask for that device
    would come here.
    """
    if posing := [tag for tag in own if _DEVICE_TAG.fullmatch(tag)]:
        raise ConfigurationError(
            f"The tag {posing[0]!r} stands for a device.",
            "Name OMNIRT_TAGS otherwise; a worker has the tag of its device by itself.",
        )
    return tuple(sorted({*own, device_tag(device)}))


def judge(request: ResolvedRequest, spec: ModelSpec, fleet: Iterable[WorkerCapability]) -> Outlook:
    """Where the request, whose backend is "auto" or one of the spec's, could go; or why nothing that lives can run it.

    Any worker of a queue may take its messages. So what counts is a queue's weakest worker: first come queues whose
    live workers can all run the request, then those where some can, at the risk that another takes it and fails it. A
    queue without live workers comes after both: a job waits there until one comes, and of several such the first is
    taken. Where workers live, but none of them can, the findings are those of the one that comes nearest.

    A worker of the queue that has not the model itself takes the model's jobs too, and fails them: it is one that
    cannot, and the farthest.

    A named backend, or the backend of a named device, is the only one. "auto" is never cpu-stub where the model has
    another. A record that tells nothing of the model's abilities is not held against its worker.
    """
    device = _wished_device(request)
    if wrong := tuple(_check_device(device, request, spec)):
        return Outlook((), wrong)
    workers = tuple(fleet)
    prospects = tuple(_prospect(backend, request, spec, workers) for backend in _candidates(request, spec))
    for fit in (_all_can, _some_can):
        if fitting := tuple(filter(fit, prospects)):
            return Outlook(fitting)
    judged = [worker for prospect in prospects for worker in prospect.workers]
    if judged:
        return Outlook((), min(judged, key=_distance).findings)
    if device is not None and (elsewhere := _devices_beside(request, spec, workers)):
        return Outlook((), (_no_such_device(device, elsewhere),))
    return Outlook(prospects[:1])


def choose(prospects: Sequence[Prospect], waiting: Mapping[str, int]) -> Route:
    """The prospect with the shortest expected wait, `waiting` being how many jobs wait in each queue.

    Measured times count where all workers of all prospects tell them, else the number of jobs per worker does. Of
    equals the first is chosen.
    """
    timed = all(worker.seconds_per_unit for prospect in prospects for worker in prospect.workers)

    def wait(prospect: Prospect) -> float:
        return prospect.expected_wait(waiting.get(prospect.queue, 0), timed=timed)

    best = min(prospects, key=wait)
    return Route(best.backend, best.queue, len(best.workers), best.dtypes)


def settle(request: ResolvedRequest, chosen: Route) -> ResolvedRequest:
    """The request as it will run on the chosen backend, with a dtype that is computed in there, and a warning of it."""
    config, warnings = request.config, request.warnings
    wished = config.get("dtype")
    if isinstance(wished, str) and (instead := _dtype_for(wished, chosen.backend, chosen.dtypes)) != wished:
        config = {**config, "dtype": instead}
        warnings = (*warnings, f"config.dtype: {chosen.backend} does not compute in {wished}; {instead} is used.")
    return request.model_copy(update={"backend": chosen.backend, "config": config, "warnings": warnings})


def _dtype_for(wished: str, backend: str, dtypes: tuple[str, ...]) -> str:
    if not dtypes:
        return _DTYPE_INSTEAD.get((backend, wished), wished)
    return footprint.nearest_dtype(wished, dtypes)


# Queues


def _candidates(request: ResolvedRequest, spec: ModelSpec) -> tuple[str, ...]:
    if (device := _wished_device(request)) is not None:
        return (_backend_of(device),)
    if request.backend != AUTO:
        return (request.backend,)
    return tuple(backend for backend in spec.backends if backend is not Backend.CPU_STUB) or spec.backends


def _prospect(backend: str, request: ResolvedRequest, spec: ModelSpec, workers: Iterable[WorkerCapability]) -> Prospect:
    device = _wished_device(request)
    tags = request.tags if device is None else (*request.tags, device_tag(device))
    name = queue_name(backend, spec.queue, tags)
    serving = [worker for worker in workers if name in worker.queues]
    said = [worker.dtypes for worker in serving if worker.dtypes and spec.id in worker.models]
    shared = tuple(dtype for dtype in said[0] if all(dtype in dtypes for dtypes in said)) if said else ()
    settled = settle(request, Route(backend, name, len(serving), shared))  # any of them may take it: in what all can
    return Prospect(backend, name, tuple(_judged(worker, settled, spec) for worker in serving), shared)


def _all_can(prospect: Prospect) -> bool:
    return 0 < prospect.able == len(prospect.workers)


def _some_can(prospect: Prospect) -> bool:
    return prospect.able > 0


# Workers


def _distance(worker: Judgement) -> tuple[bool, int, int]:
    """How far the worker is from being able to run the request."""
    return not worker.serves, len(worker.findings), worker.lacking_bytes


def _judged(worker: WorkerCapability, request: ResolvedRequest, spec: ModelSpec) -> Judgement:
    if spec.id not in worker.models:
        told = (
            f"No live worker has {spec.id}: the weights or packages that it needs are missing on {worker.device}. "
            "Choose another model, or ask the operator to put them there."
        )
        return Judgement(worker.device, (Finding(Problem(loc="model", rule="served", message=told)),), serves=False)
    ability = worker.abilities.get(spec.id)
    if ability is None:
        return Judgement(worker.device)
    findings = [
        *_check_task(worker, ability, request),
        *_check_options(worker, ability, request, spec),
        *_check_limits(worker, ability, request),
        *_check_features(worker, request),
    ]
    lack = lack_of_memory(worker, ability, request, spec)
    if lack is None:
        return Judgement(worker.device, tuple(findings), seconds_per_unit=ability.seconds_per_unit)
    lacking_bytes, finding = lack
    return Judgement(
        worker.device,
        (*findings, finding),
        seconds_per_unit=ability.seconds_per_unit,
        lacking_bytes=lacking_bytes,
    )


def _check_task(worker: WorkerCapability, ability: ModelAbility, request: ResolvedRequest) -> Iterable[Finding]:
    if request.task not in ability.tasks:
        able = f"{worker.device} does {listed(ability.tasks)}"
        told = f"No live worker does {request.task} with {request.model}; {able}."
        yield Finding(Problem(loc="task", rule="supported", message=told))


def _check_options(
    worker: WorkerCapability, ability: ModelAbility, request: ResolvedRequest, spec: ModelSpec
) -> Iterable[Finding]:
    """What the worker's own version of the model does not know, and would pass over, or refuse once it has the job."""
    if not ability.options:
        return
    options = spec.tasks[request.task].options
    for name, value in request.config.items():
        if name not in ability.options and not (name in options and value == options[name].default):
            told = f"No live worker takes {name}: {worker.device} does not know it. Leave it out."
            yield Finding(Problem(loc=f"config.{name}", rule="supported", message=told))


def _check_limits(worker: WorkerCapability, ability: ModelAbility, request: ResolvedRequest) -> Iterable[Finding]:
    """What is beyond the worker: its own version of the model may have narrower bounds than this process's."""
    asked = {
        **{name: (f"config.{name}", value) for name, value in request.config.items()},
        **{name: (f"inputs.{name}", value) for name, value in request.inputs.model_dump().items()},
    }
    for name, maximum in ability.limits.get(str(request.task), {}).items():
        loc, value = asked.get(name, ("", None))
        if isinstance(value, int | float) and value > maximum:
            told = f"{value} is above {maximum:g}, the most that {worker.device} takes; use at most that."
            yield Finding(Problem(loc=loc, rule="maximum", message=told))
    ranks = request.config.get("devices")
    if isinstance(ranks, int) and ranks > worker.ranks_max:
        told = f"No live worker has {ranks} devices for one job: {worker.device} gives {worker.ranks_max}. Use fewer."
        yield Finding(Problem(loc="config.devices", rule="supported", message=told))


def _check_features(worker: WorkerCapability, request: ResolvedRequest) -> Iterable[Finding]:
    for option in _FEATURE_OPTIONS:
        if request.config.get(option) is True and option not in worker.features:
            told = f"No live worker can {option}: {worker.device} has not what it takes. Leave {option} out."
            yield Finding(Problem(loc=f"config.{option}", rule="supported", message=told))


# Devices


def _wished_device(request: ResolvedRequest) -> str | None:
    wished = request.config.get("device", ANY_DEVICE)
    return None if wished == ANY_DEVICE else str(wished)


def _backend_of(device: str) -> str:
    return device.rpartition(":")[0]


def _check_device(device: str | None, request: ResolvedRequest, spec: ModelSpec) -> Iterable[Finding]:
    """What is wrong with the device's name, whatever lives."""
    if device is None:
        return
    if not _DEVICE.fullmatch(device):
        told = f"{device[:40]!r} names no device; use {ANY_DEVICE!r}, or a name such as {spec.backends[0]}:0."
        yield Finding(Problem(loc="config.device", rule="pattern", message=told))
    elif (backend := _backend_of(device)) not in spec.backends:
        unsupported = BackendUnsupported(
            f"{spec.id} does not run on the device {device}.",
            f"Use {ANY_DEVICE}, or a device of {listed(spec.backends)}.",
        )
        yield Finding(Problem(loc="config.device", rule="supported", message=str(unsupported)), unsupported)
    elif request.backend not in {AUTO, backend}:
        told = f"{device} is no device of the backend {request.backend}; name one of its own, or the backend {AUTO}."
        yield Finding(Problem(loc="config.device", rule="backend", message=told))


def _devices_beside(request: ResolvedRequest, spec: ModelSpec, workers: Iterable[WorkerCapability]) -> tuple[str, ...]:
    """The devices that the request could name: those of live workers which serve what else it asks for."""
    there = set()
    for worker in workers:
        name = queue_name(_backend_of(worker.device), spec.queue, (*request.tags, device_tag(worker.device)))
        if spec.id in worker.models and name in worker.queues and request.backend in {AUTO, worker.backend}:
            there.add(worker.device)
    return tuple(sorted(there))


def _no_such_device(device: str, there: Sequence[str]) -> Finding:
    told = f"No live worker has the device {device}; there are {listed(there)}. Use one of them, or {ANY_DEVICE}."
    return Finding(Problem(loc="config.device", rule="known", message=told))
