"""Which queue a request goes to: a pure function of the request, the model's spec and what the workers say.

A queue is named `{backend}-{queue}`, and `{backend}-{queue}+{tag}+{tag}` for jobs that ask for tags. A worker with
tags serves its queues for every subset of them, so whoever takes such a job has all that it asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from omnirt_tasks.contract import Backend, ResolvedRequest, WorkerCapability
from omnirt_tasks.errors import BackendUnsupported, ConfigurationError
from omnirt_tasks.registry.spec import ModelSpec

AUTO = "auto"
TAG_MARK = "+"

# What a backend computes in: half precision on a CPU is emulated, slowly, so fp32 takes its place there.
_DTYPE_INSTEAD: Mapping[tuple[str, str], str] = {(Backend.CPU, "fp16"): "fp32"}


@dataclass(frozen=True)
class QueueAddress:
    """A queue's name taken apart; `tags` sorted."""

    backend: str
    queue: str
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return TAG_MARK.join((f"{self.backend}-{self.queue}", *self.tags))


@dataclass(frozen=True)
class Route:
    """Where a job goes: its backend, its full queue name, and how many live workers serve it now."""

    backend: str
    queue: str
    workers: int


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


def queues_served(base: Sequence[str], tags: Sequence[str]) -> tuple[str, ...]:
    """Every queue that a worker with these tags serves for each of its `base` queues, plain ones first."""
    subsets = [subset for size in range(len(tags) + 1) for subset in combinations(sorted(tags), size)]
    addresses = [parse_queue(name) for name in base]
    names = [queue_name(address.backend, address.queue, subset) for subset in subsets for address in addresses]
    return tuple(dict.fromkeys(names))


def route(
    request: ResolvedRequest, spec: ModelSpec, fleet: Sequence[WorkerCapability], waiting: Mapping[str, int]
) -> Route:
    """The queue for the request.

    A named backend is taken as it is. "auto" prefers a queue that live workers serve, then the shortest expected wait
    (`waiting` jobs per queue name over its workers), then the order of the spec's backends; it never chooses
    cpu-stub where the model has another. Raises BackendUnsupported when the model cannot run on the named backend.
    """
    if request.backend != AUTO and request.backend not in spec.backends:
        raise BackendUnsupported(
            f"The model {spec.id!r} does not run on the backend {request.backend!r}.",
            f"Use auto or one of {', '.join(spec.backends)}.",
        )
    real: list[Backend] = [backend for backend in spec.backends if backend is not Backend.CPU_STUB] or [*spec.backends]
    candidates = real if request.backend == AUTO else [Backend(request.backend)]

    def seen_at(backend: Backend) -> Route:
        name = queue_name(backend, spec.queue, request.tags)
        serving = [worker for worker in fleet if name in worker.queues and spec.id in worker.models]
        return Route(str(backend), name, len(serving))

    def cost(choice: Route) -> tuple[bool, float]:
        return (choice.workers == 0, waiting.get(choice.queue, 0) / max(choice.workers, 1))

    return min(map(seen_at, candidates), key=cost)  # min keeps the first of equals: the spec's order


def settle(request: ResolvedRequest, chosen: Route) -> ResolvedRequest:
    """The request as it will run on the chosen backend, with the nearest dtype that it can do, and a warning of it."""
    config, warnings = request.config, request.warnings
    wished = config.get("dtype")
    instead = _DTYPE_INSTEAD.get((chosen.backend, wished)) if isinstance(wished, str) else None
    if instead is not None:
        config = {**config, "dtype": instead}
        warnings = (*warnings, f"config.dtype: {chosen.backend} does not compute in {wished}; {instead} is used.")
    return request.model_copy(update={"backend": chosen.backend, "config": config, "warnings": warnings})
