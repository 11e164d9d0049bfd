"""How much work a request is, in the unit that its model's pace is told in."""

from omnirt_tasks.contract import ResolvedRequest

PIXELS_PER_MEGAPIXEL = 1e6


def megapixel_steps(request: ResolvedRequest) -> float | None:
    """Megapixels of all pictures or frames, times the steps that denoise them; None for work that has no such size."""
    config = request.config
    width_px, height_px, steps = (config.get(name) for name in ("width", "height", "num_inference_steps"))
    if not (isinstance(width_px, int) and isinstance(height_px, int) and isinstance(steps, int)):
        return None
    strength, pictures = config.get("strength"), config.get("num_images_per_prompt")
    if isinstance(strength, int | float):  # a picture that is given saves the first steps
        steps = int(steps * strength)
    pictures = pictures if isinstance(pictures, int) else 1
    return width_px * height_px * pictures * (request.inputs.num_frames or 1) * steps / PIXELS_PER_MEGAPIXEL
