"""What a host does with its models: load, refuse, evict, warm up, and tell of it; on real classes with tiny weights."""

import dataclasses
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import EventName, Task
from omnirt_tasks.errors import ConfigurationError, ModelFailed
from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec, discover
from omnirt_tasks.registry.footprint import weights_bytes_by_dtype
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Recorder
from tests.support.outcomes import succeeded
from tests.support.tiny_models import save_tiny_sdxl
from tests.support.waiting import eventually
from workers.backends.cpu import CpuDriver
from workers.host import HostConfig, InterruptReason, RunFailed, RunInterrupted, RunOutcome
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BASE, TURBO = "sdxl-base-1.0", "sdxl-turbo"
BYTES_PER_PIXEL = 1_000
RUN_BYTES = BYTES_PER_PIXEL * 64 * 64  # of a picture, in whatever dtype
UNET_FILE = Path("unet") / "diffusion_pytorch_model.safetensors"


class HostBench(Bench):
    """A bench whose host is in this process."""

    host: ThreadHost


MakeBench = Callable[..., HostBench]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    """A folder of the test's own, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "weights"))


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Makes a host of the models in `folders`, and closes it."""
    hosts: list[ThreadHost] = []

    def make(
        folders: Mapping[str, Path],
        loader: Callable[[ModelSpec, LoadRequest], DiffusersModel] | None = None,
        **own: Any,
    ) -> HostBench:
        specs = [discover().find(model) for model in folders]
        specs = [
            dataclasses.replace(spec, working_bytes_per_pixel=BYTES_PER_PIXEL, loader=loader or spec.loader)
            for spec in specs
        ]
        host = ThreadHost(
            backend=own.pop("backend", None) or CpuDriver(torch_threads=1),
            models=specs,
            folders=folders,
            cache_size=own.pop("cache_size", 4),
            concurrency=8,
            **own,
        )
        hosts.append(host)
        return HostBench(host, BASE, tmp_path)

    yield make
    for host in hosts:
        host.close()


def size_of(folder: Path) -> int:
    return weights_bytes_by_dtype(folder, ["fp32"])["fp32"]


def discovered_load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """The family's own load."""
    loader = discover().find(spec.id).loader
    assert loader is not None
    loaded = loader(spec, request)
    assert isinstance(loaded, DiffusersModel)
    return loaded


def failed(outcome: RunOutcome, code: str) -> str:
    """What the run's error says."""
    assert isinstance(outcome, RunFailed), outcome
    assert outcome.error.code == code
    assert outcome.error.hint
    return f"{outcome.error.message} {outcome.error.hint}"


# Memory


def test_a_run_that_can_never_fit_fails_with_the_numbers_and_the_host_goes_on(
    make_bench: MakeBench, weights: Path
) -> None:
    bench = make_bench({BASE: weights}, memory_budget_bytes=size_of(weights) + int(1.5 * RUN_BYTES))
    told = failed(bench.run(num_images_per_prompt=2), "insufficient_memory")
    assert "needs" in told
    assert "available" in told
    assert "fewer pictures" in told
    assert bench.host.capability().loaded == ()
    three_in_slices = bench.run(num_images_per_prompt=3, vae_slicing=True, width=128)
    assert "vae_slicing" not in failed(three_in_slices, "insufficient_memory"), "it is on"
    succeeded(bench.run(num_images_per_prompt=1))


def test_models_that_do_not_fit_together_take_turns(make_bench: MakeBench, weights: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(weights, tmp_path / "other"))
    bench = make_bench({BASE: weights, TURBO: other}, memory_budget_bytes=int(1.5 * size_of(weights)) + RUN_BYTES)
    succeeded(bench.run(model=BASE))
    succeeded(bench.run(model=TURBO))
    assert bench.host.capability().loaded == (TURBO,)
    assert succeeded(bench.run(model=BASE)).facts.cache_hits == ()


def test_models_that_fit_together_both_stay(make_bench: MakeBench, weights: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(weights, tmp_path / "other"))
    bench = make_bench({BASE: weights, TURBO: other}, memory_budget_bytes=3 * size_of(weights) + RUN_BYTES)
    succeeded(bench.run(model=BASE))
    succeeded(bench.run(model=TURBO))
    assert bench.host.capability().loaded == (BASE, TURBO)
    bench.host.unload_idle()
    assert bench.host.capability().loaded == ()


class LingeringDriver(CpuDriver):
    """Keeps every run that has let go of its model until something was evicted, and then asks `whether_gone`."""

    def __init__(self, whether_gone: Callable[[], bool]) -> None:
        super().__init__(torch_threads=1)
        self._whether_gone = whether_gone
        self._evicted = threading.Event()
        self.gone: list[bool] = []

    def release(self) -> None:
        super().release()
        self.gone.append(self._whether_gone())
        self._evicted.set()

    def peak_memory_bytes(self) -> int | None:  # asked for the run's report, once the run has let go of its model
        assert self._evicted.wait(RUN_TIMEOUT_S)
        return super().peak_memory_bytes()


