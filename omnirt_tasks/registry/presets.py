"""Presets: named settings of quality against time; the later table wins."""

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import JsonValue

from omnirt_tasks.contract import Task
from omnirt_tasks.contract.base import JsonObject

PRESETS = ("fast", "balanced", "quality", "low-vram")
DEFAULT_PRESET = "balanced"

BASE: MappingProxyType[str, JsonObject] = MappingProxyType(
    {
        "fast": {"num_inference_steps": 20},
        "balanced": {},
        "quality": {"num_inference_steps": 40},
        "low-vram": {"num_inference_steps": 18, "dtype": "fp16"},
    }
)

_IMAGE: dict[str, JsonObject] = {
    "fast": {"guidance_scale": 5.5},
    "balanced": {"guidance_scale": 7.5},
    "quality": {"guidance_scale": 8.0},
}
_TEXT2VIDEO: dict[str, JsonObject] = {
    "fast": {"guidance_scale": 4.0},
    "balanced": {"guidance_scale": 5.0},
    "quality": {"guidance_scale": 6.0},
    "low-vram": {"guidance_scale": 4.0},
}
_IMAGE2VIDEO: dict[str, JsonObject] = {
    "fast": {"guidance_scale": 3.0},
    "balanced": {"guidance_scale": 3.5},
    "quality": {"guidance_scale": 4.0},
    "low-vram": {"guidance_scale": 3.0},
}

BY_TASK: MappingProxyType[Task, dict[str, JsonObject]] = MappingProxyType(
    {
        Task.TEXT2IMAGE: _IMAGE,
        Task.IMAGE2IMAGE: _IMAGE,
        Task.INPAINT: _IMAGE,
        Task.EDIT: _IMAGE,
        Task.TEXT2VIDEO: _TEXT2VIDEO,
        Task.IMAGE2VIDEO: _IMAGE2VIDEO,
    }
)


def whichever(**settings: JsonValue) -> Mapping[str, JsonObject]:
    """A model's own settings that hold under every preset: the shared ones would spoil what it makes."""
    return MappingProxyType({preset: dict(settings) for preset in PRESETS})
