"""A job that shares its device calls draws what it draws alone: each listed class, classic and modular, in numbers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnirt_tasks.contract import ExecutionMode
from omnirt_tasks.errors import NonFiniteOutput
from omnirt_tasks.registry import discover
from tests.support.merging import Drawn, Studio, Wish
from tests.support.tiny.folders import save_tiny
from tests.support.tiny_models import save_tiny_sdxl
from workers.executors import diffusers_parts

# The schedulers meet NumPy's newest wishes in an old way of making arrays.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    # The tiny sd15 has a scheduler of another class, whose configuration says nothing of clipping.
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

CLASSIC, MODULAR = ExecutionMode.LEGACY_CALL, ExecutionMode.MODULAR
SHAPES, SDXL, SD15, SD3, FLUX, QWEN = "shapes", "sdxl-base-1.0", "sd15", "sd3-medium", "flux-dev", "qwen-image"
# Every class of denoiser that has a table, each way it can be run.
WAYS = (
    (SHAPES, CLASSIC),
    (SDXL, CLASSIC),
    (SDXL, MODULAR),
    (SD15, CLASSIC),
    (SD3, CLASSIC),
    (SD3, MODULAR),
    (FLUX, CLASSIC),
    (FLUX, MODULAR),
    ("flux-schnell", MODULAR),
    (QWEN, CLASSIC),
    (QWEN, MODULAR),
)
WAYS_WITH_UNET = tuple(way for way in WAYS if way[0] in (SHAPES, SDXL, SD15))
# The largest difference of any number, by what the model computes in.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
EIGHT_SCHEDULERS = {
    "euler-discrete": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PROMPTS = ("a red circle", "stars", "a small green star on a blue background")
NEGATIVE_PROMPTS = (None, "a blue square")
GUIDANCE = (5.0, 1.0, 3.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def studio(request: pytest.FixtureRequest, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """The model of (model, mode, dtype), with four more schedulers than requests may name."""
    model, mode, dtype = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers_parts, "SCHEDULERS", EIGHT_SCHEDULERS)
        studio = Studio(model, weights_of(model, folders), tmp_path_factory.mktemp(model), mode=mode, dtype=dtype)
        yield studio
        studio.close()


def weights_of(model: str, folders: Path) -> Path:
    """Those that ship with the project, or tiny ones, written once."""
    if (shipped := discover().find(model).weights) is not None:
        return shipped
    folder = folders / model
    if folder.exists():
        return folder
    return save_tiny_sdxl(folder) if model == SDXL else save_tiny(model, folder)


def on(ways: Iterable[tuple[str, ExecutionMode]], *dtypes: str) -> pytest.MarkDecorator:
    """The test, on each of these models and modes, in float64 unless told otherwise."""
    cases = [(model, mode, dtype) for model, mode in ways for dtype in dtypes or ("float64",)]
    return pytest.mark.parametrize("studio", cases, indirect=True, ids=["-".join(case) for case in cases])


def guided(model: str, scale: float) -> tuple[str, Any]:
    """How closely the prompt is followed, under the model's name for it."""
    return "true_cfg_scale" if model == QWEN else "guidance_scale", scale


def mixed(model: str, count: int = 8) -> list[Wish]:
    """Jobs that agree in nothing but the size of their pictures; one in three is without guidance."""
    return [
        Wish(
            seed=number,
            steps=3 + number % 4,
            prompt=PROMPTS[number % len(PROMPTS)],
            negative_prompt=NEGATIVE_PROMPTS[number % 2],
            options=(guided(model, GUIDANCE[number % 3]),),
        )
        for number in range(count)
    ]


def apart(one: Drawn, other: Drawn) -> float:
    """The largest difference of any number, of the latents or of the pictures."""
    return max(
        float((mine - its).abs().max()) for mine, its in ((one.latents, other.latents), (one.numbers, other.numbers))
    )


