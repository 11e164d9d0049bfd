"""Whether workers have the memory for a request, as their records tell: for one picture, and for how many at once."""

from collections.abc import Iterable

from omnirt_tasks.contract import ModelAbility, Problem, ResolvedRequest, WorkerCapability
from omnirt_tasks.errors import InsufficientMemory
from omnirt_tasks.registry import footprint
from omnirt_tasks.registry.spec import ModelSpec
from omnirt_tasks.registry.work import one_picture
from omnirt_tasks.validation.findings import Finding


def lack_of_memory(
    worker: WorkerCapability, ability: ModelAbility, request: ResolvedRequest, spec: ModelSpec
) -> tuple[int, Finding] | None:
    """How many bytes more the run needs than the worker may give it, and the words for it; None where it has room.

    Of a job that can be split it is one picture that must fit. A worker that does not tell has room.
    """
    picture = one_picture(request)
    weights_bytes = ability.weights_bytes.get(_dtype(picture))
    if weights_bytes is None or worker.memory_budget_bytes is None:
        return None
    working_bytes = footprint.run_working_bytes(ability, spec.tasks[picture.task], picture)
    needed_bytes = footprint.needed_bytes(weights_bytes, working_bytes)
    if needed_bytes <= worker.memory_budget_bytes:
        return None
    told = footprint.insufficient_memory(weights_bytes, working_bytes, worker.memory_budget_bytes, picture)
    where = f"The device {worker.device} is too small in {_dtype(picture)}."
    error = InsufficientMemory(f"{where} {told.message}", told.hint)
    lacking_bytes = needed_bytes - worker.memory_budget_bytes
    return lacking_bytes, Finding(Problem(loc="config", rule="memory", message=str(error)), error)


def pictures_that_fit(
    request: ResolvedRequest, spec: ModelSpec, queue: str, fleet: Iterable[WorkerCapability]
) -> int | None:
    """How many pictures of the settled request each live worker of the queue has the memory for at once.

    One that has room for none is as if it were not there. None where nobody tells.
    """
    picture = one_picture(request)
    able = ((worker, worker.abilities.get(spec.id)) for worker in fleet if queue in worker.queues)
    fits = [_fit(worker, ability, picture, spec) for worker, ability in able if ability is not None]
    return min(filter(None, fits), default=None)


def _fit(worker: WorkerCapability, ability: ModelAbility, picture: ResolvedRequest, spec: ModelSpec) -> int | None:
    weights_bytes = ability.weights_bytes.get(_dtype(picture))
    if weights_bytes is None or worker.memory_budget_bytes is None or picture.config.get("vae_slicing") is True:
        return None
    working_bytes = footprint.run_working_bytes(ability, spec.tasks[picture.task], picture)
    return max(0, worker.memory_budget_bytes - weights_bytes) // working_bytes if working_bytes else None


def _dtype(request: ResolvedRequest) -> str:
    return str(request.config.get("dtype", footprint.FALLBACK_DTYPE))
