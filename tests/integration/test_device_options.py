"""The options that change how the device works: each does what it says, and only for the job that asked."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import EventName, ExecutionMode
from omnirt_tasks.errors import ModelFailed
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Loads, Recorder, sdxl_bench
from tests.support.media import difference
from tests.support.outcomes import picture, succeeded
from tests.support.tiny_models import save_tiny_sdxl
from workers.executors.diffusers_parts import SCHEDULERS
from workers.executors.heavy import own_vae, send_to_device

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MODES = (ExecutionMode.LEGACY_CALL, ExecutionMode.MODULAR)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(params=MODES)
def tiny(request: pytest.FixtureRequest, weights: Path, tmp_path: Path) -> Iterator[tuple[Bench, Loads]]:
    """The model in either mode, loaded."""
    bench, loads = sdxl_bench(tmp_path, weights, mode=request.param)
    succeeded(bench.run())
    yield bench, loads
    bench.host.close()


@contextmanager
def decoder_calls(loads: Loads, look: Callable[[], object] = lambda: None) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the VAE's decoder is called with; `look` runs at each call."""
    shapes: list[tuple[int, ...]] = []

    def note(_: object, args: tuple[Any, ...]) -> None:
        shapes.append(tuple(args[0].shape))
        look()

    hook = loads.module.vae.decoder.register_forward_pre_hook(note)
    try:
        yield shapes
    finally:
        hook.remove()


def test_slicing_decodes_the_pictures_one_by_one(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    orders = {sliced: bench.order(num_images_per_prompt=3, vae_slicing=sliced) for sliced in (False, True)}
    batches = {}
    for sliced, order in orders.items():
        with decoder_calls(loads) as shapes:
            succeeded(bench.run(order))
        batches[sliced] = [shape[0] for shape in shapes]
    assert batches == {False: [3], True: [1, 1, 1]}
    for name in ("0.png", "1.png", "2.png"):
        assert difference(picture(orders[False], name), picture(orders[True], name)) <= 1


def test_tiling_decodes_a_picture_in_tiles(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    sides = {}
    for tiled in (False, True):
        with decoder_calls(loads) as shapes:
            succeeded(bench.run(vae_tiling=tiled))
        sides[tiled] = [shape[-2:] for shape in shapes]
    assert sides[False] == [(8, 8)]
    assert len(sides[True]) > 1
    assert max(max(side) for side in sides[True]) < 8


def test_a_tiled_job_leaves_the_job_beside_it_and_the_shared_vae_as_they_were(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    vae = loads.module.vae
    flags: set[tuple[bool, bool]] = set()
    alone, plain, tiled = (bench.order(), bench.order(), bench.order(vae_tiling=True, vae_slicing=True))
    succeeded(bench.run(alone))
    both_running = threading.Barrier(2, timeout=RUN_TIMEOUT_S)
    with decoder_calls(loads, look=lambda: flags.add((vae.use_tiling, vae.use_slicing))):
        futures = [
            bench.host.submit(order, Recorder().on(EventName.STAGE_PROGRESS, both_running.wait, count=4))
            for order in (plain, tiled)
        ]
        for future in futures:
            succeeded(future.result(RUN_TIMEOUT_S))
    assert flags == {(False, False)}
    assert difference(picture(plain), picture(alone)) == 0
    assert difference(picture(tiled), picture(alone)) > 0


def test_a_preview_of_a_tiled_job_is_decoded_too(tiny: tuple[Bench, Loads]) -> None:
    bench, _ = tiny
    recorder = Recorder()
    succeeded(bench.run(recorder=recorder, vae_tiling=True, preview_every_steps=2))
    assert len(recorder.named(EventName.PREVIEW)) == 1


def test_a_vae_that_knows_no_tiles_says_so_with_a_remedy() -> None:
    import torch

    class Untiled(torch.nn.Module):
        dtype = torch.float32

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

        def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
            return (latents,)

    vae = Untiled()
    send_to_device({"vae": vae})
    with pytest.raises(ModelFailed, match="Untiled knows no tiling") as raised:
        own_vae(vae, slicing=False, tiling=True)
    assert "vae_tiling" in (raised.value.hint or "")


@pytest.mark.parametrize("mode", MODES)
def test_compile_runs_the_denoiser_through_the_compiler_and_only_for_who_asked(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: ExecutionMode
) -> None:
    import torch

    runs = 0

    def counting(graph: Any, _: object) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal runs
            runs += 1
            return graph.forward(*args)

        return run

    # The compiler's own backend takes a minute here; what is traced and called is the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    bench, loads = sdxl_bench(tmp_path, weights, mode=mode)
    plain, compiled = bench.order(), bench.order(compile=True)
    succeeded(bench.run(plain))
    assert runs == 0
    succeeded(bench.run(compiled))
    assert runs >= 4, "every step"
    assert difference(picture(plain), picture(compiled)) <= 1
    assert len(loads.pipelines) == 2, "compiled and plain weights are two models"
    bench.host.close()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_scheduler_named_is_the_one_that_steps(
    tiny: tuple[Bench, Loads], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    bench, _ = tiny
    kind = getattr(diffusers, SCHEDULERS[scheduler])
    steps = 0
    step = kind.step

    @functools.wraps(step)
    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(kind, "step", count)
    succeeded(bench.run(scheduler=scheduler, num_inference_steps=3))
    assert steps == 3
