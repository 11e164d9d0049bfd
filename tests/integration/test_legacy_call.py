"""The executor of classic diffusers pipelines, on tiny models of the real classes."""

import functools
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnirt_tasks.contract import EventName, ExecutionMode, Task
from omnirt_tasks.registry import LoadRequest, discover
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Loads, Recorder, sdxl_bench
from tests.support.media import difference
from tests.support.outcomes import failed, picture, succeeded
from tests.support.tiny_models import save_tiny_sdxl, tiny_sdxl
from workers.backends import driver
from workers.executors import LoadedModel, executor_for, legacy_call
from workers.executors.diffusers_parts import SCHEDULERS, Lender
from workers.executors.legacy_call import own_pipeline
from workers.executors.steps import decode_small
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ("native", *SCHEDULERS)

legacy_bench = functools.partial(sdxl_bench, mode=ExecutionMode.LEGACY_CALL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def tiny(weights: Path, tmp_path: Path) -> Iterator[tuple[Bench, Loads]]:
    bench, loads = legacy_bench(tmp_path, weights)
    yield bench, loads
    bench.host.close()


@pytest.fixture
def bench(tiny: tuple[Bench, Loads]) -> Bench:
    return tiny[0]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((96, 80)).convert("RGB").save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    picture = Image.new("L", (64, 64))
    picture.paste(255, (0, 0, 32, 64))
    picture.save(path)
    return path


@pytest.mark.parametrize("scheduler", NAMES)
def test_the_picture_is_the_one_that_the_plain_pipeline_gives(bench: Bench, weights: Path, scheduler: str) -> None:
    import diffusers
    import torch

    order = bench.order(seed=3, num_inference_steps=5, scheduler=scheduler)
    succeeded(bench.run(order))
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(weights, local_files_only=True)
    if scheduler in SCHEDULERS:
        plain.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(plain.scheduler.config)
    expected = plain(
        "a red circle",
        num_inference_steps=5,
        guidance_scale=5.0,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert difference(picture(order), expected) == 0


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
@pytest.mark.parametrize("scheduler", NAMES)
def test_steps_are_the_schedulers_with_guidance_on_and_off(bench: Bench, scheduler: str, guidance_scale: float) -> None:
    recorder = Recorder()
    order = bench.order(num_inference_steps=5, scheduler=scheduler, guidance_scale=guidance_scale)
    succeeded(bench.run(order, recorder))
    assert recorder.progress == [(step, 5) for step in range(1, 6)]
    timesteps: list[Any] = [event.data["timestep"] for event in recorder.named(EventName.STAGE_PROGRESS)]
    assert timesteps == sorted(timesteps, reverse=True)


@pytest.mark.parametrize(
    ("class_name", "steps"),
    [("HeunDiscreteScheduler", 9), ("PNDMScheduler", 14), ("UniPCMultistepScheduler", 5), ("DDPMScheduler", 5)],
)
def test_a_scheduler_that_steps_otherwise_is_counted_as_it_steps(tmp_path: Path, class_name: str, steps: int) -> None:
    import diffusers

    pipeline = tiny_sdxl()
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "own")
    bench, _ = legacy_bench(tmp_path, tmp_path / "own")
    recorder = Recorder()
    succeeded(bench.run(recorder=recorder, num_inference_steps=5, preview_every_steps=2))
    assert recorder.progress == [(step, steps) for step in range(1, steps + 1)]
    assert len(recorder.named(EventName.PREVIEW)) == (steps - 1) // 2
    bench.host.close()


@pytest.mark.parametrize("scheduler", NAMES)
def test_a_strength_below_one_shortens_the_run_and_its_total(bench: Bench, photo: Path, scheduler: str) -> None:
    recorder = Recorder()
    order = bench.order(
        task=Task.IMAGE2IMAGE, files={"image": photo}, strength=0.5, num_inference_steps=10, scheduler=scheduler
    )
    output = succeeded(bench.run(order, recorder)).outputs[0]
    assert recorder.progress == [(step, 5) for step in range(1, 6)]
    assert (output.width, output.height) == (64, 64)


@pytest.mark.parametrize("task", [Task.IMAGE2IMAGE, Task.INPAINT])
def test_pictures_from_a_picture_agree_with_their_seeds_alone(
    bench: Bench, photo: Path, mask: Path, task: Task
) -> None:
    files = {"image": photo} if task is Task.IMAGE2IMAGE else {"image": photo, "mask": mask}
    wishes: dict[str, Any] = {"task": task, "files": files, "strength": 0.6}
    together = bench.order(seed=8, num_images_per_prompt=2, **wishes)
    alone = bench.order(seed=9, **wishes)
    for order in (together, alone):
        succeeded(bench.run(order))
    assert difference(picture(together, "1.png"), picture(alone)) <= 1


def test_inpainting_changes_what_the_mask_covers(bench: Bench, photo: Path, mask: Path) -> None:
    recorder = Recorder()
    order = bench.order(task=Task.INPAINT, files={"image": photo, "mask": mask}, strength=1.0, num_inference_steps=4)
    succeeded(bench.run(order, recorder))
    assert recorder.progress[-1] == (4, 4)
    assert recorder.stages == ["load", "encode_prompt", "denoise", "decode", "export"]


class Called:
    """What the pipelines of a task are called with, instead of being run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, class_name: str) -> None:
        import diffusers

        self.arguments: dict[str, Any] = {}
        kind = getattr(diffusers, class_name)
        original = kind.__call__

        @functools.wraps(original)
        def remember(pipeline: Any, **arguments: Any) -> Any:
            self.arguments = arguments
            return original(pipeline, **arguments)

        monkeypatch.setattr(kind, "__call__", remember)


def test_a_mask_of_another_size_lies_on_its_picture_before_both_are_cropped(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is white, and what is to be painted anew: the right eighth of both, of which the crop leaves nothing.
    called = Called(monkeypatch, "StableDiffusionXLInpaintPipeline")
    files = {"image": tmp_path / "wide.png", "mask": tmp_path / "square.png"}
    for name, size in (("image", (256, 64)), ("mask", (64, 64))):
        drawn = Image.new("L", size)
        drawn.paste(255, (size[0] * 7 // 8, 0, *size))
        drawn.save(files[name])

    succeeded(bench.run(task=Task.INPAINT, files=files, strength=1.0))

    cropped, mask = called.arguments["image"], called.arguments["mask_image"]
    assert cropped.size == mask.size == (64, 64)
    assert cropped.convert("L").getextrema() == mask.getextrema() == (0, 0)


def test_a_grey_picture_of_sixteen_bits_keeps_its_greys(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(monkeypatch, "StableDiffusionXLImg2ImgPipeline")
    greys = np.tile(np.arange(64, dtype=np.uint16) * 1024, (64, 1))
    Image.fromarray(greys).save(tmp_path / "deep.png")

    succeeded(bench.run(task=Task.IMAGE2IMAGE, files={"image": tmp_path / "deep.png"}, strength=0.5))

    given = np.asarray(called.arguments["image"])
    assert (given == (greys // 256)[..., None]).all()


def test_a_file_that_is_no_picture_of_an_upload_is_not_opened(bench: Bench, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "old.png", "TIFF")
    files = {"image": tmp_path / "old.png"}
    assert failed(bench.run(task=Task.IMAGE2IMAGE, files=files, strength=0.5)).error.code == "model_failed"


def test_the_tasks_of_a_model_share_one_load(tiny: tuple[Bench, Loads], photo: Path) -> None:
    bench, loads = tiny
    succeeded(bench.run())
    succeeded(bench.run(task=Task.IMAGE2IMAGE, files={"image": photo}, strength=0.5))
    assert len(loads.pipelines) == 1
    pipelines = list(loads.pipelines[0].values())
    assert len(pipelines) == 3
    assert len({id(pipeline.unet) for pipeline in pipelines}) == 1


def test_heavy_modules_are_called_by_the_device_thread_alone(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    succeeded(bench.run())
    callers: dict[str, set[str]] = {}
    hooks = []
    pipeline = loads.module
    heavy = {
        "text_encoder": pipeline.text_encoder.get_submodule("encoder")
        if hasattr(pipeline.text_encoder, "encoder")
        else pipeline.text_encoder.text_model.encoder,
        "unet": pipeline.unet.conv_in,
        "vae": pipeline.vae.decoder,
    }
    for name, module in heavy.items():
        seen = callers.setdefault(name, set())
        hooks.append(module.register_forward_pre_hook(lambda *_, seen=seen: seen.add(threading.current_thread().name)))
    futures = [bench.host.submit(bench.order(seed=seed, preview_every_steps=1), Recorder()) for seed in range(4)]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    for hook in hooks:
        hook.remove()
    assert callers == {name: {"omnirt-device"} for name in heavy}


def test_a_job_has_a_scheduler_of_its_own_around_shared_weights(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    succeeded(bench.run())
    shared = loads.module
    own = own_pipeline(shared, {}, {"scheduler": "native"})
    assert own.scheduler is not shared.scheduler
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(own, name) is getattr(shared, name)
    assert "step" not in vars(shared.scheduler), "a job's wrapper is on the shared scheduler"
    assert own.config.force_zeros_for_empty_prompt == shared.config.force_zeros_for_empty_prompt


def test_two_jobs_at_once_share_neither_scheduler_nor_tokenizers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def remember(*args: Any) -> Any:
        made.append(own_pipeline(*args))
        return made[-1]

    monkeypatch.setattr(legacy_call, "own_pipeline", remember)
    both_running = threading.Barrier(2, timeout=RUN_TIMEOUT_S)
    futures = [
        bench.host.submit(bench.order(seed=seed), Recorder().on(EventName.STAGE_PROGRESS, both_running.wait))
        for seed in range(2)
    ]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    one, other = made
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        assert getattr(one, name) is not getattr(other, name)
    assert one.unet is other.unet


def test_no_two_jobs_have_the_same_tokenizers_at_once_and_they_are_lent_again() -> None:
    originals = {"tokenizer": object()}
    lender = Lender(originals)
    with lender.lent() as one:
        with lender.lent() as two:
            assert one["tokenizer"] is originals["tokenizer"]
            assert two is not one
        with lender.lent() as three:
            assert three is two
    with lender.lent() as four:
        assert four is one


@pytest.mark.parametrize(("part", "value"), [("unet", "nan"), ("vae", "nan"), ("vae", "inf")])
def test_weights_that_give_no_numbers_are_never_a_picture(weights: Path, tmp_path: Path, part: str, value: str) -> None:
    import torch

    pipeline = tiny_sdxl()
    module = pipeline.unet.conv_out if part == "unet" else pipeline.vae.decoder.conv_out
    torch.nn.init.constant_(module.bias, float(value))
    pipeline.save_pretrained(tmp_path / "spoilt")
    bench, _ = legacy_bench(tmp_path, tmp_path / "spoilt")
    order = bench.order(preview_every_steps=1)
    recorder = Recorder()
    error = failed(bench.run(order, recorder)).error
    assert error.code == "non_finite_output"
    assert list(order.output_dir.iterdir()) == []
    assert recorder.named(EventName.STAGE_ERROR)[0].stage == "decode"
    bench.host.close()


def test_lack_of_memory_is_told_with_a_remedy_and_the_host_goes_on(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    succeeded(bench.run())

    def lack(*_: object) -> None:
        raise MemoryError

    hook = loads.module.unet.conv_in.register_forward_pre_hook(lack)
    error = failed(bench.run()).error
    hook.remove()
    assert error.code == "out_of_memory"
    assert error.hint
    succeeded(bench.run())


def test_an_error_of_a_model_names_neither_path_nor_prompt_and_the_log_has_it_whole(
    tiny: tuple[Bench, Loads], caplog: pytest.LogCaptureFixture
) -> None:
    bench, loads = tiny
    succeeded(bench.run())

    def burst(*_: object) -> None:
        raise LookupError("/secret/place of a secret prompt")

    hook = loads.module.unet.conv_in.register_forward_pre_hook(burst)
    with caplog.at_level(logging.ERROR):
        error = failed(bench.run(prompt="secret prompt")).error
    hook.remove()
    assert (error.code, error.message) == ("model_failed", "The model's code raised LookupError.")
    assert "secret" not in f"{error.message} {error.hint}"
    assert "/secret/place" in caplog.text


def test_a_prompt_that_is_cut_is_not_quoted_in_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        succeeded(bench.run(prompt="zebra " * 200))
    assert "zebra" not in caplog.text


def test_missing_weights_fail_their_own_job_alone(bench: Bench) -> None:
    error = failed(bench.run(model="sdxl-turbo")).error
    assert error.code == "model_failed"
    assert "weights" in error.message
    assert error.hint
    assert "OMNIRT_MODEL_FOLDERS" in error.hint
    succeeded(bench.run())


def test_a_dtype_that_the_device_does_not_have_fails_the_job_rather_than_bending_it(bench: Bench) -> None:
    error = failed(bench.run(dtype="fp16")).error
    assert error.code == "model_failed"
    assert "fp16" in error.message
    assert error.hint
    assert "fp32" in error.hint
    succeeded(bench.run())


def test_a_broken_folder_fails_its_job_and_leaves_nothing_loaded(tmp_path: Path) -> None:
    folder = save_tiny_sdxl(tmp_path / "broken")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    bench, _ = legacy_bench(tmp_path, folder)
    assert failed(bench.run()).error.code == "model_failed"
    assert bench.host.capability().loaded == ()
    bench.host.close()


def test_weights_that_are_no_safetensors_are_not_read(tmp_path: Path) -> None:
    pipeline = tiny_sdxl()
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    bench, _ = legacy_bench(tmp_path, tmp_path / "pickled")
    assert failed(bench.run()).error.code == "model_failed"
    bench.host.close()


def test_a_folder_of_half_precision_variants_alone_draws_the_same_picture(bench: Bench, tmp_path: Path) -> None:
    folder = save_tiny_sdxl(tmp_path / "variants")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    own_path = tmp_path / "own"
    own_path.mkdir()
    of_variants, _ = legacy_bench(own_path, folder)
    plain, same = bench.order(), of_variants.order()

    succeeded(bench.run(plain))
    succeeded(of_variants.run(same))

    of_variants.host.close()
    assert difference(picture(plain), picture(same)) == 0


def test_at_most_as_many_models_stay_loaded_as_the_cache_has_places(weights: Path, tmp_path: Path) -> None:
    other = save_tiny_sdxl(tmp_path / "other", seed=8)
    bench, loads = legacy_bench(tmp_path, weights, cache_size=1, more={"sdxl-turbo": other})
    succeeded(bench.run())
    succeeded(bench.run(model="sdxl-turbo"))
    assert bench.host.capability().loaded == ("sdxl-turbo",)
    succeeded(bench.run())
    assert len(loads.pipelines) == 3
    bench.host.close()


def test_eight_jobs_at_once_share_one_load(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    futures = [bench.host.submit(bench.order(seed=seed), Recorder()) for seed in range(8)]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    assert len(loads.pipelines) == 1
    assert loads.threads[0].startswith("omnirt-job")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_vae_that_overflows_in_half_precision_stays_in_fp32_for_all_jobs(
    tmp_path: Path, photo: Path, dtype: str
) -> None:
    import torch

    folder = save_tiny_sdxl(tmp_path / "upcast", force_upcast=True)
    bench, loads = legacy_bench(tmp_path, folder, dtype=dtype)
    image2image: dict[str, Any] = {"task": Task.IMAGE2IMAGE, "files": {"image": photo}, "strength": 0.6}
    orders = [bench.order(seed=seed, preview_every_steps=2, **(image2image if seed % 2 else {})) for seed in range(6)]
    futures = [bench.host.submit(order, Recorder()) for order in orders]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    assert loads.module.unet.dtype is {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert loads.module.vae.dtype is torch.float32
    alone = bench.order(seed=4)
    succeeded(bench.run(alone))
    assert difference(picture(orders[4]), picture(alone)) <= 1
    bench.host.close()


def test_a_host_tells_which_classes_of_modules_have_calls_that_jobs_share(bench: Bench) -> None:
    succeeded(bench.run())

    ability = bench.host.capability().abilities[bench.model]

    assert ability.unchunked is None
    assert ability.chunk_classes == (
        "AutoencoderKL",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "UNet2DConditionModel",
    )


def test_a_denoiser_that_takes_an_argument_nobody_knows_runs_alone_draws_the_same_and_is_told_of(
    bench: Bench, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    known, plain = diffusers.UNet2DConditionModel.forward, bench.order()
    succeeded(bench.run(plain))

    def forward(
        self: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, depth: Any = None, **more: Any
    ) -> Any:
        assert depth is None
        return known(self, sample, timestep, encoder_hidden_states, **more)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", forward)
    own_path = tmp_path / "changed"
    own_path.mkdir()
    changed, _ = legacy_bench(own_path, weights)
    orders = [changed.order() for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        outcomes = [changed.host.submit(order, Recorder()) for order in orders]
        facts = [succeeded(outcome.result(RUN_TIMEOUT_S)).facts for outcome in outcomes]
    ability = changed.host.capability().abilities[changed.model]
    changed.host.close()

    assert ability.unchunked == "Its unet takes an argument that is not known: 'depth'."
    assert "UNet2DConditionModel" not in ability.chunk_classes
    assert caplog.text.count("'depth'") == 1
    assert [fact.batch_size_mean for fact in facts] == [1.0, 1.0, 1.0]
    assert [difference(picture(order), picture(plain)) for order in orders] == [0, 0, 0]


def test_a_preview_that_fails_leaves_its_job_alone(tiny: tuple[Bench, Loads], caplog: pytest.LogCaptureFixture) -> None:
    bench, loads = tiny
    succeeded(bench.run())
    decodes = 0

    def fail_first(*_: object) -> None:
        nonlocal decodes
        decodes += 1
        if decodes == 1:
            raise MemoryError

    hook = loads.module.vae.decoder.register_forward_pre_hook(fail_first)
    recorder = Recorder()
    succeeded(bench.run(recorder=recorder, num_inference_steps=6, preview_every_steps=2))
    hook.remove()
    assert decodes == 2, "one preview was tried, then the picture was decoded"
    assert recorder.named(EventName.PREVIEW) == []
    assert "a preview failed" in caplog.text


@pytest.mark.parametrize(("height", "width", "expected"), [(8, 8, (64, 64)), (128, 128, (64, 64)), (128, 64, (32, 64))])
def test_a_preview_is_small_whatever_the_picture(height: int, width: int, expected: tuple[int, int]) -> None:
    import torch

    vae = tiny_sdxl().vae
    with torch.no_grad():
        shown = decode_small(vae, torch.zeros(1, 4, height, width))
    assert shown is not None
    assert shown.size == expected


def test_a_preview_of_no_numbers_is_none() -> None:
    import torch

    with torch.no_grad():
        assert decode_small(tiny_sdxl().vae, torch.full((1, 4, 8, 8), float("nan"))) is None


def test_shapes_draws_what_it_is_told(tmp_path: Path) -> None:
    spec = discover().find("shapes")
    assert spec.weights is not None
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1),
        models=[spec],
        folders={spec.id: spec.weights},
        cache_size=1,
        concurrency=2,
    )
    bench = Bench(host, spec.id, tmp_path)
    order = bench.order(prompt="a large red circle on a blue background", num_inference_steps=12)
    succeeded(bench.run(order))
    host.close()
    drawn = picture(order)
    for place, strongest in (((32, 32), 0), ((2, 2), 2), ((61, 61), 2)):
        colour = drawn.getpixel(place)
        assert isinstance(colour, tuple)
        assert colour.index(max(colour)) == strongest, (place, colour)


def test_a_call_outside_a_job_is_the_modules_own(weights: Path) -> None:
    import torch

    spec = discover().find("sdxl-base-1.0")
    loaded = executor_for("cpu", ExecutionMode.LEGACY_CALL).load(
        spec, LoadRequest(folder=weights, device="cpu", dtype="fp32")
    )
    assert isinstance(loaded, LoadedModel)
    assert loaded.placement["unet"] == "cpu float32"
    vae = loaded.content.by_task[Task.TEXT2IMAGE].vae
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 4, 8, 8), return_dict=False)[0].shape == (1, 3, 64, 64)


def test_a_load_by_two_threads_leaves_the_process_as_it_was(weights: Path) -> None:
    import torch

    spec = discover().find("sdxl-base-1.0")
    executor = executor_for("cpu", ExecutionMode.LEGACY_CALL)
    request = LoadRequest(folder=weights, device="cpu", dtype="bf16")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: executor.load(spec, request), range(4)))
    assert torch.get_default_dtype() is torch.float32


def test_code_from_elsewhere_stays_off_whatever_the_environment_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", "false")
    succeeded(bench.run())
    assert os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] == "true"
