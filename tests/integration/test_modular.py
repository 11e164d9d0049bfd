"""The executor of Modular Diffusers: the same stories as legacy_call's, and the same pictures."""

import dataclasses
import functools
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnirt_tasks.contract import EventName, ExecutionMode, Task
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import DiffusersModel, LoadRequest, discover
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Loads, Recorder, family_bench, sdxl_bench
from tests.support.media import difference
from tests.support.outcomes import failed, picture, succeeded
from tests.support.tiny_models import save_tiny_sdxl, tiny_sdxl
from workers.executors import modular
from workers.executors.diffusers_parts import SCHEDULERS
from workers.executors.modular import ModularExecutor
from workers.host import InterruptReason, RunInterrupted

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ("native", *SCHEDULERS)

modular_bench = functools.partial(sdxl_bench, mode=ExecutionMode.MODULAR)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def tiny(weights: Path, tmp_path: Path) -> Iterator[tuple[Bench, Loads]]:
    bench, loads = modular_bench(tmp_path, weights)
    yield bench, loads
    bench.host.close()


@pytest.fixture
def bench(tiny: tuple[Bench, Loads]) -> Bench:
    return tiny[0]


@pytest.fixture
def legacy(weights: Path, tmp_path: Path) -> Iterator[Bench]:
    folder = tmp_path / "legacy"
    folder.mkdir()
    bench, _ = sdxl_bench(folder, weights, mode=ExecutionMode.LEGACY_CALL)
    yield bench
    bench.host.close()


@pytest.fixture
def files(tmp_path: Path) -> Mapping[Task, Mapping[str, Path]]:
    """The input pictures of each task."""
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.linear_gradient("L").resize((96, 80)).convert("RGB").save(photo)
    covered = Image.new("L", (64, 64))
    covered.paste(255, (0, 0, 32, 64))
    covered.save(mask)
    return {
        Task.TEXT2IMAGE: {},
        Task.IMAGE2IMAGE: {"image": photo},
        Task.INPAINT: {"image": photo, "mask": mask},
    }


@pytest.mark.parametrize("scheduler", NAMES)
def test_the_picture_is_the_one_that_the_plain_modular_pipeline_gives(
    bench: Bench, weights: Path, scheduler: str
) -> None:
    import diffusers
    import torch

    order = bench.order(seed=3, num_inference_steps=5, scheduler=scheduler)
    facts = succeeded(bench.run(order)).facts
    classic = diffusers.StableDiffusionXLPipeline.from_pretrained(weights, local_files_only=True)
    plain = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    plain.update_components(**{name: part for name, part in classic.components.items() if part is not None})
    if scheduler in SCHEDULERS:
        kind = getattr(diffusers, SCHEDULERS[scheduler])
        plain.update_components(scheduler=kind.from_config(plain.scheduler.config))
    plain.update_components(guider=plain.guider.new(guidance_scale=5.0))
    expected = plain(
        prompt="a red circle",
        num_inference_steps=5,
        width=64,
        height=64,
        generator=[torch.Generator("cpu").manual_seed(3)],
        output="images",
    )[0]
    assert difference(picture(order), expected) == 0
    assert facts.execution_mode is ExecutionMode.MODULAR


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0, 0.0])
@pytest.mark.parametrize(
    ("task", "strength"),
    [(Task.TEXT2IMAGE, None), (Task.IMAGE2IMAGE, 0.6), (Task.INPAINT, 0.6), (Task.INPAINT, 1.0)],
)
def test_a_request_gives_the_same_pictures_in_both_modes(
    bench: Bench,
    legacy: Bench,
    files: Mapping[Task, Mapping[str, Path]],
    task: Task,
    strength: float | None,
    guidance_scale: float,
) -> None:
    wishes: dict[str, Any] = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    if strength is not None:
        wishes["strength"] = strength
    ours, theirs = (each.order(task=task, files=files[task], **wishes) for each in (bench, legacy))
    steps, expected_steps = Recorder(), Recorder()
    outputs = succeeded(bench.run(ours, steps)).outputs
    assert succeeded(legacy.run(theirs, expected_steps)).outputs == outputs
    assert steps.progress == expected_steps.progress
    for output in outputs:
        assert difference(picture(ours, output.name), picture(theirs, output.name)) <= 1


