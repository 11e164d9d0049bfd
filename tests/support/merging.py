"""Jobs on tiny models of the real classes that share device calls as often as can be, and the numbers they make.

Everything is real but for the limits: as many rows fit into a call as there are, and it is waited for who is late.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omnirt_tasks.contract import EventName, ExecutionMode, Inputs, ResolvedRequest, Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import JobError
from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec, discover
from workers.backends import driver
from workers.checkpoints import CheckpointWriter
from workers.chunks.calls import DeviceCall
from workers.chunks.limits import MeasureKey
from workers.context import Interrupted, JobContext
from workers.device import DeviceThread
from workers.executors import LoadedModel
from workers.executors.legacy_call import LegacyCallExecutor
from workers.executors.modular import ModularExecutor
from workers.host import HostEvent, InterruptReason, OnEvent, RunOrder

RUN_TIMEOUT_S = 30.0
# A quarter of it is waited for who is late.
EXPECTED_S = 1.0
ROWS_MAX = 64


class Generous:
    """Limits that have all calls share which can."""

    def rows_max(self, key: MeasureKey) -> int:
        del key
        return ROWS_MAX

    def expected_s(self, key: MeasureKey, rows: int) -> float:
        del key, rows
        return EXPECTED_S

    def note(self, key: MeasureKey, rows: int, elapsed_s: float) -> None:
        del key, rows, elapsed_s

    def note_too_large(self, key: MeasureKey, rows: int) -> None:
        raise AssertionError(f"{rows} rows of {key} did not fit")


@dataclass(frozen=True)
class Wish:
    """What a job asks for; `options` are further ones, as pairs. A `spoilt` one has NaN decoded.

    It denoises from the step `begins_at` of the first job on, and leaves at its own step `leaves_at`.
    """

    seed: int = 5
    steps: int = 3
    prompt: str | tuple[str, ...] = "a red circle"
    negative_prompt: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    begins_at: int = 0
    leaves_at: int | None = None
    spoilt: bool = False

    @property
    def alone(self) -> "Wish":
        """The same job with nobody beside it, to its end."""
        return replace(self, begins_at=0, leaves_at=None)


@dataclass(frozen=True)
class Drawn:
    """What a job made, by which device calls, and the most and the mean number of jobs that these were of.

    `latents` are what was decoded, `numbers` what came of it; None if it left before, or failed with `error`.
    """

    latents: Any
    numbers: Any
    calls: tuple[DeviceCall, ...]
    largest: int
    mean: float
    error: JobError | None = None


class _Scene:
    """Who denoises from when on: those of the start from the same moment, others from a step of the first job."""

    def __init__(self, wishes: Sequence[Wish]) -> None:
        self._wishes = wishes
        self._changed = threading.Condition()
        self._not_ready = set(range(len(wishes)))
        self._step = 0  # of the first job

    def follow(self, place: int, event: HostEvent, leave: Callable[[], None]) -> None:
        """What a job does at an event of its own, in its thread: wait for its moment, let others begin, leave."""
        wish = self._wishes[place]
        match event.event, event.stage:
            case EventName.STAGE_START, "denoise":
                self._note(place)
                with self._changed:
                    assert self._changed.wait_for(
                        lambda: not self._not_ready and self._step >= wish.begins_at, RUN_TIMEOUT_S
                    )
            case EventName.STAGE_PROGRESS, "denoise":
                step = event.data["step"]
                assert isinstance(step, int)
                if step == wish.leaves_at:
                    leave()
                self._note(place, step)

    def end(self, place: int) -> None:
        """Have nobody wait for the job."""
        self._note(place, self._wishes[place].steps)

    def _note(self, place: int, step: int = 0) -> None:
        with self._changed:
            self._not_ready.discard(place)
            if place == 0:
                self._step = step
            self._changed.notify_all()


class _Job(JobContext):
    """A run that keeps its calls."""

    def __init__(self, wish: Wish, order: RunOrder, device: DeviceThread, on_event: OnEvent) -> None:
        super().__init__(order, device, on_event)
        self._wish = wish
        self.calls: list[DeviceCall] = []

    def on_device(self, call: DeviceCall, stage: str | None = None) -> Any:
        if call.part.endswith(".decode") and self._wish.spoilt:
            call = replace(call, kwargs={**call.kwargs, "z": call.kwargs["z"] * float("nan")})
        self.calls.append(call)
        return super().on_device(call, stage)

    @property
    def latents(self) -> Any:
        """What was decoded."""
        return next((call.kwargs["z"] for call in self.calls if call.part.endswith(".decode")), None)


class _KeepsNumbers:
    """Numbers by job id."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}


