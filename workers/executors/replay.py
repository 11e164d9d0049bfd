"""Takes a run to where a checkpoint was made, through the pipeline's own loop, without computing the steps on the way.

    step 1     computed as always: it shows what denoiser and scheduler answer, and whether the checkpoint fits
    to step k  neither is called: their answers of the first step are given again, whatever they are worth
    step k     latents, scheduler and generators are put back; from here on all is as in an unbroken run

So no pipeline needs to know of it: what one keeps beside these three, it makes again on the way.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from workers.checkpoints import CheckpointUnusable, read_checkpoint
from workers.chunks.calls import DeviceCall
from workers.context import JobContext
from workers.executors.denoising_state import DenoisingState, can_be_put_back, put_back

log = logging.getLogger(__name__)


class Replay:
    """One run's way to its checkpoint; over before it begins where the order has none, or none that fits.

    Used by the job's own thread alone.
    """

    def __init__(self, job: JobContext, scheduler: Any, generators: Sequence[torch.Generator], run: str) -> None:
        """`run` names what the checkpoint must be a state of."""
        self._job = job
        self._scheduler = scheduler
        self._generators = generators
        self._run = run
        self._content: bytes | None = None
        self._state: DenoisingState | None = None
        self._result: Any = None
        self._answers: dict[object, Any] = {}
        if (path := job.order.resume_from) is not None:
            try:
                self._content = read_checkpoint(path)
            except CheckpointUnusable as reason:
                _give_up(reason)
            else:
                job.stand_in = self._answer

    @property
    def under_way(self) -> bool:
        """Whether the run has yet to come to its checkpoint: nothing is computed meanwhile."""
        return self._state is not None

    def begins(self, total: int, result: Any) -> bool:
        """Whether the run, of whose `total` steps the first gave this result, goes on from a checkpoint."""
        if self._content is not None:
            self._state = self._fitting(self._content, total, result[0])
            self._content, self._result = None, result
            if self._state is None:
                self._end()
        return self.under_way

    def passed(self, step: int) -> Any:
        """What the pipeline gets as the result of `step`; with the checkpoint's own, the replay is over."""
        state, result = self._state, self._result
        assert state is not None, "asked only while under way"
        if step < state.step:
            return result
        put_back(state, self._scheduler, self._generators)
        self._end()
        self._job.resumed(step, state.total)
        return _with_latents(result, state.latents)

    def _fitting(self, content: bytes, total: int, latents: torch.Tensor) -> DenoisingState | None:
        try:
            state = DenoisingState.decode(content, latents.device)
            if state.run != self._run or state.total != total or not 0 < state.step < total:
                raise CheckpointUnusable("it is of another run")
            if (state.latents.shape, state.latents.dtype) != (latents.shape, latents.dtype):
                raise CheckpointUnusable("its latents are of another form")
            if len(state.generators) != len(self._generators):
                raise CheckpointUnusable("it is of another number of pictures")
            if not can_be_put_back(state, self._scheduler, self._generators):
                raise CheckpointUnusable("it holds what no run leaves behind")
        except CheckpointUnusable as reason:
            _give_up(reason)
            return None
        return state

    def _answer(self, call: DeviceCall, stage: str | None) -> Any:
        """Stand in for the denoiser: only a call of a form that has not been answered yet is made."""
        form = id(call.module), _form(call.args), _form(call.kwargs)
        if self._state is not None and form in self._answers:
            return self._answers[form]
        self._answers[form] = answer = self._job.on_device(call, stage)
        return answer

    def _end(self) -> None:
        self._state = self._result = None
        self._answers.clear()
        self._job.stand_in = None


def _give_up(reason: CheckpointUnusable) -> None:
    log.warning("the run begins anew, its checkpoint is of no use: %s", reason, exc_info=reason.__cause__)


def _form(value: object) -> object:
    """All of a call's argument that decides what form its answer has; numbers that steps differ in do not."""
    match value:
        case torch.Tensor():
            return value.shape, value.dtype
        case dict():
            return tuple((name, _form(each)) for name, each in value.items())
        case list() | tuple():
            return tuple(_form(each) for each in value)
        case bool() | int() | str() | None:
            return value
    return type(value)


def _with_latents(result: Any, latents: torch.Tensor) -> Any:
    """What a scheduler's step gives, with other latents: a tuple or an output object, whose first is they."""
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result