def test_a_run_that_is_nearly_over_holds_no_memory_of_a_model_that_was_evicted(
    make_bench: MakeBench, weights: Path, tmp_path: Path
) -> None:
    denoisers: list[weakref.ref[Any]] = []

    def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
        loaded = discovered_load(spec, request)
        denoisers.append(weakref.ref(loaded.components["unet"]))
        return loaded

    other = Path(shutil.copytree(weights, tmp_path / "other"))
    device = LingeringDriver(lambda: denoisers[0]() is None)
    bench = make_bench({BASE: weights, TURBO: other}, loader=load, cache_size=1, backend=device)
    nearly_over = bench.host.submit(bench.order(model=BASE), Recorder())
    eventually(lambda: denoisers)
    succeeded(bench.run(model=TURBO))
    succeeded(nearly_over.result(RUN_TIMEOUT_S))
    assert device.gone[0]


def test_the_budget_is_nine_tenths_of_the_device_unless_it_is_set(make_bench: MakeBench, weights: Path) -> None:
    capability = make_bench({BASE: weights}).host.capability()
    assert capability.memory_bytes is not None
    assert capability.memory_budget_bytes == int(0.9 * capability.memory_bytes)
    assert make_bench({BASE: weights}, memory_budget_bytes=2**30).host.capability().memory_budget_bytes == 2**30


# Weights that cannot be loaded


def spoil_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def spoil_bin(folder: Path) -> None:
    (folder / UNET_FILE).rename((folder / UNET_FILE).with_suffix(".bin"))


