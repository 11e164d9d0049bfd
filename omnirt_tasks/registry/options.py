"""The options that models share, with the project's bounds; a family narrows them where it must."""

from collections.abc import Iterable, Mapping

from omnirt_tasks.registry.presets import DEFAULT_PRESET, PRESETS
from omnirt_tasks.registry.spec import SEED_MAX, Option, OptionKind

STEPS_MAX = 200
PICTURES_MAX = 16
GUIDANCE_MAX = 50
SIZE_MIN_PX = 64
SIZE_MULTIPLE_PX = 8
DTYPES = ("fp32", "fp16", "bf16")


def by_name(options: Iterable[Option]) -> Mapping[str, Option]:
    """The options under their names."""
    return {option.name: option for option in options}


def preset() -> Option:
    """Which preset the other options start from."""
    return Option("preset", OptionKind.TEXT, DEFAULT_PRESET, "Speed against quality.", choices=PRESETS)


def seed() -> Option:
    """The seed of the first picture; picture i has seed + i."""
    return Option(
        "seed",
        OptionKind.INTEGER,
        None,
        "Seed of the first picture; null draws one, which is reported.",
        minimum=0,
        maximum=SEED_MAX,
        nullable=True,
    )


def steps(default: int) -> Option:
    """How many denoising steps."""
    return Option("num_inference_steps", OptionKind.INTEGER, default, "Denoising steps.", minimum=1, maximum=STEPS_MAX)


def guidance(default: float = 7.5) -> Option:
    """How closely the prompt is followed."""
    return Option(
        "guidance_scale",
        OptionKind.NUMBER,
        default,
        "How closely the prompt is followed.",
        minimum=0,
        maximum=GUIDANCE_MAX,
    )


def pictures() -> Option:
    """How many pictures."""
    return Option(
        "num_images_per_prompt", OptionKind.INTEGER, 1, "Pictures in this job.", minimum=1, maximum=PICTURES_MAX
    )


def size(name: str, default_px: int, *, minimum_px: int = SIZE_MIN_PX, maximum_px: int) -> Option:
    """Width or height of the picture."""
    return Option(
        name,
        OptionKind.INTEGER,
        default_px,
        f"{name.capitalize()} of the picture.",
        minimum=minimum_px,
        maximum=maximum_px,
        multiple_of=SIZE_MULTIPLE_PX,
        unit="px",
    )


def strength(default: float) -> Option:
    """How far the given picture is changed."""
    return Option(
        "strength",
        OptionKind.NUMBER,
        default,
        "How far the given picture is changed: 0 not at all, 1 wholly.",
        minimum=0,
        maximum=1,
    )


def scheduler(default: str, choices: tuple[str, ...]) -> Option:
    """Which scheduler denoises."""
    return Option("scheduler", OptionKind.TEXT, default, "Scheduler by name.", choices=choices)


def dtype(default: str) -> Option:
    """The number format of the weights; a device that cannot do it takes the nearest it can, and says so."""
    return Option("dtype", OptionKind.TEXT, default, "Number format of the weights.", choices=DTYPES)
