"""Each kind of device runs a tiny model, agrees with the CPU, and gives memory back; skipped where there is none."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from omnirt_tasks.registry import discover
from tests.support.hosts import Bench, Recorder
from tests.support.tiny_models import save_tiny_sdxl
from workers.backends import DeviceInfo, driver
from workers.backends.probing import probe_apart
from workers.host import RunFailed, RunOrder, RunOutcome, RunSucceeded
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BASE, TURBO = "sdxl-base-1.0", "sdxl-turbo"
MIB = 2**20
# Cold kernels, and torch.compile's first call.
RUN_TIMEOUT_S = 300.0
# The mean difference of a colour from the CPU's in fp32, of 255: what fewer digits come to. Another seed makes 52.
TOLERANCE = {"fp32": 0.5, "fp16": 1.0, "bf16": 2.0}


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.hardware("cuda")),
        pytest.param("ascend", marks=pytest.mark.hardware("ascend")),
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that has a device here."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "other", seed=8)


@contextmanager
def bench_on(device: str, tmp_path: Path, folder: Path, *, cache_size: int = 2, **more: Path) -> Iterator[Bench]:
    """A host of this device with `sdxl-base-1.0` from `folder`; `turbo` has a second model's."""
    folders = {BASE: folder} | ({TURBO: more["turbo"]} if more else {})
    host = ThreadHost(
        backend=driver(device.rpartition(":")[0], device, torch_threads=1),
        models=[discover().find(model) for model in folders],
        folders=folders,
        cache_size=cache_size,
        concurrency=4,
    )
    home = tmp_path / device.replace(":", "-")
    home.mkdir()
    try:
        yield Bench(host, BASE, home)
    finally:
        host.close()


def run(bench: Bench, **wishes: Any) -> tuple[RunOrder, RunOutcome]:
    order = bench.order(**wishes)
    return order, bench.host.submit(order, Recorder()).result(RUN_TIMEOUT_S)


def picture(bench: Bench, **wishes: Any) -> Image.Image:
    order, outcome = run(bench, **wishes)
    assert isinstance(outcome, RunSucceeded), outcome
    with Image.open(order.output_dir / "0.png") as stored:
        return stored.convert("RGB")


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def devices(backend: str) -> tuple[DeviceInfo, ...]:
    return driver(backend).probe()


def memory_of(backend: str) -> Any:
    """The part of torch that counts the device's memory: its functions have the same names for every backend."""
    if backend == "ascend":
        return importlib.import_module("torch_npu").npu
    import torch

    return torch.cuda


def test_a_worker_finds_the_devices_that_torch_finds(backend: str) -> None:
    assert probe_apart(backend) == devices(backend)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_device_draws_what_the_cpu_draws(backend: str, dtype: str, tmp_path: Path, weights: Path) -> None:
    info = devices(backend)[0]
    if dtype not in info.dtypes:
        pytest.skip(f"{info.name} does not compute in {dtype}")
    with bench_on("cpu:0", tmp_path, weights) as cpu:
        expected = picture(cpu, dtype="fp32")

    with bench_on(info.device, tmp_path, weights) as bench:
        drawn, again = picture(bench, dtype=dtype), picture(bench, dtype=dtype)

    assert mean_difference(drawn, expected) <= TOLERANCE[dtype]
    assert mean_difference(drawn, again) == 0, "the same seed, the same picture"


def test_the_peak_of_a_run_and_the_memory_left_are_told(backend: str, tmp_path: Path, weights: Path) -> None:
    info = devices(backend)[0]

    with bench_on(info.device, tmp_path, weights) as bench:
        _, outcome = run(bench, dtype="fp16")
        memory = driver(backend, info.device).memory()

    assert isinstance(outcome, RunSucceeded), outcome
    assert outcome.facts.peak_memory_bytes is not None
    assert outcome.facts.peak_memory_bytes > size_on_disk(weights) // 2  # it was saved in fp32
    assert memory is not None
    assert 0 < memory.free_bytes < memory.total_bytes


def test_a_run_that_finds_no_memory_fails_alone_and_the_next_succeeds(
    backend: str, tmp_path: Path, weights: Path
) -> None:
    info = devices(backend)[0]
    with bench_on(info.device, tmp_path, weights) as bench:
        before = picture(bench, dtype="fp16")

        with at_most_more(8 * MIB, backend, info):
            _, outcome = run(bench, dtype="fp16", width=1024, height=1024)

        assert isinstance(outcome, RunFailed), outcome
        assert outcome.error.code == "out_of_memory"
        assert mean_difference(picture(bench, dtype="fp16"), before) == 0


def test_an_evicted_model_leaves_nothing_on_the_device(
    backend: str, tmp_path: Path, weights: Path, other_weights: Path
) -> None:
    info = devices(backend)[0]
    memory = memory_of(backend)
    with bench_on(info.device, tmp_path, weights, cache_size=1, turbo=other_weights) as bench:

        def held_bytes(model: str) -> int:
            """What the device holds once this model has evicted the other."""
            picture(bench, dtype="fp16", model=model)
            assert bench.host.capability().loaded == (model,)
            return int(memory.memory_allocated(driver(backend, info.device).torch_device))

        held_bytes(BASE), held_bytes(TURBO)  # the libraries' own work spaces are there from now on
        swaps = [held_bytes(model) for model in (BASE, TURBO, BASE, TURBO)]

    size_bytes = size_on_disk(weights) // 2
    assert max(swaps) - min(swaps) < size_bytes // 2, "two models of one size, and one at a time"
    left_bytes = int(memory.memory_allocated(driver(backend, info.device).torch_device))
    assert left_bytes <= swaps[-1] - size_bytes // 2, "the last one goes with its host"


def test_two_devices_of_a_host_work_side_by_side(backend: str, tmp_path: Path, weights: Path) -> None:
    found = devices(backend)
    if len(found) < 2:
        pytest.skip(f"one {backend} device on this machine")
    with (
        bench_on(found[0].device, tmp_path, weights) as first,
        bench_on(found[1].device, tmp_path, weights) as second,
        ThreadPoolExecutor(2) as both,
    ):
        drawing: list[Callable[[], Image.Image]] = [lambda: picture(first), lambda: picture(second)]
        one, other = both.map(lambda draw: draw(), drawing)

    assert mean_difference(one, other) <= TOLERANCE["fp32"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.leaks("the compiler keeps processes of its own")
def test_a_compiled_denoiser_draws_the_same(backend: str, tmp_path: Path, weights: Path) -> None:
    info = devices(backend)[0]
    if "compile" not in driver(backend, info.device).features():
        pytest.skip(f"{backend} does not compile here")

    with bench_on(info.device, tmp_path, weights) as bench:
        plain, compiled = picture(bench, dtype="fp16"), picture(bench, dtype="fp16", compile=True)

    assert mean_difference(plain, compiled) <= TOLERANCE["fp16"]


@contextmanager
def at_most_more(size_bytes: int, backend: str, info: DeviceInfo) -> Iterator[None]:
    """Let this process take no more of the device's memory than it has and `size_bytes`: then torch really has none."""
    device, memory = driver(backend, info.device), memory_of(backend)
    device.release()
    assert info.memory_bytes is not None
    limit_bytes = memory.memory_reserved(device.torch_device) + size_bytes
    memory.set_per_process_memory_fraction(limit_bytes / info.memory_bytes, device.torch_device)
    try:
        yield
    finally:
        memory.set_per_process_memory_fraction(1.0, device.torch_device)


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