def test_a_negative_prompt_counts_as_it_does_in_the_other_mode(bench: Bench, legacy: Bench) -> None:
    order, other = (each.order(inputs={"negative_prompt": "blue"}) for each in (bench, legacy))
    without = bench.order()
    for each, host in ((order, bench), (without, bench), (other, legacy)):
        succeeded(host.run(each))
    assert difference(picture(order), picture(other)) <= 1
    assert difference(picture(order), picture(without)) > 1


def test_the_refiner_gives_the_same_picture_in_both_modes(
    tmp_path: Path, files: Mapping[Task, Mapping[str, Path]]
) -> None:
    weights = save_tiny_refiner(tmp_path / "refiner")
    pictures = []
    for mode in (ExecutionMode.MODULAR, ExecutionMode.LEGACY_CALL):
        folder = tmp_path / mode
        folder.mkdir()
        bench, _ = family_bench(folder, "sdxl-refiner-1.0", weights, mode=mode)
        order = bench.order(task=Task.IMAGE2IMAGE, files=files[Task.IMAGE2IMAGE], strength=0.6)
        succeeded(bench.run(order))
        bench.host.close()
        pictures.append(picture(order))
    assert difference(*pictures) <= 1


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
@pytest.mark.parametrize("scheduler", NAMES)
def test_steps_are_the_schedulers_with_guidance_on_and_off(bench: Bench, scheduler: str, guidance_scale: float) -> None:
    recorder = Recorder()
    order = bench.order(num_inference_steps=5, scheduler=scheduler, guidance_scale=guidance_scale)
    succeeded(bench.run(order, recorder))
    assert recorder.progress == [(step, 5) for step in range(1, 6)]
    assert recorder.stages == ["load", "encode_prompt", "denoise", "decode", "export"]


@pytest.mark.parametrize("task", [Task.TEXT2IMAGE, Task.IMAGE2IMAGE, Task.INPAINT])
def test_each_picture_is_the_one_that_its_seed_gives_alone(
    bench: Bench, files: Mapping[Task, Mapping[str, Path]], task: Task
) -> None:
    wishes: dict[str, Any] = {"task": task, "files": files[task]} | (
        {} if task is Task.TEXT2IMAGE else {"strength": 0.6}
    )
    together = bench.order(seed=8, num_images_per_prompt=2, **wishes)
    alone = bench.order(seed=9, **wishes)
    outputs = [succeeded(bench.run(order)).outputs for order in (together, alone)]
    assert [output.seed for output in outputs[0]] == [8, 9]
    assert difference(picture(together, "1.png"), picture(alone)) <= 1
    assert difference(picture(together, "0.png"), picture(alone)) > 1


