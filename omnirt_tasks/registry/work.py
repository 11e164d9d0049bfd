"""How much work a request is, in the unit that its model's pace is told in."""

from omnirt_tasks.contract import ResolvedRequest, Task
from omnirt_tasks.registry.options import COUNT_OPTION

PIXELS_PER_MEGAPIXEL = 1e6


def count_prompts(request: ResolvedRequest) -> int:
    """How many prompts the request has, each with pictures of its own; 1 for one that needs none."""
    prompt = request.inputs.prompt
    return len(prompt) if isinstance(prompt, tuple) else 1


def count_pictures(request: ResolvedRequest) -> int:
    """How many pictures the request makes: of each of its prompts as many as its config says, or one."""
    each = request.config.get(COUNT_OPTION)
    return count_prompts(request) * (each if isinstance(each, int) else 1)


def picture_prompt(request: ResolvedRequest, index: int) -> str | None:
    """The prompt of picture `index`: a list's prompts have their pictures one after the other, as many each."""
    prompt = request.inputs.prompt
    return prompt[index * len(prompt) // count_pictures(request)] if isinstance(prompt, tuple) else prompt


def one_picture(request: ResolvedRequest) -> ResolvedRequest:
    """The least of the request that is run at once: of a text2image job, which can be split, its first picture."""
    if request.task is not Task.TEXT2IMAGE or count_pictures(request) == 1:
        return request
    inputs = request.inputs.model_copy(update={"prompt": picture_prompt(request, 0)})
    config = request.config | ({COUNT_OPTION: 1} if COUNT_OPTION in request.config else {})
    return request.model_copy(update={"inputs": inputs, "config": config})


def megapixel_steps(request: ResolvedRequest) -> float | None:
    """Megapixels of all pictures or frames, times the steps that denoise them; None for work that has no such size."""
    config = request.config
    width_px, height_px, steps = (config.get(name) for name in ("width", "height", "num_inference_steps"))
    if not (isinstance(width_px, int) and isinstance(height_px, int) and isinstance(steps, int)):
        return None
    strength = config.get("strength")
    if isinstance(strength, int | float):  # a picture that is given saves the first steps
        steps = int(steps * strength)
    frames = request.inputs.num_frames or 1
    return width_px * height_px * count_pictures(request) * frames * steps / PIXELS_PER_MEGAPIXEL
