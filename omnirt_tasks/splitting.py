"""Splitting: how a request for many pictures becomes parts, each an ordinary request for some of them."""

from collections.abc import Iterable, Sequence
from math import ceil

from omnirt_tasks.contract import ResolvedRequest, Task, WorkerCapability
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.jobs.values import NewPart
from omnirt_tasks.registry.options import COUNT_OPTION
from omnirt_tasks.registry.spec import SEED_MAX
from omnirt_tasks.registry.work import count_pictures, picture_prompt

PICTURES_UNMEASURED = 4
"""The pictures of a part where no worker has measured what shares well."""
ROWS_PER_PICTURE = 2
"""With guidance a picture is two rows of the denoiser's call."""
# The beginnings of the names that denoisers have in chunk measures.
DENOISERS = ("unet", "transformer", "denoise")


def split(request: ResolvedRequest, pictures_per_part: int) -> tuple[NewPart, ...]:
    """The parts of a text2image request: consecutive pictures, as evenly as can be, at most `pictures_per_part` each.

    Picture i is that of prompt i // num_images_per_prompt with the seed plus i, whatever the parts. None where one part
    would do, and for every other task.
    """
    prompts = _prompt_of_each_picture(request)
    count = ceil(len(prompts) / max(pictures_per_part, 1))
    if count < 2:
        return ()
    size, larger = divmod(len(prompts), count)
    parts: list[NewPart] = []
    first = 0
    for number in range(count):
        end = first + size + (number < larger)
        parts.append(NewPart(_share(request, prompts[first:end], first), first))
        first = end
    return tuple(parts)


def pictures_per_part(
    workers: Iterable[WorkerCapability], queue: str, request: ResolvedRequest, max_batch_size: int | None = None
) -> int:
    """How many pictures of the request make up one chunk, whichever of the queue's live workers takes it; at least 1.

    That is what fits the smallest limit that any of them has measured for the request's size and dtype, and
    PICTURES_UNMEASURED where none has, or nothing says yet that more would not pay; never more than `max_batch_size`.
    """
    abilities = [worker.abilities.get(request.model) for worker in workers if queue in worker.queues]
    measures = [measure for ability in abilities if ability is not None for measure in ability.chunks]
    known = [_pictures(measure) for measure in measures if _is_of_denoiser(measure) and _is_alike(measure, request)]
    pictures = min(known, default=PICTURES_UNMEASURED)
    return max(1, pictures if max_batch_size is None else min(pictures, max_batch_size))


def _pictures(measure: ChunkMeasure) -> int:
    pictures = measure.limit // ROWS_PER_PICTURE
    largest = max(map(int, measure.step_ms), default=0)
    return max(pictures, PICTURES_UNMEASURED) if measure.limit >= largest else pictures


def _prompt_of_each_picture(request: ResolvedRequest) -> Sequence[str]:
    if request.task is not Task.TEXT2IMAGE:
        return ()
    prompts = [picture_prompt(request, index) for index in range(count_pictures(request))]
    return [prompt for prompt in prompts if prompt is not None]


def _share(request: ResolvedRequest, prompts: Sequence[str], first: int) -> ResolvedRequest:
    """The request for these of its pictures alone, the first of which is picture `first` of the whole."""
    config = dict(request.config)
    seed = config.get("seed")
    assert isinstance(seed, int), "a resolved request has a seed"
    config["seed"] = (seed + first) % (SEED_MAX + 1)
    counts = COUNT_OPTION in config
    alike = len(set(prompts)) == 1 and (counts or len(prompts) == 1)
    if counts:
        config[COUNT_OPTION] = len(prompts) if alike else 1
    inputs = request.inputs.model_copy(update={"prompt": prompts[0] if alike else tuple(prompts)})
    return request.model_copy(update={"inputs": inputs, "config": config})


def _is_of_denoiser(measure: ChunkMeasure) -> bool:
    return measure.module.startswith(DENOISERS)


def _is_alike(measure: ChunkMeasure, request: ResolvedRequest) -> bool:
    """Whether it was measured at the request's size, and at its dtype as far as both tell one."""
    size, _, dtype = measure.shape.partition(" ")
    config = request.config
    wished = config.get("dtype")
    return size == f"{config.get('width')}x{config.get('height')}" and (not dtype or wished in {None, dtype})
