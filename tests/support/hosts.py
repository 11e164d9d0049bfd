"""Thread hosts for tests: the stub, and tiny models of the real classes; one way to order a picture from any."""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omnirt_tasks.contract import EventName, ExecutionMode, Inputs, ResolvedRequest, Task
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec, discover
from omnirt_tasks.registry.spec import Checkpointing
from workers.backends import driver
from workers.host import DeviceHost, HostEvent, RunOrder, RunOutcome
from workers.thread_host import ThreadHost

RUN_TIMEOUT_S = 30.0

# What a test orders unless it says otherwise: quick, and the same each time.
QUICK: JsonObject = {
    "seed": 5,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "width": 64,
    "height": 64,
    "scheduler": "native",
    "dtype": "fp32",
}


class Recorder:
    """Keeps a run's events in order; `on` runs an action in the run's own thread when an event of that name comes."""

    def __init__(self) -> None:
        self.events: list[HostEvent] = []
        self._actions: list[tuple[EventName, int, Callable[[], object]]] = []

    def __call__(self, event: HostEvent) -> None:
        self.events.append(event)
        seen = len(self.named(event.event))
        for name, count, action in self._actions:
            if name is event.event and count == seen and event in self.named(name):
                action()

    def on(self, name: EventName, action: Callable[[], object], *, count: int = 1) -> "Recorder":
        """Run the action at the `count`-th event of this name."""
        self._actions.append((name, count, action))
        return self

    def named(self, name: EventName) -> list[HostEvent]:
        """The events of this name; of progress, the job's own steps alone, and not its model's loading."""
        loading = EventName.STAGE_PROGRESS, "load"
        return [event for event in self.events if event.event is name and (event.event, event.stage) != loading]

    @property
    def progress(self) -> list[tuple[Any, Any]]:
        """(step, total) of each step."""
        return [(event.data["step"], event.data["total"]) for event in self.named(EventName.STAGE_PROGRESS)]

    @property
    def stages(self) -> list[str]:
        return [event.stage for event in self.named(EventName.STAGE_START)]


class Bench:
    """A host with one model, and orders for it."""

    def __init__(self, host: DeviceHost, model: str, tmp_path: Path) -> None:
        self.host = host
        self.model = model
        self._tmp_path = tmp_path
        self._numbers = itertools.count(1)

    def order(
        self,
        *,
        prompt: str = "a red circle",
        task: Task = Task.TEXT2IMAGE,
        files: Mapping[str, Path] | None = None,
        preview_every_steps: int = 0,
        job_id: str | None = None,
        attempt: int = 1,
        model: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> RunOrder:
        """An order of a 64x64 picture in 4 steps with seed 5, unless `config` says otherwise.

        Every other option, and every input that is a number, has the model's default.
        """
        number = next(self._numbers)
        output_dir = self._tmp_path / f"outputs-{number}"
        output_dir.mkdir()
        model = model or self.model
        its = discover().find(model).tasks[task]
        options: JsonObject = {name: QUICK.get(name, option.default) for name, option in its.options.items()}
        numbers = {name: option.default for name, option in its.numbers.items()}
        request = ResolvedRequest(
            task=task,
            model=model,
            backend=self.host.capability().backend,
            inputs=Inputs.model_validate({"prompt": prompt, **numbers, **(inputs or {})}),
            config=options | config,
        )
        return RunOrder(job_id or f"job-{number}", attempt, request, output_dir, dict(files or {}), preview_every_steps)

    def run(self, order: RunOrder | None = None, recorder: Recorder | None = None, **wishes: Any) -> RunOutcome:
        """Run an order to its end."""
        order = order or self.order(**wishes)
        return self.host.submit(order, recorder or Recorder()).result(RUN_TIMEOUT_S)


def stub_bench(tmp_path: Path, *, cache_size: int = 2, spec: Mapping[str, Any] | None = None, **options: Any) -> Bench:
    """A host of the stub; `spec` overrides fields of its spec, `options` go to the host."""
    stub = dataclasses.replace(discover().find("stub"), **(spec or {}))
    host = ThreadHost(
        backend=driver("cpu-stub"),
        models=[stub],
        folders={},
        cache_size=cache_size,
        concurrency=8,
        **options,
    )
    return Bench(host, stub.id, tmp_path)


class Loads:
    """The families' own loaders, keeping what they loaded, so that a test can look at the modules or spoil them."""

    def __init__(self, dtype: str | None = None) -> None:
        self._dtype = dtype
        self.pipelines: list[Mapping[Task, Any]] = []
        self.threads: list[str] = []

    def __call__(self, spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
        if self._dtype is not None:
            request = dataclasses.replace(request, dtype=self._dtype)
        load = discover().find(spec.id).loader
        assert load is not None
        loaded = load(spec, request)
        assert isinstance(loaded, DiffusersModel)
        self.pipelines.append(loaded.by_task)
        self.threads.append(threading.current_thread().name)
        return loaded

    @property
    def module(self) -> Any:
        """The pipeline that was loaded last."""
        return next(iter(self.pipelines[-1].values()))


def family_bench(
    tmp_path: Path,
    model_id: str,
    folder: Path,
    *,
    mode: ExecutionMode | None = None,
    cache_size: int = 2,
    dtype: str | None = None,
    more: Mapping[str, Path] | None = None,
    checkpointing: Checkpointing | None = None,
) -> tuple[Bench, Loads]:
    """A host of a model with the weights of `folder`, loaded by its family's own loader; `more` has further models.

    `mode` overrides the spec's way to run it, `checkpointing` what it keeps; `dtype` what the device can do.
    """
    catalog = discover()
    loads = Loads(dtype)
    folders = {model_id: folder, **(more or {})}
    models = [
        dataclasses.replace(
            spec,
            loader=loads,
            execution_mode=mode or spec.execution_mode,
            checkpointing=checkpointing or spec.checkpointing,
        )
        for spec in map(catalog.find, folders)
    ]
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1),
        models=models,
        folders=folders,
        cache_size=cache_size,
        concurrency=8,
    )
    return Bench(host, model_id, tmp_path), loads


def sdxl_bench(tmp_path: Path, folder: Path, **wishes: Any) -> tuple[Bench, Loads]:
    """A host of `sdxl-base-1.0`; see `family_bench`."""
    return family_bench(tmp_path, "sdxl-base-1.0", folder, **wishes)
