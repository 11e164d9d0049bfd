"""The bare pipeline, called in this process: what a bench holds the system against."""

from pathlib import Path
from typing import Any

from omnirt_tasks.contract import Task
from omnirt_tasks.registry import DiffusersModel, LoadRequest, ModelSpec


def plain_pipeline(spec: ModelSpec, weights: Path, device: str = "cpu", dtype: str = "fp32") -> Any:
    """The model's text2image pipeline, as its family loads it; it shows no progress of its own."""
    assert spec.loader is not None, "a model that is drawn with has a loader"
    loaded = spec.loader(spec, LoadRequest(weights, device, dtype))
    assert isinstance(loaded, DiffusersModel)
    pipeline = loaded.by_task[Task.TEXT2IMAGE]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
