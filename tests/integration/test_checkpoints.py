"""A job whose state was kept goes on elsewhere, from there, and gives what an unbroken run gives, to the last bit."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnirt_tasks.contract import EventName, ExecutionMode, Task
from omnirt_tasks.registry import ModelSpec, discover
from omnirt_tasks.registry.spec import Checkpointing
from tests.support.hosts import Bench, Loads, Recorder, family_bench
from tests.support.media import frames_of
from tests.support.outcomes import succeeded
from tests.support.tiny.folders import TINY, save_tiny
from tests.support.tiny_models import save_tiny_sdxl, tiny_sdxl
from workers.executors.diffusers_parts import SCHEDULERS
from workers.host import InterruptReason, RunInterrupted, RunOrder

# The schedulers meet NumPy's newest wishes in old ways of making arrays.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SDXL, FILM = "sdxl-base-1.0", "wan2.1-t2v-14b"
STEPS, KEPT = 9, 6
MODES = (ExecutionMode.LEGACY_CALL, ExecutionMode.MODULAR)
NAMES = ("native", *SCHEDULERS)
# Those that no request can name, but a model may come with.
FOREIGN = (
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


class Hosts:
    """Hosts of one model each, that share nothing but folders of weights, and end with the test."""

    def __init__(self, weights: Path, tmp_path: Path) -> None:
        self._weights = weights
        self._tmp_path = tmp_path
        self._open: list[Bench] = []

    def weights(self, model: str) -> Path:
        if (shipped := discover().find(model).weights) is not None:
            return shipped
        folder = self._weights / model
        if not folder.exists():
            save_tiny_sdxl(folder) if model == SDXL else save_tiny(model, folder)
        return folder

    def fresh(self, model: str, folder: Path | None = None, **wishes: Any) -> tuple[Bench, Loads]:
        """A host that has run nothing; it keeps a job's state after every third step unless told otherwise."""
        own_path = self._tmp_path / f"host-{len(self._open)}"
        own_path.mkdir()
        wishes.setdefault("checkpointing", Checkpointing(every_steps=KEPT // 2))
        bench, loads = family_bench(own_path, model, folder or self.weights(model), **wishes)
        self._open.append(bench)
        return bench, loads

    def close(self) -> None:
        for bench in self._open:
            bench.host.close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def hosts(weights: Path, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(weights, tmp_path)
    yield made
    made.close()


def order_of(bench: Bench, **wishes: Any) -> RunOrder:
    """A job of the model's first task, whose state may be kept beside its outputs."""
    tasks = discover().find(bench.model).tasks
    usual: dict[str, Any] = {"task": next(iter(tasks)), "num_inference_steps": STEPS}
    if "num_frames" in tasks[wishes.get("task", usual["task"])].numbers:
        usual["inputs"] = {"num_frames": 5}
    order = bench.order(**(usual | wishes))
    checkpoints = order.output_dir.with_name(order.output_dir.name + "-checkpoints")
    checkpoints.mkdir()
    return dataclasses.replace(order, checkpoint_dir=checkpoints)


def made(bench: Bench, order: RunOrder, recorder: Recorder | None = None) -> list[bytes]:
    """What the order's run leaves: each picture as it is stored, or the films' frames."""
    outputs = succeeded(bench.run(order, recorder)).outputs
    paths = [order.output_dir / output.name for output in outputs]
    return [b"".join(frames_of(path).frames) if path.suffix == ".mp4" else path.read_bytes() for path in paths]


def broken_off(bench: Bench, order: RunOrder, *, step: int = KEPT) -> Path:
    """The order's run ends once its state after `step` is kept; where that lies."""
    assert order.checkpoint_dir is not None
    recorder = Recorder()

    def end_at(step_kept: int) -> None:
        if recorder.named(EventName.CHECKPOINT)[-1].data["step"] == step_kept:
            bench.host.interrupt(order.job_id, InterruptReason.GIVE_BACK)

    for count in range(1, step + 1):
        recorder.on(EventName.CHECKPOINT, lambda: end_at(step), count=count)
    assert bench.run(order, recorder) == RunInterrupted(InterruptReason.GIVE_BACK)
    return order.checkpoint_dir / str(recorder.named(EventName.CHECKPOINT)[-1].data["file"])


def resuming(order: RunOrder, checkpoint: Path) -> RunOrder:
    return dataclasses.replace(order, attempt=2, resume_from=checkpoint)


def resumes(recorder: Recorder) -> list[Mapping[str, object]]:
    return [event.data for event in recorder.named(EventName.RESUMED)]


def hold_against_an_unbroken_run(hosts: Hosts, model: str, folder: Path | None = None, **wishes: Any) -> None:
    """A job that is broken off and goes on in another host gives what it gives unbroken."""
    mode = wishes.pop("mode", None)
    (first, _), (second, _) = (hosts.fresh(model, folder, mode=mode) for _ in range(2))
    unbroken = made(first, order_of(first, **wishes))
    checkpoint = broken_off(first, order_of(first, **wishes))
    recorder = Recorder()

    resumed = made(second, resuming(order_of(second, **wishes), checkpoint), recorder)

    assert [told["step"] for told in resumes(recorder)] == [KEPT]
    assert resumed == unbroken


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", NAMES)
def test_a_job_goes_on_with_every_scheduler_that_a_request_can_name(
    hosts: Hosts, scheduler: str, mode: ExecutionMode
) -> None:
    hold_against_an_unbroken_run(hosts, SDXL, mode=mode, scheduler=scheduler)


@pytest.mark.parametrize("scheduler", FOREIGN)
def test_a_job_goes_on_with_whatever_scheduler_its_model_comes_with(
    hosts: Hosts, tmp_path: Path, scheduler: str
) -> None:
    import diffusers

    pipeline = tiny_sdxl()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "weights", safe_serialization=True)
    hold_against_an_unbroken_run(
        hosts, SDXL, tmp_path / "weights", mode=ExecutionMode.LEGACY_CALL, num_inference_steps=STEPS + 2
    )


@pytest.mark.parametrize("model", [model for model in TINY if model != "sd3.5-large-turbo"])
def test_a_job_of_every_family_goes_on(hosts: Hosts, model: str) -> None:
    hold_against_an_unbroken_run(hosts, model)


def test_a_film_goes_on_in_the_other_mode_too(hosts: Hosts) -> None:
    hold_against_an_unbroken_run(hosts, FILM, mode=ExecutionMode.LEGACY_CALL)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("task", "strength"), [(Task.TEXT2IMAGE, None), (Task.IMAGE2IMAGE, 0.9), (Task.INPAINT, 0.9), (Task.INPAINT, 1.0)]
)
def test_each_picture_of_a_job_goes_on_with_its_own_noise(
    hosts: Hosts, tmp_path: Path, task: Task, strength: float | None, mode: ExecutionMode
) -> None:
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    covered = Image.new("L", (64, 64))
    covered.paste(255, (0, 0, 32, 64))
    covered.save(mask)
    wishes: dict[str, Any] = {"num_images_per_prompt": 2, "scheduler": "euler-ancestral", "task": task}
    if strength is not None:
        wishes |= {"strength": strength, "files": {"image": photo, "mask": mask}}
    hold_against_an_unbroken_run(hosts, SDXL, mode=mode, **wishes)


def test_shapes_goes_on_after_its_fiftieth_step(hosts: Hosts) -> None:
    spec: ModelSpec = discover().find("shapes")
    (first, _), (second, _) = (hosts.fresh("shapes", checkpointing=spec.checkpointing) for _ in range(2))
    wishes: dict[str, Any] = {"num_inference_steps": 60, "scheduler": "euler-ancestral"}
    recorder = Recorder()
    order = order_of(first, **wishes)
    unbroken = made(first, order, recorder)
    kept = [event.data["file"] for event in recorder.named(EventName.CHECKPOINT)]

    assert len(kept) == 1
    assert order.checkpoint_dir is not None
    resumed = made(second, resuming(order_of(second, **wishes), order.checkpoint_dir / str(kept[0])))

    assert resumed == unbroken
    usual, none = order_of(first, num_inference_steps=20), Recorder()
    made(first, usual, none)
    assert none.named(EventName.CHECKPOINT) == [], "a job of the usual length is faster made again"


@pytest.mark.parametrize(("mode", "calls_per_step"), [(ExecutionMode.LEGACY_CALL, 1), (ExecutionMode.MODULAR, 2)])
def test_the_steps_that_were_made_are_not_computed_again_but_for_the_first(
    hosts: Hosts, mode: ExecutionMode, calls_per_step: int
) -> None:
    first, _ = hosts.fresh(SDXL, mode=mode)
    checkpoint = broken_off(first, order_of(first))
    second, loads = hosts.fresh(SDXL, mode=mode)
    made(second, order_of(second))  # loads
    calls: list[object] = []
    loads.module.unet.conv_in.register_forward_hook(lambda *_: calls.append(None))

    made(second, resuming(order_of(second), checkpoint))

    assert len(calls) == calls_per_step * (1 + STEPS - KEPT)


def test_only_the_steps_from_there_on_are_told_and_kept(hosts: Hosts) -> None:
    first, _ = hosts.fresh(SDXL)
    second, _ = hosts.fresh(SDXL, checkpointing=Checkpointing(every_steps=2))
    checkpoint = broken_off(first, order_of(first, preview_every_steps=1))
    recorder, order = Recorder(), resuming(order_of(second, preview_every_steps=1), checkpoint)

    made(second, order, recorder)

    assert resumes(recorder) == [{"step": KEPT, "total": STEPS}]
    assert recorder.progress == [(step, STEPS) for step in range(KEPT + 1, STEPS + 1)]
    assert [event.data["step"] for event in recorder.named(EventName.PREVIEW)] == [7, 8]
    (kept,) = recorder.named(EventName.CHECKPOINT)
    assert kept.data["step"] == 8
    assert order.checkpoint_dir is not None
    assert [path.name for path in order.checkpoint_dir.iterdir()] == [kept.data["file"]]


def test_a_job_that_goes_on_can_be_broken_off_and_go_on_again(hosts: Hosts) -> None:
    benches = [hosts.fresh(SDXL)[0] for _ in range(4)]
    wishes: dict[str, Any] = {"num_inference_steps": 11, "scheduler": "euler-ancestral"}
    unbroken = made(benches[0], order_of(benches[0], **wishes))
    checkpoint = broken_off(benches[1], order_of(benches[1], **wishes), step=3)
    checkpoint = broken_off(benches[2], resuming(order_of(benches[2], **wishes), checkpoint), step=9)

    assert made(benches[3], resuming(order_of(benches[3], **wishes), checkpoint)) == unbroken


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(content: bytes) -> bytes:
    middle = len(content) * 3 // 4  # among the numbers, which no form guards
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("spoil", [cut, changed, lambda _: b"", lambda _: b"no checkpoint at all, but text " * 9])
def test_a_file_that_is_not_whole_has_its_job_begin_anew(
    hosts: Hosts, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench, _ = hosts.fresh(SDXL)
    unbroken = made(bench, order_of(bench))
    checkpoint = broken_off(bench, order_of(bench))
    checkpoint.write_bytes(spoil(checkpoint.read_bytes()))
    recorder = Recorder()

    assert made(bench, resuming(order_of(bench), checkpoint), recorder) == unbroken
    assert resumes(recorder) == []
    assert recorder.progress[0] == (1, STEPS)
    assert "begins anew" in caplog.text
    assert str(checkpoint.parent) not in caplog.text


@pytest.mark.parametrize(
    "wishes",
    [
        {"prompt": "a blue square"},
        {"seed": 6},
        {"num_inference_steps": STEPS + 1},
        {"scheduler": "ddim"},
        {"num_images_per_prompt": 2},
        {"width": 128},
    ],
)
def test_a_checkpoint_of_another_request_has_the_job_begin_anew(hosts: Hosts, wishes: dict[str, Any]) -> None:
    bench, _ = hosts.fresh(SDXL)
    checkpoint = broken_off(bench, order_of(bench))
    unbroken = made(bench, order_of(bench, **wishes))
    recorder = Recorder()

    assert made(bench, resuming(order_of(bench, **wishes), checkpoint), recorder) == unbroken
    assert resumes(recorder) == []


def test_a_checkpoint_that_is_gone_has_the_job_begin_anew(hosts: Hosts, tmp_path: Path) -> None:
    bench, _ = hosts.fresh(SDXL)

    assert made(bench, resuming(order_of(bench), tmp_path / "gone")) == made(bench, order_of(bench))


def test_a_job_on_its_way_to_its_checkpoint_hears_that_it_is_to_stop(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    bench, _ = hosts.fresh(SDXL)
    checkpoint = broken_off(bench, order_of(bench))
    order, recorder = resuming(order_of(bench), checkpoint), Recorder()
    original, calls = diffusers.EulerDiscreteScheduler.scale_model_input, 0

    def stop_at_third(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            bench.host.interrupt(order.job_id, InterruptReason.CANCEL)
        return original(*args)

    monkeypatch.setattr(diffusers.EulerDiscreteScheduler, "scale_model_input", stop_at_third)

    assert bench.run(order, recorder) == RunInterrupted(InterruptReason.CANCEL)
    assert calls == 3
    assert resumes(recorder) == []


@pytest.mark.parametrize("lacks", ["a wish of its model", "a folder"])
def test_a_run_keeps_nothing_that_nobody_asked_for(hosts: Hosts, lacks: str) -> None:
    bench, _ = hosts.fresh(SDXL, checkpointing=Checkpointing() if lacks == "a wish of its model" else None)
    order, recorder = order_of(bench), Recorder()
    if lacks == "a folder":
        order = dataclasses.replace(order, checkpoint_dir=None)

    made(bench, order, recorder)

    assert recorder.named(EventName.CHECKPOINT) == []
    assert order.checkpoint_dir is None or list(order.checkpoint_dir.iterdir()) == []


def test_a_state_that_no_file_can_hold_is_named_once_and_the_job_goes_on(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import diffusers

    class Sampler:
        pass

    bench, _ = hosts.fresh(SDXL)
    unbroken = made(bench, order_of(bench))
    original = diffusers.EulerDiscreteScheduler.step

    @functools.wraps(original)  # pipelines look for `generator` in its signature
    def with_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.noise_sampler = Sampler()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.EulerDiscreteScheduler, "step", with_more)
    recorder = Recorder()

    with caplog.at_level(logging.WARNING):
        assert made(bench, order_of(bench), recorder) == unbroken
    assert recorder.named(EventName.CHECKPOINT) == []
    assert [record.getMessage() for record in caplog.records] == [
        "this run keeps no checkpoints: the scheduler's noise_sampler holds a Sampler"
    ]


def test_a_folder_that_cannot_be_written_costs_a_job_its_checkpoints_alone(
    hosts: Hosts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench, _ = hosts.fresh(SDXL)
    unbroken = made(bench, order_of(bench))
    order, recorder = dataclasses.replace(order_of(bench), checkpoint_dir=tmp_path / "gone"), Recorder()

    assert made(bench, order, recorder) == unbroken
    assert recorder.named(EventName.CHECKPOINT) == []
    assert "a checkpoint could not be kept" in caplog.text