def spoil_cut_off(folder: Path) -> None:
    whole = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(whole[: len(whole) // 2])


def spoil_garbage(folder: Path) -> None:
    (folder / UNET_FILE).write_bytes(b"these are no weights at all")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_nothing_there, "are not on this worker"),
        (spoil_empty, "are not on this worker"),
        (spoil_bin, "of the component 'unet' are not safetensors"),
        (spoil_cut_off, f"{UNET_FILE.name} of the component 'unet' is corrupt or cut off"),
        (spoil_garbage, f"{UNET_FILE.name} of the component 'unet' is corrupt or cut off"),
    ],
)
def test_weights_that_are_not_whole_fail_their_jobs_alone_and_leave_no_half_of_a_model(
    make_bench: MakeBench, tiny: Path, weights: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(weights)
    bench = make_bench({BASE: weights, TURBO: tiny})
    told = failed(bench.run(model=BASE), "model_failed")
    assert says in told
    assert "OMNIRT_MODEL_FOLDERS" in told
    assert str(weights) not in told
    assert bench.host.capability().loaded == ()
    succeeded(bench.run(model=TURBO))
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(tiny, weights)
    succeeded(bench.run(model=BASE))  # mended, without a restart


def test_a_loader_that_fails_fails_its_job_alone_and_its_memory_is_given_back(
    make_bench: MakeBench, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench({BASE: weights}, loader=burst)
    released = threading.Event()
    monkeypatch.setattr(bench.host._driver, "release", released.set)
    assert "RuntimeError" in failed(bench.run(), "model_failed")
    assert released.is_set()
    assert bench.host.capability().loaded == ()


class LossyDriver(CpuDriver):
    """Loses the device with any ConnectionError."""

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, ConnectionError)


def test_a_device_that_is_lost_in_a_load_is_known_though_another_error_tells_of_it(
    make_bench: MakeBench, weights: Path
) -> None:
    bench = make_bench({BASE: weights}, loader=lose, backend=LossyDriver(torch_threads=1))
    failed(bench.run(), "model_failed")
    assert not bench.host.health().ok


def lose(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    raise ModelFailed("It did not load.", "Try again.") from ConnectionError("the device is gone")


def burst(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    raise RuntimeError("no such class")


# Loading is seen, and can be stopped


def slowly(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
    """A load of two parts, as far as is told."""
    request.loaded_part("first", 1, 2)
    loaded = discovered_load(spec, dataclasses.replace(request, loaded_part=lambda *_: None))
    request.loaded_part("second", 2, 2)
    return loaded


def test_a_load_is_told_part_by_part_and_a_later_run_has_nothing_to_tell(make_bench: MakeBench, weights: Path) -> None:
    bench = make_bench({BASE: weights}, loader=slowly)
    first, second = Recorder(), Recorder()
    succeeded(bench.run(recorder=first))
    succeeded(bench.run(recorder=second))
    assert load_progress(first) == [("first", 1, 2), ("second", 2, 2)]
    assert load_progress(second) == []


def load_progress(recorder: Recorder) -> list[tuple[Any, Any, Any]]:
    return [
        (event.data["module"], event.data["step"], event.data["total"])
        for event in recorder.events
        if event.event is EventName.STAGE_PROGRESS and event.stage == "load"
    ]


def test_a_cancel_ends_a_load_and_one_that_waits_for_the_model_loads_it(make_bench: MakeBench, weights: Path) -> None:
    loading, cancelled = threading.Event(), threading.Event()

    def load(spec: ModelSpec, request: LoadRequest) -> DiffusersModel:
        if not loading.is_set():
            loading.set()
            assert cancelled.wait(RUN_TIMEOUT_S)
        return slowly(spec, request)

    bench = make_bench({BASE: weights}, loader=load)
    doomed = bench.host.submit(bench.order(job_id="doomed"), Recorder())
    assert loading.wait(RUN_TIMEOUT_S)
    patient = bench.host.submit(bench.order(), Recorder())
    eventually(lambda: next(iter(bench.host._cache._entries.values())).pins == 2)
    bench.host.interrupt("doomed", InterruptReason.CANCEL)
    cancelled.set()
    assert doomed.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.CANCEL)
    succeeded(patient.result(RUN_TIMEOUT_S))


# Warm-up


def test_models_named_for_it_are_loaded_before_the_first_job(make_bench: MakeBench, weights: Path) -> None:
    bench = make_bench({BASE: weights}, warm_up=(BASE,))
    bench.host.warm_up()
    assert bench.host.capability().loaded == (BASE,)
    assert succeeded(bench.run()).facts.cache_hits == ("model",)


def test_a_warm_up_raises_what_fails(make_bench: MakeBench, weights: Path) -> None:
    spoil_cut_off(weights)
    with pytest.raises(ModelFailed, match="corrupt or cut off"):
        make_bench({BASE: weights}, warm_up=(BASE,)).host.warm_up()


def test_a_warm_up_that_a_later_model_undoes_is_told(make_bench: MakeBench, weights: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(weights, tmp_path / "other"))
    room_bytes = int(1.5 * size_of(weights))
    bench = make_bench({BASE: weights, TURBO: other}, warm_up=(BASE, TURBO), memory_budget_bytes=room_bytes)
    with pytest.raises(ConfigurationError, match=f"{BASE} had to go") as refused:
        bench.host.warm_up()
    assert refused.value.hint is not None
    assert "OMNIRT_MEMORY_BUDGET_BYTES" in refused.value.hint


def test_more_models_to_warm_up_than_are_kept_are_refused(make_bench: MakeBench, weights: Path) -> None:
    with pytest.raises(ConfigurationError, match="2 models") as refused:
        make_bench({BASE: weights, TURBO: weights}, warm_up=(BASE, TURBO), cache_size=1)
    assert refused.value.hint is not None
    assert "OMNIRT_PIPELINE_CACHE_SIZE" in refused.value.hint


# What is told


def test_what_weights_take_is_told_once_they_are_mended(make_bench: MakeBench, tiny: Path, weights: Path) -> None:
    spoil_cut_off(weights)
    bench = make_bench({BASE: weights})
    assert bench.host.capability().abilities[BASE].weights_bytes == {}
    shutil.rmtree(weights)
    shutil.copytree(tiny, weights)
    assert bench.host.capability().abilities[BASE].weights_bytes["fp32"] == size_of(weights)


def test_the_capability_tells_what_each_model_can_do_here(make_bench: MakeBench, weights: Path) -> None:
    bench = make_bench({BASE: weights})
    ability = bench.host.capability().abilities[BASE]
    assert set(ability.tasks) == {Task.TEXT2IMAGE, Task.IMAGE2IMAGE, Task.INPAINT}
    assert ability.execution_mode is discover().find(BASE).execution_mode
    assert ability.dtypes == ("fp32", "bf16")
    assert {"strength", "num_inference_steps", "dtype"} <= set(ability.options)
    assert ability.weights_bytes == weights_bytes_by_dtype(weights, ["fp32", "bf16"])
    assert ability.working_bytes_per_pixel == BYTES_PER_PIXEL
    assert (ability.working_dtype, ability.tile_px) == ("fp32", 1024)
    assert ability.seconds_per_unit is None
    succeeded(bench.run())
    measured = bench.host.capability().abilities[BASE].seconds_per_unit
    assert measured is not None
    assert measured > 0


def test_the_device_is_told_to_a_job_that_may_choose_one(make_bench: MakeBench, weights: Path) -> None:
    bench = make_bench({BASE: weights})
    assert succeeded(bench.run(device="auto")).facts.config_used == {"device": "cpu:0"}
    order = bench.order()
    unasked = {name: value for name, value in order.request.config.items() if name != "device"}
    order = dataclasses.replace(order, request=order.request.model_copy(update={"config": unasked}))
    assert succeeded(bench.run(order)).facts.config_used == {}


def test_a_host_is_made_from_plain_values() -> None:
    shapes = discover().find("shapes")
    assert shapes.weights is not None
    host = ThreadHost.from_config(
        HostConfig(
            backend="cpu",
            device="cpu:3",
            models=("shapes",),
            folders={"shapes": shapes.weights},
            cache_size=1,
            concurrency=3,
            torch_threads=1,
            memory_budget_bytes=2**30,
            warm_up=("shapes",),
        )
    )
    try:
        host.warm_up()
        capability = host.capability()
    finally:
        host.close()
    assert (capability.device, capability.models, capability.loaded) == ("cpu:3", ("shapes",), ("shapes",))
    assert (capability.concurrency, capability.memory_budget_bytes) == (3, 2**30)
