"""Sends the calls of heavy modules to the device thread, whatever pipeline makes them.

A module's method is wrapped once, on the instance, before any other hook. Inside a job the wrapper hands the call to
the job; anywhere else (the device thread, a script) it is the method itself.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from omnirt_tasks.errors import NonFiniteOutput
from workers.context import current_job
from workers.device import DeviceCall

# Which stage a job is in while it calls a component, by the beginning of the component's name; others change nothing.
STAGE_OF_COMPONENT: Mapping[str, str] = {
    "text_encoder": "encode_prompt",
    "image_encoder": "encode_prompt",
    "unet": "denoise",
    "transformer": "denoise",
    "prior": "denoise",
    "controlnet": "denoise",
}
STAGE_OF_VAE_METHOD: Mapping[str, str] = {"encode": "encode_prompt", "decode": "decode"}


def send_to_device(components: Mapping[str, Any]) -> None:
    """Wrap every module among the components of a freshly loaded pipeline: once, for all jobs that share them."""
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        if hasattr(component, "encode") and hasattr(component, "decode"):
            _keep_in_fp32_if_it_must(component)
            for method, stage in STAGE_OF_VAE_METHOD.items():
                _wrap(component, method, stage)
        else:
            stages = (stage for prefix, stage in STAGE_OF_COMPONENT.items() if name.startswith(prefix))
            _wrap(component, "forward", next(stages, None))


def placement(components: Mapping[str, Any]) -> dict[str, str]:
    """Each module's device and number format: {"unet": "cuda:0 float16"}."""
    placed = {}
    for name, component in components.items():
        first = next(component.parameters(), None) if isinstance(component, nn.Module) else None
        if first is not None:
            placed[name] = f"{first.device} {str(first.dtype).removeprefix('torch.')}"
    return placed


def _wrap(module: nn.Module, method: str, stage: str | None) -> None:
    original: Callable[..., Any] = getattr(module, method)
    in_job = _checked(original) if method == "decode" else original

    @functools.wraps(original)  # pipelines look into signatures
    def on_device(*args: Any, **kwargs: Any) -> Any:
        job = current_job()
        if job is None:
            return original(*args, **kwargs)
        return job.on_device(DeviceCall(module, in_job, args, kwargs), stage)

    setattr(module, method, on_device)


def _checked(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder that refuses to give NaN or infinity; later steps clamp, and would hide it."""

    @functools.wraps(decode)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = decode(*args, **kwargs)
        require_finite(result[0])
        return result

    return checked


def require_finite(tensor: torch.Tensor) -> None:
    """Raise NonFiniteOutput unless every number is finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteOutput(
            "The model's output holds NaN or infinity.", "Try another seed, a lower guidance_scale or dtype fp32."
        )


def _keep_in_fp32_if_it_must(vae: Any) -> None:
    """Keep a VAE that overflows in half precision in fp32 for good.

    Pipelines would cast it back and forth around each call, under the feet of the jobs that share it.
    """
    if not getattr(vae.config, "force_upcast", False):
        return
    vae.to(torch.float32)
    vae.register_to_config(force_upcast=False)  # so that no pipeline casts it
    for method in STAGE_OF_VAE_METHOD:
        setattr(vae, method, _in_fp32(getattr(vae, method)))


def _in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def cast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(tensor.to(torch.float32), *args, **kwargs)

    return cast
