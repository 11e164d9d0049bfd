"""How a bare `celery -A omnirt_tasks worker -Q cpu-shapes` becomes a worker of this project.

    celeryd_init          queues ─► backend ─► a free device ─► the node's name
    DeviceStep.__init__   the queues that it serves, one for each subset of its tags
    DeviceStep.start      begins to serve the device; worker_ready announces it
    worker_shutting_down  grace, then every job is given back, so that Celery's warm shutdown ends
    DeviceStep.stop       ends it all, once no job is in hand

From afar the control commands `drain` and `in_hand` do and tell the same (see `omnirt worker drain`).
Celery sends these signals in worker processes alone. The receivers do nothing for an app that is not ours.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery import bootsteps, signals
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.control import control_command, inspect_command

from omnirt_tasks.celery_app import TasksApp
from omnirt_tasks.errors import ConfigurationError, OmnirtError
from omnirt_tasks.observability import logs
from omnirt_tasks.registry import discover
from omnirt_tasks.routing import queues_served, worker_tags
from omnirt_tasks.settings import Settings
from omnirt_tasks.tasks import GENERATE, send_job
from workers.backends.probing import probe_apart
from workers.consumption import CeleryConsumption
from workers.devices import DeviceLock, devices_of, take_device
from workers.plan import BY_PREFERENCE, Plan, plan_for_backend, plan_for_queues
from workers.tasks import GenerateTask

logger = logging.getLogger(__name__)

CELERYS_OWN_NAME = "celery"


@dataclass(frozen=True)
class Seat:
    """What a worker will serve, and the device it has for it."""

    plan: Plan
    device: DeviceLock

    def queues(self, settings: Settings) -> tuple[str, ...]:
        """Every queue that it takes messages from, those of tags too. Raises ConfigurationError for a wrong tag."""
        return queues_served(self.plan.queues, worker_tags(settings.tags, self.device.device))


def find_seat(queues: Sequence[str], settings: Settings) -> Seat:
    """The seat of a worker with these `-Q` queues; without any, the best that this host has free.

    Raises ConfigurationError, saying what to change, when there is none.
    """
    if queues:
        plan = plan_for_queues(queues, discover(), settings)
        return _take(plan, _devices(plan.backend, settings), settings)
    reasons = []
    for backend in BY_PREFERENCE:
        best = plan_for_backend(backend, discover(), settings)
        if best is None:
            continue
        try:
            if devices := _devices(backend, settings):
                return _take(best, devices, settings)
        except ConfigurationError as error:
            logger.warning("%s", error)
            reasons.append(str(error))
    raise ConfigurationError(
        " ".join(reasons) or "This host has neither a device nor the weights for any model.",
        "Name the queues to serve: celery -A omnirt_tasks worker -Q cpu-shapes.",
    )


def _take(plan: Plan, devices: Sequence[str], settings: Settings) -> Seat:
    return Seat(plan, take_device(plan.backend, devices, wanted=settings.device, run_dir=settings.run_dir))


def _devices(backend: str, settings: Settings) -> tuple[str, ...]:
    return devices_of(backend, probe_apart(backend), cpu_devices=settings.cpu_devices)


class DeviceStep(bootsteps.StartStopStep):
    """Serves the device between the start of Celery's pool and the end of the last job."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._app: TasksApp = worker.app
        self._seat: Seat = worker.seat
        self._serving: Any = None
        worker.app.amqp.queues.select(self._seat.queues(self._app.settings))

    def start(self, worker: Any) -> None:
        from workers.serving import Serving  # the device side, in workers alone

        # It says again with every lost connection what the settings have settled; Celery's logging undoes it before.
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning, module="celery.worker.consumer")
        consumption = CeleryConsumption(worker)
        consumption.admit(0)  # until the device is there
        try:
            self._serving = Serving(
                self._app.settings,
                self._seat.plan,
                self._seat.device,
                queues=self._seat.queues(self._app.settings),
                worker_id=worker.hostname,
                concurrency=worker.concurrency,
                resend=partial(send_job, self._app),
                consumption=consumption,
            )
        except OmnirtError as error:
            logger.critical("%s", error)
            raise SystemExit(1) from error
        task: Any = self._app.tasks[GENERATE]
        task.runner, task.to_front = self._serving.runner, self._serving.to_front
        worker.serving = self._serving  # for the control commands
        signals.worker_ready.connect(self._announce, weak=False)
        signals.worker_shutting_down.connect(self._leave, weak=False)

    def stop(self, worker: Any) -> None:
        signals.worker_ready.disconnect(self._announce)
        signals.worker_shutting_down.disconnect(self._leave)
        self._leave()  # no signal tells of a shutdown by a control command
        if self._serving is not None:
            self._serving.close()
        self._seat.device.close()

    def terminate(self, worker: Any) -> None:
        self._leave(how="Cold")
        self.stop(worker)

    def _announce(self, **_: Any) -> None:
        self._serving.announce()

    def _leave(self, how: str = "Warm", **_: Any) -> None:
        if self._serving is None:
            return
        if how != "Warm":
            self._serving.leave(0.0)
        elif not self._serving.leaving:
            self._serving.leave(self._app.settings.grace_s)


def drain(state: Any, grace_s: float | None = None, **_: Any) -> dict[str, Any]:
    """Take no more, let the jobs in hand finish for `grace_s` seconds, give the rest back, and shut down."""
    worker = state.consumer.controller
    worker.serving.drain(state.app.settings.grace_s if grace_s is None else float(grace_s))
    return {"ok": "draining"}


def in_hand(state: Any, **_: Any) -> dict[str, Any]:
    """How many jobs the worker has in hand, and since when it runs."""
    serving = state.consumer.controller.serving
    return {"jobs": serving.runner.running, "started_at_ms": serving.started_at_ms, "leaving": serving.leaving}


def _log_as(settings: Settings) -> Callable[..., None]:
    """Logging as in the rest of the project, in place of Celery's; `-l` can only ask for more than the settings do."""

    def configure(loglevel: int, **_: Any) -> None:
        level = min(loglevel, logging.getLevelNamesMapping().get(settings.log_level.upper(), loglevel))
        logs.configure(settings.model_copy(update={"log_level": logging.getLevelName(level)}))

    return configure


@signals.celeryd_init.connect
def prepare(instance: Any, options: dict[str, Any], **_: Any) -> None:
    """Find the worker its device and name, before Celery builds it; without one the process ends here, saying why."""
    app = instance.app
    if not isinstance(app, TasksApp):
        return
    queues = options.get("queues") or ()
    names = queues.split(",") if isinstance(queues, str) else list(queues)
    try:
        seat = find_seat(names, app.settings)
        seat.queues(app.settings)
    except OmnirtError as error:
        raise SystemExit(str(error)) from error
    name, _at, host = instance.hostname.partition("@")
    if name == CELERYS_OWN_NAME:
        # Two workers of a host are two nodes, to control commands and to Flower.
        name = app.settings.worker_name or f"{seat.plan.backend}-{seat.device.index}"
        instance.hostname = f"{name}@{host}"
    instance.seat = seat
    if options.get("logfile") is None:
        signals.setup_logging.connect(_log_as(app.settings), weak=False)
    control_command(args=[("grace_s", float)], signature="[grace_s]")(drain)
    inspect_command()(in_hand)
    app.register_task(GenerateTask())
    app.steps["worker"].add(DeviceStep)
