"""Every rule of a request, each with its place, and all of them at once."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnirt_tasks.contract import GenerateRequest, ResolvedRequest, Tier
from omnirt_tasks.errors import (
    BackendUnsupported,
    InvalidJson,
    ModelNotFound,
    ModelTierDisabled,
    OmnirtError,
    StubDisabled,
    ValidationFailed,
)
from omnirt_tasks.registry import discover
from omnirt_tasks.registry.presets import PRESETS
from omnirt_tasks.registry.spec import OptionKind
from omnirt_tasks.validation import Door, parse_json, parse_request, resolve

GOOD: dict[str, Any] = {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle"}}
SDXL: dict[str, Any] = {**GOOD, "model": "sdxl-base-1.0"}
PICTURE: dict[str, Any] = {**SDXL, "task": "image2image"}
FILM: dict[str, Any] = {"task": "text2video", "model": "wan2.1-t2v-14b", "inputs": {"prompt": "a cat"}}
FLUX: dict[str, Any] = {**GOOD, "model": "flux-dev"}


def failure_of(body: Any, door: Door | None = None) -> OmnirtError:
    catalog, door = discover(), door or Door()
    with pytest.raises(OmnirtError) as caught:
        resolve(parse_request(body, catalog, door), catalog, door=door).unwrap()
    return caught.value


def resolved(body: dict[str, Any]) -> ResolvedRequest:
    catalog = discover()
    request, _ = resolve(parse_request(body, catalog), catalog, door=Door()).unwrap()
    return request


def config_of(base: dict[str, Any] = GOOD, **config: Any) -> dict[str, Any]:
    return dict(resolved(with_config(base, **config)).config)


def with_config(base: dict[str, Any] = SDXL, **config: Any) -> dict[str, Any]:
    return {**base, "config": config}


def with_inputs(base: dict[str, Any] = PICTURE, **inputs: Any) -> dict[str, Any]:
    return {**base, "inputs": {"prompt": "a cat", **inputs}}


def with_prompts(*prompts: object, base: dict[str, Any] = GOOD) -> dict[str, Any]:
    return {**base, "inputs": {"prompt": list(prompts)}}


@pytest.mark.parametrize(
    ("body", "loc", "rule"),
    [
        ({**GOOD, "task": "text2smell"}, "task", "choice"),
        ({**GOOD, "task": None}, "task", "choice"),
        ({**GOOD, "task": "inpaint"}, "task", "choice"),
        ({"model": "shapes", "inputs": {"prompt": "a"}}, "task", "required"),
        ({**GOOD, "model": ""}, "model", "min_length"),
        ({**GOOD, "model": 5}, "model", "type"),
        ({**GOOD, "backend": "tpu"}, "backend", "choice"),
        ({**GOOD, "backend": 1}, "backend", "type"),
        ({**GOOD, "inputs": []}, "inputs", "type"),
        ({**GOOD, "config": "fast"}, "config", "type"),
        ({**GOOD, "async_run": "yes"}, "async_run", "type"),
        ({**GOOD, "adapters": [{"kind": "lora"}]}, "adapters", "unsupported"),
        ({**GOOD, "deadline_s": 0}, "deadline_s", "minimum"),
        ({**GOOD, "deadline_s": -1.5}, "deadline_s", "minimum"),
        ({**GOOD, "deadline_s": 30 * 24 * 3600 + 1}, "deadline_s", "maximum"),
        ({**GOOD, "deadline_s": 10**300}, "deadline_s", "maximum"),
        ({**GOOD, "deadline_s": math.inf}, "deadline_s", "finite"),
        ({**GOOD, "deadline_s": math.nan}, "deadline_s", "finite"),
        ({**GOOD, "deadline_s": "5"}, "deadline_s", "type"),
        ({**GOOD, "deadline_s": True}, "deadline_s", "type"),
        ({**GOOD, "webhook": "https://x"}, "webhook", "unsupported"),
        ({**GOOD, "priority": "urgent"}, "priority", "choice"),
        ({**GOOD, "priority": 0}, "priority", "choice"),
        ({**GOOD, "tags": "gold"}, "tags", "type"),
        ({**GOOD, "tags": ["Gold!"]}, "tags.0", "pattern"),
        ({**GOOD, "tags": list("abcde")}, "tags", "max_length"),
        ({**GOOD, "metadata": {"k": 1}}, "metadata.k", "type"),
        ({**GOOD, "metadata": {str(i): "" for i in range(17)}}, "metadata", "max_length"),
        ({**GOOD, "metadata": {"k": "v" * 513}}, "metadata.k", "max_length"),
        ({**GOOD, "model_path": "/etc/passwd"}, "model_path", "unknown_field"),
        ({**GOOD, "promt": "a"}, "promt", "unknown_field"),
        (with_config(output_dir="out"), "config.output_dir", "unknown_field"),
        (with_config(model_path="x"), "config.model_path", "unknown_field"),
        (with_config(widht=512), "config.widht", "unknown_field"),
        (with_config(width=513), "config.width", "multiple_of"),
        (with_config(width=56), "config.width", "minimum"),
        (with_config(height=4096), "config.height", "maximum"),
        (with_config(width="512"), "config.width", "type"),
        (with_config(width=512.5), "config.width", "type"),
        (with_config(width=True), "config.width", "type"),
        (with_config(width=None), "config.width", "type"),
        (with_config(num_inference_steps=0), "config.num_inference_steps", "minimum"),
        (with_config(num_inference_steps=10**9), "config.num_inference_steps", "maximum"),
        (with_config(num_images_per_prompt=-1), "config.num_images_per_prompt", "minimum"),
        (with_config(num_images_per_prompt=17), "config.num_images_per_prompt", "maximum"),
        (with_config(guidance_scale=-0.1), "config.guidance_scale", "minimum"),
        (with_config(guidance_scale=51), "config.guidance_scale", "maximum"),
        (with_config(guidance_scale=math.nan), "config.guidance_scale", "finite"),
        (with_config(guidance_scale=math.inf), "config.guidance_scale", "finite"),
        (with_config(guidance_scale={"a": 1}), "config.guidance_scale", "type"),
        (with_config(seed=-1), "config.seed", "minimum"),
        (with_config(seed=2**63), "config.seed", "maximum"),
        (with_config(seed=2**63 - 1, num_images_per_prompt=2), "config.seed", "maximum"),
        (with_config(seed="7"), "config.seed", "type"),
        (with_config(preset="fst"), "config.preset", "choice"),
        (with_config(scheduler="magic"), "config.scheduler", "choice"),
        (with_config(dtype="int8"), "config.dtype", "choice"),
        (with_config(with_inputs(image="upload:1"), strength=1.5), "config.strength", "maximum"),
        (with_config(with_inputs(image="upload:1"), strength=0), "config.strength", "minimum"),
        (with_config(with_inputs(image="upload:1"), num_inference_steps=1), "config.strength", "minimum"),
        ({**GOOD, "inputs": {}}, "inputs.prompt", "required"),
        ({**GOOD, "inputs": {"prompt": "  "}}, "inputs.prompt", "min_length"),
        ({**GOOD, "inputs": {"prompt": "x" * 8_001}}, "inputs.prompt", "max_length"),
        (with_inputs(image="upload:1", prompt=["a", "b"]), "inputs.prompt", "type"),
        (with_prompts(), "inputs.prompt", "min_length"),
        (with_prompts(*"abcdefghijklmnopq"), "inputs.prompt", "max_length"),
        (with_prompts("a", " ", "c"), "inputs.prompt.1", "min_length"),
        (with_prompts("a", "b", 3), "inputs.prompt.2", "type"),
        (with_prompts("a", None), "inputs.prompt.1", "type"),
        (with_prompts("a", ["b"]), "inputs.prompt.1", "type"),
        (with_prompts("x" * 8_001), "inputs.prompt.0", "max_length"),
        (with_config(with_prompts("a", "b"), num_images_per_prompt=9), "config.num_images_per_prompt", "maximum"),
        (with_config(with_prompts("a", "b"), seed=2**63 - 3, num_images_per_prompt=2), "config.seed", "maximum"),
        ({**GOOD, "inputs": {"prompt": "a", "negative_prompt": ["b"]}}, "inputs.negative_prompt", "type"),
        ({**GOOD, "inputs": {"prompt": 5}}, "inputs.prompt", "type"),
        ({**GOOD, "inputs": {"prompt": "a", "num_frames": 0}}, "inputs.num_frames", "unknown_field"),
        (with_inputs(), "inputs.image", "required"),
        (with_inputs(image="http://169.254.169.254/latest"), "inputs.image", "remote_url"),
        (with_inputs(image="FILE:///etc/passwd"), "inputs.image", "remote_url"),
        (with_inputs(image="/etc/passwd"), "inputs.image", "reference"),
        (with_inputs(image="artifact:../../etc/passwd"), "inputs.image", "reference"),
        (with_inputs(image="upload:../x"), "inputs.image", "reference"),
        (with_inputs(image=b"x"), "inputs.image", "type"),
        (with_inputs(FILM, num_frames=0), "inputs.num_frames", "minimum"),
        (with_inputs(FILM, num_frames=-3), "inputs.num_frames", "minimum"),
        (with_inputs(FILM, num_frames=10), "inputs.num_frames", "multiple_of"),
        (with_inputs(FILM, num_frames=8), "inputs.num_frames", "multiple_of"),
        (with_inputs(FILM, num_frames=10_001), "inputs.num_frames", "maximum"),
        (with_inputs(FILM, num_frames=9.0), "inputs.num_frames", "type"),
        (with_inputs(FILM, num_frames="9"), "inputs.num_frames", "type"),
        (with_inputs(FILM, num_frames=True), "inputs.num_frames", "type"),
        (with_inputs(FILM, fps=0), "inputs.fps", "minimum"),
        (with_inputs(FILM, fps=1_000), "inputs.fps", "maximum"),
        (with_config(FILM, num_frames=9), "config.num_frames", "unknown_field"),
        (with_config(FLUX, scheduler="ddim"), "config.scheduler", "choice"),
        (with_config(FLUX, width=1000), "config.width", "multiple_of"),
        (with_config({**FLUX, "model": "sd3-medium"}, width=1000), "config.width", "multiple_of"),
        (with_config({**FLUX, "model": "qwen-image"}, height=1000), "config.height", "multiple_of"),
        (with_config(FILM, height=488), "config.height", "multiple_of"),
        (with_config({**FLUX, "model": "qwen-image"}, guidance_scale=5.0), "config.guidance_scale", "unknown_field"),
        (with_config(FLUX, max_sequence_length=513), "config.max_sequence_length", "maximum"),
        (with_config(FLUX, true_cfg_scale=4.0), "config.true_cfg_scale", "unknown_field"),
        ({**GOOD, "model": "wan2.1-t2v-14b"}, "task", "choice"),
        ([1], "body", "type"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named_with_its_place(body: Any, loc: str, rule: str) -> None:
    error = failure_of(json.dumps(body) if isinstance(body, list) else body)

    assert isinstance(error, ValidationFailed)
    assert [(problem.loc, problem.rule) for problem in error.details] == [(loc, rule)]
    assert error.details[0].message


def test_all_problems_are_told_at_once_though_the_shape_is_wrong_too() -> None:
    body = {
        **GOOD,
        "priority": "urgent",
        "inputs": {"prompt": "", "mask": "x"},
        "config": {"width": 513, "num_inference_steps": 0, "seed": -1},
        "colour": "red",
    }

    error = failure_of(body)

    assert {problem.loc for problem in error.details} == {
        "priority",
        "colour",
        "inputs.prompt",
        "inputs.mask",
        "config.width",
        "config.num_inference_steps",
        "config.seed",
    }


def test_a_message_names_value_rule_and_remedy() -> None:
    (problem,) = failure_of(with_config(width=513)).details

    assert problem.message == "513 is not a multiple of 8; use 512 or 520."


def test_a_list_of_prompts_is_resolved_in_order_with_what_is_for_all_of_them() -> None:
    request = resolved({**GOOD, "inputs": {"prompt": ["a red star", "a blue ring"], "negative_prompt": "green"}})

    assert request.inputs.prompt == ("a red star", "a blue ring")
    assert request.inputs.negative_prompt == "green"
    assert ResolvedRequest.model_validate_json(request.model_dump_json()) == request, "it is the same once stored"


def test_too_many_pictures_are_told_with_both_numbers() -> None:
    (problem,) = failure_of(with_config(with_prompts("a", "b", "c"), num_images_per_prompt=6)).details

    assert problem.message == "3 prompts of 6 picture(s) each are 18 pictures; at most 16 are accepted."
    resolved(with_config(with_prompts(*"abcdefgh"), num_images_per_prompt=2))
    resolved(with_prompts(*"abcdefghijklmnop"))


def test_every_wrong_prompt_of_a_list_is_told() -> None:
    error = failure_of(with_prompts("a", "", "c", 4))

    assert [problem.loc for problem in error.details] == ["inputs.prompt.1", "inputs.prompt.3"]


def test_the_last_picture_of_all_prompts_has_a_seed() -> None:
    last = 2**63 - 1
    asked = with_config(with_prompts("a", "b"), seed=last - 3, num_images_per_prompt=2)

    assert resolved(asked).config["seed"] == last - 3
    asked["config"]["seed"] = last - 2
    (problem,) = failure_of(asked).details
    assert problem.message == f"{last - 2} leaves no seed for the last of 4 pictures; use at most {last - 3}."


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
def test_a_priority_goes_with_what_will_run(priority: str) -> None:
    assert resolved({**GOOD, "priority": priority}).priority == priority


def test_a_strength_that_leaves_no_step_is_told_the_least_that_does() -> None:
    asked = with_inputs(image="upload:1")

    (problem,) = failure_of(with_config(asked, strength=0.05, num_inference_steps=12)).details

    assert problem.message == "0.05 leaves none of 12 steps to run; use at least 0.084, or more steps."
    assert config_of(asked, strength=0.084, num_inference_steps=12)["strength"] == 0.084


@given(st.integers(1, 150), st.floats(0, 1))
def test_the_least_strength_that_is_told_is_enough(steps: int, strength: float) -> None:
    asked = with_inputs(image="upload:1")
    body = with_config(asked, strength=strength, num_inference_steps=steps)
    if steps * strength >= 1:
        resolved(body)
        return

    (problem,) = failure_of(body).details

    least = problem.message.partition("at least ")[2].partition(",")[0]
    resolved(with_config(asked, strength=float(least), num_inference_steps=steps))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (2, "2 is not 1 more than a multiple of 4; use 1 or 5."),
        (10, "10 is not 1 more than a multiple of 4; use 9 or 13."),
        (0, "0 is below 1; use 1 to 161."),
    ],
)
def test_a_number_of_frames_that_the_model_cannot_make_is_told_the_nearest(frames: int, message: str) -> None:
    (problem,) = failure_of(with_inputs(FILM, num_frames=frames)).details

    assert problem.message == message


def test_inputs_that_are_numbers_have_the_models_defaults() -> None:
    default = resolved(FILM).inputs
    asked = resolved(with_inputs(FILM, num_frames=9, fps=None)).inputs

    assert (default.num_frames, default.fps) == (81, 16)
    assert (asked.num_frames, asked.fps) == (9, 16)
    assert resolved(GOOD).inputs.num_frames is None


def test_a_scheduler_that_is_nearly_one_is_told_which() -> None:
    (problem,) = failure_of(with_config({**GOOD, "model": "sd15"}, scheduler="euler-discret")).details

    assert problem.message.endswith("Did you mean euler-discrete?")


@pytest.mark.parametrize(
    ("body", "door", "kind"),
    [
        ({**GOOD, "model": "shapez"}, Door(), ModelNotFound),
        ({**GOOD, "backend": "ascend"}, Door(), BackendUnsupported),
        ({**GOOD, "model": "stub"}, Door(allow_stub=False), StubDisabled),
        ({**GOOD, "model": "sdxl-turbo"}, Door(disabled_tiers=(Tier.EXPERIMENTAL,)), ModelTierDisabled),
    ],
)
def test_a_lone_problem_with_a_code_of_its_own_is_called_by_it(body: Any, door: Door, kind: type[OmnirtError]) -> None:
    error = failure_of(body, door)

    assert type(error) is kind
    assert error.hint is not None
    assert [problem.message for problem in error.details] == [f"{error.message} {error.hint}"]


def test_an_unknown_model_is_answered_with_the_nearest_names() -> None:
    error = failure_of({**GOOD, "model": "sdxl-base"})

    assert str(error).count("sdxl-base-1.0") == 1
    assert "sdxl-base-1.0" in error.details[0].message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nul",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        "[" * 100_000,
        '{"a":' * 40 + "1" + "}" * 40,
        b"\xff\xfe\xfa",
        '{"a": "\\ud800"}',
    ],
)
def test_what_is_no_json_is_invalid_json(text: str | bytes) -> None:
    with pytest.raises(InvalidJson):
        parse_json(text)


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 5_000])
def test_a_number_beyond_all_bounds_is_a_number_out_of_bounds(number: str) -> None:
    text = json.dumps(with_config(guidance_scale=-77)).replace("-77", number)

    assert [problem.loc for problem in failure_of(text).details] == ["config.guidance_scale"]


@pytest.mark.parametrize(
    ("preset", "steps", "guidance"),
    [("fast", 20, 5.5), ("balanced", 20, 7.5), ("quality", 40, 8.0), ("low-vram", 18, 7.5)],
)
def test_presets_fill_in_what_the_request_leaves_out(preset: str, steps: int, guidance: float) -> None:
    config = config_of(preset=preset)

    assert (config["preset"], config["num_inference_steps"], config["guidance_scale"]) == (preset, steps, guidance)


def test_an_explicit_option_wins_over_the_preset() -> None:
    assert config_of(preset="quality", num_inference_steps=7)["num_inference_steps"] == 7


def test_a_model_overrides_the_shared_presets() -> None:
    config = config_of({**GOOD, "model": "sdxl-turbo"}, preset="fast")

    assert (config["num_inference_steps"], config["guidance_scale"]) == (1, 0.0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", ["flux-schnell", "sd3.5-large-turbo"])
def test_a_model_of_few_steps_keeps_them_whatever_the_preset(model: str, preset: str) -> None:
    config = config_of({**GOOD, "model": model}, preset=preset)

    assert (config["num_inference_steps"], config["guidance_scale"]) == (4, 0.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_of_distilled_guidance_keeps_it_whatever_the_preset(preset: str) -> None:
    assert config_of(FLUX, preset=preset)["guidance_scale"] == 3.5


@pytest.mark.parametrize("body", [FLUX, {**GOOD, "model": "qwen-image"}, FILM])
def test_a_model_that_overflows_in_fp16_is_not_put_there_to_save_memory(body: dict[str, Any]) -> None:
    assert config_of(body, preset="low-vram")["dtype"] == "bf16"
    assert config_of({**GOOD, "model": "sd15"}, preset="low-vram")["dtype"] == "fp16"


@pytest.mark.parametrize(
    ("preset", "steps", "guidance"),
    [("fast", 20, 4.0), ("balanced", 40, 5.0), ("quality", 40, 6.0), ("low-vram", 18, 4.0)],
)
def test_a_film_has_presets_of_its_own_task(preset: str, steps: int, guidance: float) -> None:
    config = config_of(FILM, preset=preset)

    assert (config["num_inference_steps"], config["guidance_scale"]) == (steps, guidance)


def test_a_null_seed_is_drawn_and_reported() -> None:
    seeds = {config_of(seed=None)["seed"] for _ in range(5)}

    assert len(seeds) > 1
    assert all(isinstance(seed, int) and seed >= 0 for seed in seeds)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=10,
)
fields = st.sampled_from([*GenerateRequest.model_fields, "widht"])
options = st.sampled_from(
    [*discover().find("sdxl-base-1.0").tasks[next(iter(discover().find("shapes").tasks))].options]
)


@given(st.dictionaries(fields, json_values, max_size=5), st.dictionaries(options, json_values, max_size=4))
def test_whatever_json_comes_ends_in_a_request_or_in_a_callers_error(
    extra: dict[str, Any], config: dict[str, Any]
) -> None:
    catalog = discover()
    body = {**SDXL, "config": config} | extra

    try:
        request, spec = resolve(parse_request(body, catalog), catalog, door=Door()).unwrap()
    except OmnirtError as refused:
        error = refused
    else:
        for name, option in spec.tasks[request.task].options.items():
            value = request.config[name]
            if option.kind in {OptionKind.INTEGER, OptionKind.NUMBER}:
                assert isinstance(value, int | float)
                assert math.isfinite(value)
                assert option.minimum is None or value >= option.minimum
                assert option.maximum is None or value <= option.maximum
                assert option.multiple_of is None or value % option.multiple_of == 0
        return
    assert 400 <= error.http_status < 500
    assert error.message


def test_a_deadline_goes_with_what_will_run() -> None:
    assert resolved({**GOOD, "deadline_s": 90}).deadline_s == 90.0
    assert resolved(GOOD).deadline_s is None