def require_the_same(studio: Studio, wishes: Sequence[Wish], drawn: Sequence[Drawn], tolerance: float = 1e-9) -> None:
    """Each that stayed to its end drew what it draws alone."""
    for wish, each in zip(wishes, drawn, strict=True):
        if wish.leaves_at is None:
            assert apart(each, studio.alone(wish)) <= tolerance, wish


@on(WAYS, *TOLERANCE)
def test_a_job_merged_with_seven_others_draws_what_it_draws_alone(studio: Studio) -> None:
    wishes = mixed(studio.model)

    drawn = studio.together(wishes)

    require_the_same(studio, wishes, drawn, TOLERANCE[studio.dtype])
    assert min(each.mean for each in drawn) > 2, "they did share their forward passes"
    assert max(each.largest for each in drawn) == 8
    assert apart(drawn[0], drawn[3]) > 1e-2, "what they draw differs"


@on(WAYS_WITH_UNET, *TOLERANCE)
def test_eight_schedulers_share_forward_passes_and_each_draws_as_alone(studio: Studio) -> None:
    wishes = [
        replace(wish, steps=5, options=(*wish.options, ("scheduler", name)))
        for wish, name in zip(mixed(studio.model), EIGHT_SCHEDULERS, strict=True)
    ]

    drawn = studio.together(wishes)

    require_the_same(studio, wishes, drawn, TOLERANCE[studio.dtype])
    assert min(each.mean for each in drawn) > 2


@on(WAYS)
def test_who_leaves_midway_by_cancel_changes_nothing_for_who_stays(studio: Studio) -> None:
    wishes = [
        replace(wish, steps=6, leaves_at=1 + number if number % 2 else None)
        for number, wish in enumerate(mixed(studio.model, 4))
    ]

    drawn = studio.together(wishes)

    require_the_same(studio, wishes, drawn)
    assert [each.numbers is None for each in drawn] == [False, True, False, True]
    assert min(each.mean for each in drawn) > 1


@on(WAYS)
def test_who_joins_midway_draws_what_it_draws_alone_and_so_do_those_it_joins(studio: Studio) -> None:
    wishes = [
        replace(wish, steps=6, begins_at=max(0, number - 1)) for number, wish in enumerate(mixed(studio.model, 4))
    ]

    drawn = studio.together(wishes)

    require_the_same(studio, wishes, drawn)
    assert min(each.mean for each in drawn) > 1


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@on(WAYS)
def test_any_mix_of_jobs_draws_what_each_draws_alone(studio: Studio, data: st.DataObject) -> None:
    schedulers = ("native", *EIGHT_SCHEDULERS) if (studio.model, studio.mode) in WAYS_WITH_UNET else ("native",)
    first = data.draw(wish_of(studio.model, schedulers))
    others = data.draw(st.lists(wish_of(studio.model, schedulers, joins_before=first.steps), min_size=1, max_size=6))
    wishes = [first, *others]

    drawn = studio.together(wishes)

    require_the_same(studio, wishes, drawn)


@st.composite
def wish_of(draw: st.DrawFn, model: str, schedulers: Sequence[str], joins_before: int = 0) -> Wish:
    """A job of one or two pictures, which may join at a step before `joins_before`, and may leave at one of its own."""
    steps = draw(st.integers(2, 6))
    return Wish(
        seed=draw(st.integers(0, 2)),
        steps=steps,
        prompt=draw(st.sampled_from((*PROMPTS, PROMPTS[:2]))),
        negative_prompt=draw(st.sampled_from(NEGATIVE_PROMPTS)),
        options=(
            guided(model, draw(st.sampled_from((0.0, *GUIDANCE)))),
            ("scheduler", draw(st.sampled_from(schedulers))),
            ("num_images_per_prompt", draw(st.integers(1, 2))),
        ),
        begins_at=draw(st.integers(0, joins_before - 1)) if joins_before else 0,
        leaves_at=draw(st.none() | st.integers(1, steps)),
    )