class _Classic(LegacyCallExecutor, _KeepsNumbers):
    def _call(self, shared: Any, order: RunOrder, job: JobContext, checkpoints: CheckpointWriter) -> Any:
        self.numbers[order.job_id] = numbers = super()._call(shared, order, job, checkpoints)
        return numbers


class _Modular(ModularExecutor, _KeepsNumbers):
    def _call(self, shared: Any, order: RunOrder, job: JobContext, checkpoints: CheckpointWriter) -> Any:
        self.numbers[order.job_id] = numbers = super()._call(shared, order, job, checkpoints)
        return numbers


class Studio:
    """A model on a device thread, and jobs on it; `dtype` is what its weights are turned into ("float64")."""

    def __init__(self, model: str, folder: Path, tmp_path: Path, *, mode: ExecutionMode, dtype: str) -> None:
        self.model = model
        self.mode = mode
        self.dtype = dtype
        self._spec: ModelSpec = replace(discover().find(model), execution_mode=mode)
        self._tmp_path = tmp_path
        self._numbers = itertools.count(1)
        self._alone: dict[Wish, Drawn] = {}
        self._executor = _Modular() if mode is ExecutionMode.MODULAR else _Classic()
        self._device = DeviceThread(driver("cpu", torch_threads=1), limits=Generous())
        self.loaded: LoadedModel = self._load(folder, dtype)

    def alone(self, wish: Wish) -> Drawn:
        """What the job makes alone; made once."""
        wish = wish.alone
        if wish not in self._alone:
            (self._alone[wish],) = self.together([wish])
        return self._alone[wish]

    def together(self, wishes: Sequence[Wish]) -> list[Drawn]:
        """What each of the jobs makes when they run at the same time; raises what one raises."""
        scene = _Scene(wishes)
        with ThreadPoolExecutor(len(wishes), thread_name_prefix="omnirt-test-job") as pool:
            return list(pool.map(partial(self._run, scene), range(len(wishes)), wishes))

    def close(self) -> None:
        assert self._device.close()

    def _load(self, folder: Path, dtype: str) -> LoadedModel:
        import torch

        family = self._spec.loader
        assert family is not None

        def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
            loaded = family(spec, request)
            assert isinstance(loaded, DiffusersModel)
            for component in loaded.components.values():
                if isinstance(component, torch.nn.Module):
                    component.to(getattr(torch, dtype))
            return loaded

        request = LoadRequest(folder=folder, device="cpu", dtype="fp32")
        return self._executor.load(replace(self._spec, loader=load), request)

    def _run(self, scene: _Scene, place: int, wish: Wish) -> Drawn:
        order = self._order(wish)

        def on_event(event: HostEvent) -> None:
            scene.follow(place, event, lambda: job.interrupt(InterruptReason.CANCEL))

        job = _Job(wish, order, self._device, on_event)
        error: JobError | None = None
        try:
            with job.entered():
                self._executor.run(self.loaded, order, job)
        except Interrupted:
            assert wish.leaves_at is not None
        except JobError as failed:
            error = failed
        finally:
            scene.end(place)
        return Drawn(
            job.latents,
            _tensor(self._executor.numbers.pop(order.job_id, None)),
            tuple(job.calls),
            job.member.largest,
            job.member.mean,
            error,
        )

    def _order(self, wish: Wish) -> RunOrder:
        number = next(self._numbers)
        output_dir = self._tmp_path / f"outputs-{number}"
        output_dir.mkdir()
        its = self._spec.tasks[Task.TEXT2IMAGE].options
        config: JsonObject = {
            **{name: option.default for name, option in its.items()},
            "width": 64,
            "height": 64,
            "scheduler": "native",
            **dict(wish.options),
            "seed": wish.seed,
            "num_inference_steps": wish.steps,
        }
        inputs = Inputs(prompt=wish.prompt, negative_prompt=wish.negative_prompt)
        request = ResolvedRequest(task=Task.TEXT2IMAGE, model=self.model, backend="cpu", inputs=inputs, config=config)
        return RunOrder(f"job-{number}", 1, request, output_dir)


def _tensor(numbers: Any) -> Any:
    """The pictures as one tensor; some pipelines give a list."""
    import torch

    return torch.stack(numbers) if isinstance(numbers, list) else numbers
