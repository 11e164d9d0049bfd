"""Runs a model that lives in processes of its own (see `workers.ranks`): started once, then given one job at a time.

    load ─► launcher ─► ranks, which keep the model
    run ─► the device held ─► order over the wire ─► steps, outcome

The device is the job's alone meanwhile. A group that died is started again for the next job.
"""

import logging
import queue
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass

from omnirt_tasks.contract import EventName
from omnirt_tasks.errors import ModelFailed, WorkerLost, error_from
from omnirt_tasks.registry import LoadRequest, ModelSpec, RankGroup
from omnirt_tasks.settings import environment_without_settings
from workers.context import Interrupted, JobContext, current_job
from workers.executors import LoadedModel
from workers.host import (
    HostEvent,
    InterruptReason,
    OutputFile,
    RunFailed,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)
from workers.launchers import command
from workers.peer import Gone, PeerHost
from workers.ranks import RankArguments
from workers.ranks.work import device_of

log = logging.getLogger(__name__)

START_PATIENCE_S = 900.0
STOP_PATIENCE_S = 30.0
"""How long a group may take to its next step, once its job is to stop; then it is ended by force."""
CLOSE_PATIENCE_S = 5.0


class RankGroupExecutor:
    """Keeps each model as a group of processes. Holds nothing itself, so threads share it."""

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        """Raises what kept the model from being made, or ModelFailed when its processes did not start."""
        assert spec.loader is not None, "a model without a loader is not runnable"
        group = spec.loader(spec, request)
        assert isinstance(group, RankGroup), "what a family of this mode loads"
        processes = GroupProcesses(spec.id, group, request)
        processes.start()
        # What processes of their own take is not measured from here; the spec says what it is known to be.
        return LoadedModel(
            processes,
            {f"rank {rank}": device_of(request.device, rank) for rank in range(group.ranks)},
            size_bytes=spec.min_memory_bytes,
            close=processes.close,
        )

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        """Raises what the model told of, WorkerLost when one of its processes died, ModelFailed for a lack of files."""
        processes: GroupProcesses = model.content
        with job.device_held():
            if not processes.alive:
                job.stage("load")
                processes.start()
            job.stage("generate")
            outcome = processes.run(order, job)
        match outcome:
            case RunSucceeded(outputs):
                job.stage("export")
                return tuple(_present(output, order) for output in outputs)
            case RunFailed(error):
                raise error_from(error)
            case RunInterrupted(reason):
                job.check()
                raise Interrupted(reason)
            case RunLost(detail):
                job.check()
                log.error("the processes of %s were lost: %s", order.request.model, detail)
                raise WorkerLost(
                    f"A process of the model {order.request.model} died while the job ran.",
                    "Send the job again; the worker's log has how it ended.",
                )


def _present(output: OutputFile, order: RunOrder) -> OutputFile:
    if not (order.output_dir / output.name).is_file():
        raise ModelFailed(f"The model {order.request.model} left no {output.name}.", "The worker's log tells more.")
    return output


@dataclass
class _Start:
    """How a start went, as the peer's thread tells it."""

    settled: threading.Event
    gone: Gone | None = None

    def end(self, gone: Gone) -> None:
        if gone.ready and not gone.asked:
            log.warning("A group of ranks is gone: %s", gone.detail)
        self.gone = gone
        self.settled.set()


class GroupProcesses:
    """The processes of one model; one group at a time. `start` and `run` are for whoever holds the device, or loads."""

    def __init__(self, model: str, group: RankGroup, request: LoadRequest) -> None:
        self._model = model
        arguments = RankArguments(group.entry, request.folder, request.device, request.dtype)
        self._command = command(group.launcher, group.ranks, arguments)
        self._lock = threading.Lock()  # guards the two below
        self._peer: PeerHost | None = None
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether there is a group that takes orders."""
        peer = self._peer
        return peer is not None and not peer.gone and peer.health().ok

    @property
    def pid(self) -> int | None:
        """Rank 0's."""
        peer = self._peer
        return None if peer is None else peer.pid

    def start(self) -> None:
        """Start the group, and wait until every rank has its model.

        Raises Interrupted when the job whose thread this is is to stop, what a rank told of, or ModelFailed.
        """
        if (dying := self._peer) is not None:
            dying.end_by_force("another takes its place")
            dying.close()
        start = _Start(threading.Event())
        try:
            peer = PeerHost(
                f"ranks-{self._model}",
                self._command,
                None,
                env=_environment(),
                on_line=self._told,
                on_ready=start.settled.set,
                on_gone=start.end,
            )
        except OSError as error:
            raise ModelFailed(
                f"The processes of {self._model} could not be started.", "The worker's host is short of them."
            ) from error
        with self._lock:
            self._peer = peer
            closed = self._closed
        job = current_job()
        try:
            with nullcontext() if job is None else job.woken_by(start.settled.set):
                ready = not closed and start.settled.wait(START_PATIENCE_S)
            if job is not None:
                job.check()
            if ready and peer.pid is not None and start.gone is None:
                return
        except BaseException:
            peer.end_by_force("not wanted any more")
            raise
        peer.end_by_force("not ready in time")
        if start.gone is not None and start.gone.error is not None:
            raise error_from(start.gone.error)
        log.error("the processes of %s did not start: %s", self._model, start.gone and start.gone.detail)
        raise ModelFailed(f"The processes of {self._model} did not start.", "The worker's log has what they told.")

    def run(self, order: RunOrder, job: JobContext) -> RunOutcome:
        """Give the order to the group, and pass on what it tells, until it is done with it."""
        peer = self._peer
        assert peer is not None, "a group is started before it runs anything"
        heard: queue.SimpleQueue[HostEvent | RunOutcome | None] = queue.SimpleQueue()
        peer.submit(order, heard.put).add_done_callback(lambda future: heard.put(future.result()))
        deadline_s: float | None = None
        with job.woken_by(lambda: heard.put(None)):
            while True:
                try:
                    news = heard.get(timeout=None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0))
                except queue.Empty:
                    peer.end_by_force(f"it did not stop within {STOP_PATIENCE_S:g} s")
                    deadline_s = None
                    continue
                if isinstance(news, HostEvent):
                    _pass_on(news, job)
                elif news is not None:
                    return news
                else:
                    peer.interrupt(order.job_id, InterruptReason.CANCEL)
                    deadline_s = time.monotonic() + STOP_PATIENCE_S

    def close(self) -> None:
        """End the group. Idempotent."""
        with self._lock:
            self._closed = True
            peer = self._peer
        if peer is not None:
            peer.close(CLOSE_PATIENCE_S)

    def _told(self, line: str) -> None:
        log.debug("%s: %s", self._model, line)


def _pass_on(event: HostEvent, job: JobContext) -> None:
    step, total = event.data.get("step"), event.data.get("total")
    if event.event is EventName.STAGE_PROGRESS and isinstance(step, int) and isinstance(total, int):
        job.step(step, total)


def _environment() -> dict[str, str]:
    """This process's own, without the project's settings, which may hold secrets and are none of a rank's."""
    own = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "true",
        # The ranks are of one host; what they say to each other is nobody else's to hear.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    return environment_without_settings() | own