def test_eight_jobs_at_once_share_one_load_and_each_is_as_it_is_alone(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    # A shared guider or scheduler would mix up scales and numbers of steps.
    orders = [
        bench.order(seed=seed, guidance_scale=1.0 + seed, num_inference_steps=3 + seed % 3, scheduler=NAMES[seed % 4])
        for seed in range(8)
    ]
    futures = [bench.host.submit(order, Recorder()) for order in orders]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    assert len(loads.pipelines) == 1
    for order in orders:
        config: dict[str, Any] = dict(order.request.config)
        alone = bench.order(**config)
        succeeded(bench.run(alone))
        assert difference(picture(order), picture(alone)) <= 1, "merged sums round in another way"


def test_what_a_job_changes_is_its_own_around_shared_weights(
    tiny: tuple[Bench, Loads], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, loads = tiny
    made: list[Any] = []
    shared: list[Any] = []
    own_pipeline = modular.own_pipeline

    def remember(*args: Any) -> Any:
        shared.append(args[0])
        made.append(own_pipeline(*args))
        return made[-1]

    monkeypatch.setattr(modular, "own_pipeline", remember)
    both_running = threading.Barrier(2, timeout=RUN_TIMEOUT_S)
    futures = [
        bench.host.submit(bench.order(seed=seed), Recorder().on(EventName.STAGE_PROGRESS, both_running.wait))
        for seed in range(2)
    ]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    one, other = made
    for name in ("scheduler", "guider", "tokenizer", "tokenizer_2"):
        assert getattr(one, name) is not getattr(other, name), name
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(one, name) is getattr(other, name) is getattr(loads.module, name), name
    assert shared[0] is shared[1]
    assert "step" not in vars(shared[0].scheduler), "a job's wrapper is on the shared scheduler"


def test_a_cancelled_job_ends_at_its_next_device_call_and_leaves_nothing(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    succeeded(bench.run())
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = loads.module.unet.conv_in.register_forward_pre_hook(count)
    order = bench.order(num_inference_steps=20)
    recorder = Recorder().on(
        EventName.STAGE_PROGRESS, lambda: bench.host.interrupt(order.job_id, InterruptReason.CANCEL), count=3
    )
    outcome = bench.run(order, recorder)
    hook.remove()
    assert outcome == RunInterrupted(InterruptReason.CANCEL)
    assert calls == 6, "guidance calls twice a step"
    assert list(order.output_dir.iterdir()) == []


def test_previews_come_as_they_were_asked_for(bench: Bench) -> None:
    recorder = Recorder()
    succeeded(bench.run(recorder=recorder, num_inference_steps=6, preview_every_steps=2))
    assert [event.data["step"] for event in recorder.named(EventName.PREVIEW)] == [2, 4]


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_give_no_numbers_are_never_a_picture(tmp_path: Path, part: str) -> None:
    import torch

    pipeline = tiny_sdxl()
    module = pipeline.unet.conv_out if part == "unet" else pipeline.vae.decoder.conv_out
    torch.nn.init.constant_(module.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "spoilt")
    bench, _ = modular_bench(tmp_path, tmp_path / "spoilt")
    order = bench.order()
    error = failed(bench.run(order)).error
    bench.host.close()
    assert error.code == "non_finite_output"
    assert list(order.output_dir.iterdir()) == []


def test_neither_log_nor_terminal_quotes_the_prompt_of_a_job_that_breaks(
    tiny: tuple[Bench, Loads], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    bench, loads = tiny
    succeeded(bench.run(prompt="zebra " * 200))

    def burst(*_: object) -> None:
        raise LookupError("the model burst")

    hook = loads.module.unet.conv_in.register_forward_pre_hook(burst)
    libraries = logging.getLogger("diffusers"), logging.getLogger("transformers")
    for library in libraries:  # they keep their words from the handlers of others
        library.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG):
        assert failed(bench.run(prompt="zebra " * 200)).error.code == "model_failed"
    for library in libraries:
        library.removeHandler(caplog.handler)
    hook.remove()
    written = "".join(capfd.readouterr())
    assert "zebra" not in caplog.text + written
    assert "Error in block" not in caplog.text, "the blocks write out an error that the job has already"
    assert "it/s" not in written, "no progress bars on a worker's terminal"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_vae_that_overflows_in_half_precision_stays_in_fp32_for_all_jobs(
    tmp_path: Path, files: Mapping[Task, Mapping[str, Path]], dtype: str
) -> None:
    import torch

    folder = save_tiny_sdxl(tmp_path / "upcast", force_upcast=True)
    bench, loads = modular_bench(tmp_path, folder, dtype=dtype)
    orders = []
    for seed, task in enumerate(files):
        wishes: dict[str, Any] = {} if task is Task.TEXT2IMAGE else {"strength": 0.6}
        orders.append(bench.order(seed=seed, task=task, files=files[task], **wishes))
    futures = [bench.host.submit(order, Recorder()) for order in orders]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    assert loads.module.unet.dtype is {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert loads.module.vae.dtype is torch.float32
    bench.host.close()


def test_a_model_without_blocks_is_told_to_run_in_the_other_mode(weights: Path) -> None:
    spec = discover().find("sdxl-base-1.0")
    assert spec.loader is not None
    request = LoadRequest(weights, "cpu", "fp32")
    loaded = spec.loader(spec, request)
    assert isinstance(loaded, DiffusersModel)
    blockless = dataclasses.replace(spec, loader=lambda *_: DiffusersModel(loaded.by_task))
    with pytest.raises(ConfigurationError, match="legacy_call"):
        ModularExecutor().load(blockless, request)


def save_tiny_refiner(folder: Path) -> Path:
    """As SDXL's refiner: one text encoder, and an aesthetic score in place of the target size."""
    import diffusers
    import torch

    base = tiny_sdxl()
    width = base.text_encoder_2.config.hidden_size
    scores = 5 * base.unet.config.addition_time_embed_dim
    with torch.random.fork_rng():
        torch.manual_seed(11)
        unet = diffusers.UNet2DConditionModel.from_config(
            {
                **base.unet.config,
                "cross_attention_dim": width,
                "projection_class_embeddings_input_dim": scores + base.text_encoder_2.config.projection_dim,
            }
        )
    diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)
    return folder
