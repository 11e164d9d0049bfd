"""The devices of this host as workers of an OmniEngine's own, so that its jobs are routed and split as a gateway's."""

from collections.abc import Iterable, Sequence
from threading import Lock

from omnirt_tasks.contract import WorkerCapability
from omnirt_tasks.routing import queues_served, worker_tags
from workers.backends import driver
from workers.host import DeviceHost
from workers.plan import Plan


class OwnFleet:
    """A `LiveWorkers` with one worker for each plan. Safe to share between threads."""

    def __init__(self, name: str, plans: Iterable[Plan], *, tags: Sequence[str], concurrency: int) -> None:
        """The workers are named after `name` and their backend; `tags` are those of all of them."""
        self._records = tuple(_record(f"{name}-{plan.backend}", plan, tags, concurrency) for plan in plans)
        self._lock = Lock()
        self._hosts: dict[str, DeviceHost] = {}  # by backend; those whose device was taken

    def has_taken(self, backend: str, host: DeviceHost) -> None:
        """The backend's device is taken: from now on its host tells what it can do, and what it has measured."""
        with self._lock:
            self._hosts[backend] = host

    def live(self) -> tuple[WorkerCapability, ...]:
        """See LiveWorkers."""
        with self._lock:
            hosts = dict(self._hosts)
        return tuple(
            record.model_copy(update={"abilities": dict(hosts[record.backend].capability().abilities)})
            if record.backend in hosts
            else record
            for record in self._records
        )


def _record(worker_id: str, plan: Plan, tags: Sequence[str], concurrency: int) -> WorkerCapability:
    probed, device = driver(plan.backend), f"{plan.backend}:0"
    return WorkerCapability(
        worker_id=worker_id,
        backend=plan.backend,
        device=device,
        queues=queues_served(plan.queues, worker_tags(tags, device)),
        models=tuple(spec.id for spec in plan.models),
        concurrency=concurrency,
        tags=tuple(tags),
        dtypes=probed.probe()[0].dtypes,
        features=probed.features(),
    )
