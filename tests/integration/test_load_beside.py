"""A load is heavy, and it is one job's own: others beside it neither change nor wait for it unheard."""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec, discover
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Recorder
from tests.support.media import difference, frames_of
from tests.support.outcomes import picture, succeeded
from tests.support.tiny.folders import save_tiny
from workers.backends import driver
from workers.executors.loading_dtype import own_default_dtype
from workers.host import InterruptReason, RunInterrupted, RunOrder
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LOADING = "flux-dev"
PICTURE = "qwen-image"
FILM = "wan2.1-t2v-14b"


class Held:
    """The families' own loaders; that of LOADING is held in the libraries' own change of the default dtype."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, spec: ModelSpec, request: LoadRequest) -> Any:
        from transformers.modeling_utils import local_torch_dtype

        load = discover().find(spec.id).loader
        assert load is not None
        if spec.id == LOADING:
            import torch

            with local_torch_dtype(torch.bfloat16):
                self.begun.set()
                assert self.go.wait(RUN_TIMEOUT_S)
        return load(spec, request)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    return {model: save_tiny(model, root / model) for model in (LOADING, PICTURE, FILM)}


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def bench(folders: dict[str, Path], held: Held, tmp_path: Path) -> Iterator[Bench]:
    catalog = discover()
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1),
        models=[dataclasses.replace(catalog.find(model), loader=held) for model in folders],
        folders=folders,
        cache_size=len(folders),
        concurrency=4,
    )
    yield Bench(host, PICTURE, tmp_path)
    held.go.set()
    host.close()


def film_order(bench: Bench) -> RunOrder:
    return bench.order(model=FILM, task=next(iter(discover().find(FILM).tasks)), inputs={"num_frames": 5})


def test_a_picture_is_the_same_while_another_model_is_loaded_in_half_precision(bench: Bench, held: Held) -> None:
    alone, beside = bench.order(), bench.order()
    succeeded(bench.run(alone))
    loading = bench.host.submit(bench.order(model=LOADING), Recorder())
    assert held.begun.wait(RUN_TIMEOUT_S)

    succeeded(bench.run(beside))

    assert not loading.done()
    assert difference(picture(alone), picture(beside)) == 0
    held.go.set()
    succeeded(loading.result(RUN_TIMEOUT_S))


def test_a_film_is_the_same_while_another_model_is_loaded_in_half_precision(bench: Bench, held: Held) -> None:
    alone, beside = film_order(bench), film_order(bench)
    succeeded(bench.run(alone))
    loading = bench.host.submit(bench.order(model=LOADING), Recorder())
    assert held.begun.wait(RUN_TIMEOUT_S)

    succeeded(bench.run(beside))

    assert not loading.done()
    assert frames_of(alone.output_dir / "0.mp4") == frames_of(beside.output_dir / "0.mp4")


def test_a_job_that_waits_for_the_load_of_another_model_hears_that_it_is_to_stop(bench: Bench, held: Held) -> None:
    loading = bench.host.submit(bench.order(model=LOADING), Recorder())
    assert held.begun.wait(RUN_TIMEOUT_S)
    waiting = bench.host.submit(bench.order(job_id="waits"), Recorder())

    bench.host.interrupt("waits", InterruptReason.CANCEL)

    assert waiting.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.CANCEL)
    assert not loading.done()
    held.go.set()
    succeeded(loading.result(RUN_TIMEOUT_S))
    succeeded(bench.run())


@pytest.mark.parametrize("model", [LOADING, PICTURE, FILM])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_model_is_loaded_as_it_would_be_alone_in_the_process(
    folders: dict[str, Path], model: str, dtype: str
) -> None:
    spec, request = discover().find(model), LoadRequest(folders[model], "cpu", dtype)
    assert spec.loader is not None
    plain = spec.loader(spec, request)
    with own_default_dtype():
        own = spec.loader(spec, request)

    assert isinstance(plain, DiffusersModel)
    assert isinstance(own, DiffusersModel)
    assert numbers_of(own) == numbers_of(plain)


def numbers_of(model: DiffusersModel) -> dict[str, tuple[str, bytes]]:
    """Every parameter and buffer by name: its dtype, and its bytes."""
    import torch

    parts = {name: part for name, part in model.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": (str(tensor.dtype), tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        for name, part in parts.items()
        for key, tensor in (*part.named_parameters(), *part.named_buffers())
    }


def test_a_default_dtype_set_inside_is_the_threads_own_and_ends_with_it() -> None:
    import torch

    def elsewhere() -> tuple[torch.dtype, torch.dtype]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: (torch.get_default_dtype(), torch.zeros(2).dtype)).result()

    with own_default_dtype():
        torch.set_default_dtype(torch.float16)

        assert torch.get_default_dtype() is torch.float16
        assert elsewhere() == (torch.float32, torch.float32)
        for made in (torch.zeros(2), torch.arange(0, 1, 0.5), torch.tensor([0.5]), torch.full((2,), 0.5)):
            assert made.dtype is torch.float16
        for dtype in (torch.float32, torch.float64):
            assert torch.zeros(2, dtype=dtype).dtype is dtype
        assert torch.arange(3).dtype is torch.int64
        assert torch.as_tensor(torch.zeros(2, dtype=torch.float32).numpy()).dtype is torch.float32

    assert (torch.get_default_dtype(), torch.zeros(2).dtype) == (torch.float32, torch.float32)