@on(WAYS)
def test_a_list_of_prompts_gives_each_picture_as_its_prompt_and_seed_give_it_alone(studio: Studio) -> None:
    wish = Wish(
        seed=7,
        prompt=PROMPTS,
        negative_prompt="a blue square",
        options=(guided(studio.model, 5.0), ("num_images_per_prompt", 2)),
    )

    whole = studio.alone(wish)

    assert len(whole.numbers) == 2 * len(PROMPTS)
    for index in range(len(whole.numbers)):
        single = studio.alone(
            replace(wish, seed=7 + index, prompt=PROMPTS[index // 2], options=(guided(studio.model, 5.0),))
        )
        assert float((whole.latents[index] - single.latents[0]).abs().max()) <= 1e-9, index
        assert float((whole.numbers[index] - single.numbers[0]).abs().max()) <= 1e-9, index


@on([(SDXL, CLASSIC), (QWEN, MODULAR)])
def test_a_picture_that_is_not_finite_fails_its_own_job_of_those_that_are_decoded_together(studio: Studio) -> None:
    wishes = [replace(wish, steps=3, spoilt=number == 1) for number, wish in enumerate(mixed(studio.model, 4))]

    drawn = studio.together(wishes)

    spoilt = drawn.pop(1)
    assert isinstance(spoilt.error, NonFiniteOutput)
    require_the_same(studio, [wish for wish in wishes if not wish.spoilt], drawn)
    assert all(each.error is None for each in drawn)


@on([(SDXL, CLASSIC)])
def test_a_job_that_has_its_vae_cut_the_picture_up_shares_the_denoiser_and_decodes_with_nobody(
    studio: Studio,
) -> None:
    plain, *others = mixed(SDXL, 4)
    wishes = [plain, *(replace(wish, options=(*wish.options, ("vae_slicing", True))) for wish in others)]

    drawn = studio.together(wishes)

    require_the_same(studio, wishes, drawn)
    decodes = [call.key for each in drawn for call in each.calls if call.part.endswith(".decode")]
    assert len(set(decodes)) == 4
    assert min(each.mean for each in drawn) > 1


@on(WAYS)
def test_calls_that_follow_their_table_give_the_same_alone_together_and_in_halves(studio: Studio) -> None:
    import torch

    jobs = [studio.alone(Wish(seed=seed, prompt=PROMPTS, options=(guided(studio.model, 5.0),))) for seed in range(2)]
    parts = {call.part for call in jobs[0].calls if call.joint is not None}

    assert parts >= {"vae.decode", "unet" if (studio.model, studio.mode) in WAYS_WITH_UNET else "transformer"}
    for part in parts:
        calls = [next(call for call in job.calls if call.part == part) for job in jobs]
        joint = calls[0].joint
        assert joint is not None
        assert (calls[0].rows >= 3, calls[0].key) == (True, calls[1].key), part
        with torch.no_grad():
            expected = [tensors_of(call()) for call in calls]
            together = [tensors_of(result) for result in joint.together(calls)]
            halves = joint.halves(calls[0])
            assert halves is not None
            whole = tensors_of(joint.whole(halves[0](), halves[1]()))
        assert halves[0].rows + halves[1].rows == calls[0].rows
        for mine, its in zip([*together, whole], [*expected, expected[0]], strict=True):
            assert max(float((one - other).abs().max()) for one, other in zip(mine, its, strict=True)) <= 1e-9, part
        memory = [tensor.untyped_storage().data_ptr() for result in together for tensor in result]
        assert len(set(memory)) == len(memory), f"results of {part} share memory"


def tensors_of(result: Any) -> list[Any]:
    """Every tensor of a result."""
    if hasattr(result, "parameters"):
        return [result.parameters]
    if not isinstance(result, tuple | dict):
        return [] if result is None else [result]
    return [tensor for each in (result.values() if isinstance(result, dict) else result) for tensor in tensors_of(each)]
