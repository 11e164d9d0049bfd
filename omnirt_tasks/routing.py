"""Which queue a request goes to: a pure function of the request, the model's spec and what the workers say.

A queue is named `{backend}-{queue}`, and `{backend}-{queue}+{tag}+{tag}` for jobs that ask for tags. A worker with
tags serves its queues for every subset of them, so whoever takes such a job has all that it asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from omnirt_tasks.contract import AUTO, TAG_MARK, Backend, ResolvedRequest, WorkerCapability
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry.spec import ModelSpec

FULL_PRECISION = "fp32"

# What a backend computes in while no worker says it: half precision on a CPU is emulated, slowly.
_DTYPE_INSTEAD: Mapping[tuple[str, str], str] = {(Backend.CPU, "fp16"): FULL_PRECISION}


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
    """Every queue that a worker with these tags serves for each of its `base` queues, plain ones first."""
    subsets = [subset for size in range(len(tags) + 1) for subset in combinations(sorted(tags), size)]
    addresses = [parse_queue(name) for name in base]
    names = [queue_name(address.backend, address.queue, subset) for subset in subsets for address in addresses]
    return tuple(dict.fromkeys(names))


def candidates(request: ResolvedRequest, spec: ModelSpec) -> tuple[Backend, ...]:
    """The backends that the request may go to, in the spec's order; cpu-stub only where it is named or all there is."""
    if request.backend != AUTO:
        return (Backend(request.backend),)
    return tuple(backend for backend in spec.backends if backend is not Backend.CPU_STUB) or spec.backends


def route(
    request: ResolvedRequest, spec: ModelSpec, fleet: Sequence[WorkerCapability], waiting: Mapping[str, int]
) -> Route:
    """The queue for the request, whose backend is "auto" or one of the spec's.

    A named backend is taken as it is. "auto" prefers a queue that live workers serve, then the shortest expected wait
    (`waiting` jobs per queue name over its workers), then the order of the spec's backends; it never chooses
    cpu-stub where the model has another.
    """

    def seen_at(backend: Backend) -> Route:
        name = queue_name(backend, spec.queue, request.tags)
        serving = [worker for worker in fleet if name in worker.queues and spec.id in worker.models]
        said = [worker.dtypes for worker in serving if worker.dtypes]
        shared = tuple(dtype for dtype in said[0] if all(dtype in dtypes for dtypes in said)) if said else ()
        return Route(str(backend), name, len(serving), shared)

    def cost(choice: Route) -> tuple[bool, float]:
        return (choice.workers == 0, waiting.get(choice.queue, 0) / max(choice.workers, 1))

    return min(map(seen_at, candidates(request, spec)), key=cost)  # min keeps the first of equals: the spec's order


def settle(request: ResolvedRequest, chosen: Route) -> ResolvedRequest:
    """The request as it will run on the chosen backend, with a dtype that is computed in there, and a warning of it."""
    config, warnings = request.config, request.warnings
    wished = config.get("dtype")
    if isinstance(wished, str) and (instead := _dtype_for(wished, chosen)) != wished:
        config = {**config, "dtype": instead}
        warnings = (*warnings, f"config.dtype: {chosen.backend} does not compute in {wished}; {instead} is used.")
    return request.model_copy(update={"backend": chosen.backend, "config": config, "warnings": warnings})


def _dtype_for(wished: str, chosen: Route) -> str:
    if not chosen.dtypes:
        return _DTYPE_INSTEAD.get((chosen.backend, wished), wished)
    if wished in chosen.dtypes:
        return wished
    return FULL_PRECISION if FULL_PRECISION in chosen.dtypes else chosen.dtypes[0]
