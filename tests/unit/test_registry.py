"""Models are found, named once, and described by one source."""

import dataclasses

import pytest

from omnirt_tasks.contract import Task, Tier
from omnirt_tasks.errors import ConfigurationError, ModelNotFound
from omnirt_tasks.registry import Catalog, discover, presets


def test_every_family_in_the_folder_is_found() -> None:
    families = {"shapes", "stub", "sdxl", "sd15", "sd3", "flux", "qwen-image", "wan"}

    assert {spec.family for spec in discover()} >= families


def test_every_default_keeps_its_own_bounds() -> None:
    for spec in discover():
        for task in spec.tasks.values():
            for option in (*task.options.values(), *task.numbers.values()):
                if isinstance(option.default, int | float) and not isinstance(option.default, bool):
                    assert option.minimum is None or option.default >= option.minimum, (spec.id, option.name)
                    assert option.maximum is None or option.default <= option.maximum, (spec.id, option.name)
                    assert option.multiple_of is None or option.default % option.multiple_of == option.remainder, (
                        spec.id,
                        option.name,
                    )
                if option.choices is not None:
                    assert option.default in option.choices, (spec.id, option.name)


def test_every_preset_keeps_the_bounds_of_what_it_sets() -> None:
    for spec in discover():
        for task in spec.tasks.values():
            assert set(task.presets) <= set(presets.PRESETS), spec.id
            for settings in task.presets.values():
                for name, value in settings.items():
                    option = task.options[name]
                    assert option.choices is None or value in option.choices, (spec.id, name)
                    if isinstance(value, int | float):
                        assert option.minimum is None or value >= option.minimum, (spec.id, name)
                        assert option.maximum is None or value <= option.maximum, (spec.id, name)


def test_an_input_that_is_a_number_has_bounds_and_no_other_input_has() -> None:
    for spec in discover():
        for task in spec.tasks.values():
            inputs = {*task.required_inputs, *task.optional_inputs}
            assert inputs & {"num_frames", "fps"} == set(task.numbers), spec.id


def test_two_models_of_one_name_are_refused() -> None:
    spec = discover().find("shapes")

    with pytest.raises(ConfigurationError, match="shapes"):
        Catalog([spec, dataclasses.replace(spec, id="other", aliases=("shapes",))])


def test_an_alias_finds_its_model() -> None:
    spec = dataclasses.replace(discover().find("shapes"), aliases=("forms",))

    assert Catalog([spec]).find("forms").id == "shapes"


def test_a_name_that_is_far_from_all_gets_the_way_to_the_list() -> None:
    with pytest.raises(ModelNotFound, match="/v1/models"):
        discover().find("q" * 100)


def test_models_are_listed_by_task_and_tier() -> None:
    inpainters = discover().having(task=Task.INPAINT)

    assert {"sd15", "sdxl-base-1.0"} <= {spec.id for spec in inpainters}
    assert all(Task.INPAINT in spec.tasks for spec in inpainters)
    assert "flux-dev" not in {spec.id for spec in inpainters}
    assert all(spec.tier == "core" for spec in discover().having(tier=Tier.CORE))


@pytest.mark.parametrize("bounds", [{"max_batch_size": 0}, {"batch_window_ms": -1.0}])
def test_a_model_whose_bounds_on_sharing_are_none_is_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="max_batch_size"):
        dataclasses.replace(discover().find("stub"), **bounds)  # type: ignore[arg-type]
