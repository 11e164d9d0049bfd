"""Every diffusers family, loaded by its own loader from a folder of tiny weights of its real classes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnirt_tasks.contract import ExecutionMode, Task
from omnirt_tasks.registry import Verification, discover
from tests.support.hosts import Bench, Recorder, family_bench
from tests.support.media import difference, frames_of, opened
from tests.support.tiny.folders import TINY, save_tiny
from workers.host import OutputFile, RunOrder, RunOutcome, RunSucceeded

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MODELS = tuple(TINY)
PICTURES = tuple(model for model in MODELS if Task.TEXT2IMAGE in discover().find(model).tasks)
FILM = "wan2.1-t2v-14b"
FRAMES = 5
MODES = (ExecutionMode.LEGACY_CALL, ExecutionMode.MODULAR)
# Without modular blocks.
ONE_WAY = ("sd15",)
# Guidance off, by 0 and by 1, and on, with nothing and with something held against the prompt.
GUIDED = ((0.0, None), (1.0, None), (5.0, None), (5.0, ""), (5.0, "a blue square"))


def ways(models: Iterable[str]) -> list[tuple[str, ExecutionMode]]:
    """Each model in each mode that it can be run in."""
    return [(model, mode) for model in models for mode in MODES[: 1 if model in ONE_WAY else None]]


class Folders:
    """Tiny weights of each model, written once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def of(self, model: str) -> Path:
        folder = self._root / model
        return folder if folder.exists() else save_tiny(model, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("weights"))


class Benches:
    """Hosts of models with tiny weights, which end with the test."""

    def __init__(self, folders: Folders, tmp_path: Path) -> None:
        self._folders = folders
        self._tmp_path = tmp_path
        self._open: list[Bench] = []

    def of(self, model: str, **wishes: Any) -> Bench:
        own_path = self._tmp_path / f"bench-{len(self._open)}"
        own_path.mkdir()
        bench, _ = family_bench(own_path, model, self._folders.of(model), **wishes)
        self._open.append(bench)
        return bench

    def close(self) -> None:
        for bench in self._open:
            bench.host.close()


@pytest.fixture
def benches(folders: Folders, tmp_path: Path) -> Iterator[Benches]:
    made = Benches(folders, tmp_path)
    yield made
    made.close()


def order_of(bench: Bench, *, inputs: Mapping[str, Any] | None = None, **wishes: Any) -> RunOrder:
    """A job of the model's first task, of 64x64 in 3 steps by its default scheduler; five frames if it is a film."""
    spec = discover().find(bench.model)
    task = spec.tasks[wishes.setdefault("task", next(iter(spec.tasks)))]
    frames = {"num_frames": FRAMES} if "num_frames" in task.numbers else {}
    usual = {"num_inference_steps": 3, "scheduler": task.options["scheduler"].default}
    return bench.order(inputs=frames | dict(inputs or {}), **(usual | wishes))


def guided(model: str, scale: float) -> dict[str, float]:
    """How closely the prompt is followed, under the model's name for it."""
    return {"true_cfg_scale" if model == "qwen-image" else "guidance_scale": scale}


def outputs_of(outcome: RunOutcome) -> tuple[OutputFile, ...]:
    assert isinstance(outcome, RunSucceeded), outcome
    return outcome.outputs


def only(outcome: RunOutcome) -> OutputFile:
    (output,) = outputs_of(outcome)
    return output


def pictures_of(order: RunOrder, output: OutputFile) -> list[Image.Image]:
    """What the job made: its picture, or its film frame by frame."""
    path = order.output_dir / output.name
    if output.num_frames is None:
        return [opened(path)]
    film = frames_of(path)
    return [Image.frombytes("RGB", film.size, frame) for frame in film.frames]


