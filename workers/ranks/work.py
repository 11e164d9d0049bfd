"""What every rank does with a job: run the model's part of it, in step with the others."""

import logging
import queue
from collections.abc import Sequence
from dataclasses import dataclass

from omnirt_tasks.contract import ErrorInfo, ExecutionMode
from omnirt_tasks.errors import ModelFailed, OmnirtError
from omnirt_tasks.registry import RankJob, RankModel, RankOutput
from workers.host import (
    InterruptReason,
    OutputFile,
    RunFacts,
    RunFailed,
    RunInterrupted,
    RunLost,
    RunOrder,
    RunOutcome,
    RunSucceeded,
)
from workers.ranks.circle import Circle, OutOfStep
from workers.ranks.host import RankHost

log = logging.getLogger(__name__)

BEAT_S = 60.0
"""How often the others hear of rank 0 while there is nothing to do; well within the timeout of a collective."""


class Stopped(BaseException):
    """The job is to stop; no Exception, so that a model's own handlers let it pass."""

    def __init__(self, reason: InterruptReason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class _Ask:
    """What rank 0 says to all: run this, or go on waiting, or (neither) leave."""

    order: RunOrder | None = None
    wait: bool = False


def work(model: RankModel, circle: Circle, host: RankHost | None) -> None:
    """Run jobs until rank 0 says to leave; `host` is rank 0's. Raises OutOfStep when the ranks lost each other."""
    while True:
        ask: _Ask = circle.share(_next(host) if host is not None else None)
        if ask.order is not None:
            _work_off(ask.order, model, circle, host)
        elif not ask.wait:
            return


def _next(host: RankHost) -> _Ask:
    try:
        return _Ask(host.next_order(BEAT_S))
    except queue.Empty:
        return _Ask(wait=True)


def _work_off(order: RunOrder, model: RankModel, circle: Circle, host: RankHost | None) -> None:
    def tell(step: int, total: int) -> None:
        reason = circle.share(host.told(step, total) if host is not None else None)
        if reason is not None:
            raise Stopped(reason)

    request = order.request
    job = RankJob(request.task, request.inputs, request.config, order.files, order.output_dir, tell)
    outputs: Sequence[RankOutput] = ()
    stopped: Stopped | None = None
    failure: ErrorInfo | None = None
    try:
        outputs = model.run(job)
    except Stopped as told:
        stopped = told
    except Exception as error:
        log.exception("rank %s: the model's code failed", circle.rank)
        failure = explained(error)
    try:
        failure = circle.settle(failure)
    except OutOfStep as error:
        if host is not None:
            # Not what the death of another rank brings about: its launcher ends this one too, long before.
            culprit = error.failure or failure
            lost = RunLost(f"The ranks of the group lost each other: {error}.")
            host.ended(lost if culprit is None else RunFailed(culprit), group_ends=True)
        raise
    if host is not None:
        host.ended(_outcome(circle, host, outputs, stopped, failure))


def _outcome(
    circle: Circle,
    host: RankHost,
    outputs: Sequence[RankOutput],
    stopped: Stopped | None,
    failure: ErrorInfo | None,
) -> RunOutcome:
    if failure is not None:
        return RunFailed(failure)
    if stopped is not None:
        return RunInterrupted(stopped.reason)
    files = tuple(
        OutputFile(
            name=output.name,
            index=index,
            kind=output.kind,
            mime=output.mime,
            width=output.width,
            height=output.height,
            num_frames=output.num_frames,
        )
        for index, output in enumerate(outputs)
    )
    device = host.capability().device
    placement = {f"rank {rank}": device_of(device, rank) for rank in range(circle.ranks)}
    return RunSucceeded(files, RunFacts(ExecutionMode.PERSISTENT_WORKER, {}, (), placement))


def device_of(device: str, rank: int) -> str:
    """The device of a rank, in a group that begins at `device`: the CPU is all ranks', others are counted on."""
    kind, _, number = device.partition(":")
    return kind if kind == "cpu" else f"{kind}:{int(number or 0) + rank}"


def explained(error: Exception) -> ErrorInfo:
    """What the job's caller is told of an error of the model's."""
    if isinstance(error, OmnirtError):
        return error.info()
    return ModelFailed(
        f"The model's code raised {type(error).__name__}.", "The worker's log has the whole story."
    ).info()
