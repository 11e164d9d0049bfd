"""The options that models share, with the project's bounds; a family narrows them where it must."""

from collections.abc import Iterable, Mapping

from omnirt_tasks.registry.presets import DEFAULT_PRESET, PRESETS
from omnirt_tasks.registry.spec import SEED_MAX, Option, OptionKind

STEPS_MAX = 200
PICTURES_MAX = 16
COUNT_OPTION = "num_images_per_prompt"
GUIDANCE_MAX = 50
SIZE_MIN_PX = 64
SIZE_MULTIPLE_PX = 8
SEQUENCE_MAX_TOKENS = 512
FPS_MAX = 120
DTYPES = ("fp32", "fp16", "bf16")
SCHEDULERS = ("euler-discrete", "ddim", "dpm-solver", "euler-ancestral", "native")
NATIVE = "native"
"""The scheduler that the weights came with."""
ANY_DEVICE = "auto"


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


def pictures(maximum: int = PICTURES_MAX) -> Option:
    """How many pictures of each prompt; `maximum` bounds those of all prompts of a job together."""
    return Option(
        COUNT_OPTION,
        OptionKind.INTEGER,
        1,
        "Pictures of each prompt; its maximum is that of a whole job.",
        minimum=1,
        maximum=maximum,
    )


def size(
    name: str,
    default_px: int,
    *,
    minimum_px: int = SIZE_MIN_PX,
    maximum_px: int,
    multiple_px: int = SIZE_MULTIPLE_PX,
) -> Option:
    """Width or height of the picture."""
    return Option(
        name,
        OptionKind.INTEGER,
        default_px,
        f"{name.capitalize()} of the picture.",
        minimum=minimum_px,
        maximum=maximum_px,
        multiple_of=multiple_px,
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


def true_cfg_scale(default: float) -> Option:
    """How closely the prompt is followed, for models whose guidance_scale is something else."""
    return Option(
        "true_cfg_scale",
        OptionKind.NUMBER,
        default,
        "How closely the prompt is followed, against the negative prompt.",
        minimum=0,
        maximum=GUIDANCE_MAX,
    )


def max_sequence_length(default: int, maximum: int = SEQUENCE_MAX_TOKENS) -> Option:
    """How many tokens of the prompt are read."""
    return Option(
        "max_sequence_length",
        OptionKind.INTEGER,
        default,
        "Tokens of the prompt that are read; what is longer is cut.",
        minimum=1,
        maximum=maximum,
        unit="tokens",
    )


def vae_slicing() -> Option:
    """Whether pictures are decoded one at a time."""
    return Option(
        "vae_slicing", OptionKind.BOOLEAN, False, "Decode the pictures of a job one by one: less memory, more time."
    )


def vae_tiling() -> Option:
    """Whether a large picture is decoded in tiles."""
    return Option(
        "vae_tiling", OptionKind.BOOLEAN, False, "Decode large pictures in overlapping tiles: less memory, more time."
    )


def compiled() -> Option:
    """Whether the denoiser is compiled when it is loaded."""
    return Option(
        "compile", OptionKind.BOOLEAN, False, "Compile the denoiser: the first job takes long, later ones less time."
    )


def device() -> Option:
    """Which device the job is to run on."""
    return Option("device", OptionKind.TEXT, ANY_DEVICE, 'Device by name, as "cuda:1"; "auto" is any.')


def devices(maximum: int, default: int = 1) -> Option:
    """How many devices a rank group's model is spread over; its loader gives that many ranks."""
    return Option(
        "devices",
        OptionKind.INTEGER,
        default,
        "Devices that the job runs on together.",
        minimum=1,
        maximum=maximum,
    )


def frames(default: int, maximum: int, multiple_of: int = 4, remainder: int = 1) -> Option:
    """How many frames a video has: an input, not an option. By default 4n + 1, as video autoencoders want it."""
    return Option(
        "num_frames",
        OptionKind.INTEGER,
        default,
        "Frames of the video.",
        minimum=remainder or multiple_of,
        maximum=maximum,
        multiple_of=multiple_of,
        remainder=remainder,
        unit="frames",
    )


def fps(default: int, maximum: int = FPS_MAX) -> Option:
    """How fast a video plays: an input, not an option."""
    return Option("fps", OptionKind.INTEGER, default, "Frames per second.", minimum=1, maximum=maximum, unit="1/s")


def picture_options(
    width: int,
    height: int,
    *,
    maximum_px: int,
    steps: int,
    guidance: float | None,
    minimum_px: int = SIZE_MIN_PX,
    multiple_px: int = SIZE_MULTIPLE_PX,
    scheduler: str = NATIVE,
    schedulers: tuple[str, ...] = (NATIVE,),
    dtype: str = "fp16",
    strength: float | None = None,
    per_job: int = PICTURES_MAX,
    tiling: bool = True,
    more: Iterable[Option] = (),
) -> Mapping[str, Option]:
    """The options of a diffusion model that makes pictures or videos, by name; sizes in pixels.

    `guidance` None leaves guidance_scale out, as `strength` does for models without an input picture. `per_job` is
    the most pictures in a job; 1, for videos, leaves the option out. `tiling` is False for a model whose VAE knows no
    tiles. `more` are the model's own options.
    """
    fields: list[Option | None] = [
        preset(),
        seed(),
        _steps(steps),
        None if guidance is None else _guidance(guidance),
        None if per_job == 1 else pictures(per_job),
        size("width", width, minimum_px=minimum_px, maximum_px=maximum_px, multiple_px=multiple_px),
        size("height", height, minimum_px=minimum_px, maximum_px=maximum_px, multiple_px=multiple_px),
        _scheduler(scheduler, schedulers),
        _dtype(dtype),
        None if per_job == 1 else vae_slicing(),
        vae_tiling() if tiling else None,
        compiled(),
        device(),
        None if strength is None else _strength(strength),
        *more,
    ]
    return by_name(field for field in fields if field is not None)


# Under these names too: picture_options takes the defaults under the options' own.
_steps, _guidance, _scheduler, _dtype, _strength = steps, guidance, scheduler, dtype, strength