def apart(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> int:
    """The largest difference of two jobs' pictures, or of two films frame by frame; see `difference`."""
    return max(difference(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("model", PICTURES)
def test_a_family_makes_a_picture_of_the_size_asked_in_the_steps_asked(benches: Benches, model: str) -> None:
    bench, recorder = benches.of(model), Recorder()
    order = order_of(bench, width=80, height=64)

    output = only(bench.run(order, recorder))

    picture = opened(order.output_dir / output.name)
    assert (picture.format, picture.size) == ("PNG", (80, 64))
    assert (output.mime, output.width, output.height) == ("image/png", 80, 64)
    assert recorder.progress == [(1, 3), (2, 3), (3, 3)]
    assert recorder.stages == ["load", "encode_prompt", "denoise", "decode", "export"]


@pytest.mark.parametrize("mode", MODES)
def test_a_film_has_the_frames_the_size_and_the_speed_asked_for(benches: Benches, mode: ExecutionMode) -> None:
    bench, recorder = benches.of(FILM, mode=mode), Recorder()
    order = order_of(bench, width=80, height=64, inputs={"num_frames": 9, "fps": 8})

    output = only(bench.run(order, recorder))

    film = frames_of(order.output_dir / output.name)
    assert (len(film.frames), film.size, film.fps) == (9, (80, 64), 8)
    assert (output.mime, output.num_frames, output.width, output.height) == ("video/mp4", 9, 80, 64)
    assert len(set(film.frames)) > 1, "it moves"
    assert recorder.progress == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "wishes", [{"task": Task.IMAGE2IMAGE, "strength": 0.7}, {"task": Task.INPAINT, "strength": 1.0}]
)
def test_stable_diffusion_changes_a_picture_it_is_given(
    benches: Benches, tmp_path: Path, wishes: dict[str, Any]
) -> None:
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.linear_gradient("L").convert("RGB").save(photo)
    Image.new("L", (64, 64), 255).save(mask)
    bench, recorder = benches.of("sd15"), Recorder()
    order = order_of(bench, files={"image": photo, "mask": mask}, num_inference_steps=10, **wishes)

    output = only(bench.run(order, recorder))

    assert opened(order.output_dir / output.name).size == (64, 64)
    assert recorder.progress[-1] == ((7, 7) if wishes["strength"] == 0.7 else (10, 10))


@pytest.mark.parametrize("model", [model for model in MODELS if model not in ONE_WAY])
def test_both_ways_to_run_a_family_make_the_same_picture(benches: Benches, model: str) -> None:
    classic, modular = (benches.of(model, mode=mode) for mode in MODES)

    def made(bench: Bench, scale: float, negative: str | None) -> list[Image.Image]:
        order = order_of(bench, inputs={"negative_prompt": negative}, **guided(model, scale))
        return pictures_of(order, only(bench.run(order)))

    differences = {case: apart(made(classic, *case), made(modular, *case)) for case in GUIDED}

    assert max(differences.values()) <= 1, differences


@pytest.mark.parametrize(("model", "mode"), ways(model for model in MODELS if "flux" not in model))
def test_what_is_held_against_the_prompt_changes_the_picture(benches: Benches, model: str, mode: ExecutionMode) -> None:
    bench = benches.of(model, mode=mode)
    orders = [
        order_of(bench, inputs={"negative_prompt": words}, **guided(model, 8.0)) for words in (None, "a green square")
    ]

    without, against = (pictures_of(order, only(bench.run(order))) for order in orders)

    assert apart(without, against) > 1


@pytest.mark.parametrize(("model", "mode"), ways(["qwen-image", FILM]))
def test_what_stands_beyond_the_tokens_that_are_read_changes_nothing(
    benches: Benches, model: str, mode: ExecutionMode
) -> None:
    bench = benches.of(model, mode=mode)

    def made(end: str, tokens: int) -> list[Image.Image]:
        order = order_of(bench, prompt=f"a red circle {end}", max_sequence_length=tokens)
        return pictures_of(order, only(bench.run(order)))

    assert apart(made("on blue", tokens=8), made("on grey", tokens=8)) == 0
    assert apart(made("on blue", tokens=400), made("on grey", tokens=400)) > 0


@pytest.mark.parametrize(("model", "mode"), ways(PICTURES))
def test_the_pictures_of_a_job_are_those_that_their_seeds_give_alone(
    benches: Benches, model: str, mode: ExecutionMode
) -> None:
    bench = benches.of(model, mode=mode)
    together, alone = order_of(bench, seed=8, num_images_per_prompt=2), order_of(bench, seed=9)

    first, second = outputs_of(bench.run(together))
    lone = only(bench.run(alone))

    assert second.seed == lone.seed == 9
    assert apart(pictures_of(together, second), pictures_of(alone, lone)) <= 1
    assert apart(pictures_of(together, first), pictures_of(alone, lone)) > 1


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_is_the_same_picture_again_and_another_is_another(benches: Benches, model: str) -> None:
    bench = benches.of(model)
    orders = [order_of(bench, seed=seed) for seed in (1, 1, 2)]

    one, again, other = (pictures_of(order, only(bench.run(order))) for order in orders)

    assert apart(one, again) == 0
    assert apart(one, other) > 1


@pytest.mark.parametrize(("model", "mode"), ways(MODELS))
def test_a_family_runs_in_its_own_number_format(benches: Benches, model: str, mode: ExecutionMode) -> None:
    (task, *_) = discover().find(model).tasks.values()
    bench = benches.of(model, mode=mode, dtype=str(task.options["dtype"].default))
    order = order_of(bench)

    assert pictures_of(order, only(bench.run(order)))


@pytest.mark.parametrize("model", MODELS)
def test_a_family_says_that_it_was_tried_with_tiny_weights(model: str) -> None:
    assert discover().find(model).verified is Verification.TINY_WEIGHTS
