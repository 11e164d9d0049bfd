"""Sends the calls of heavy modules to the device thread, whatever pipeline makes them.

A module's method is wrapped once, on the instance, before any other hook. Inside a job the wrapper hands the call to
the job; anywhere else (the device thread, a script) it is the method itself.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from omnirt_tasks.errors import ModelFailed, NonFiniteOutput
from workers.context import current_job
from workers.device import DeviceCall

DENOISE = "denoise"
# Which stage a job is in while it calls a component, by the beginning of the component's name; others change nothing.
STAGE_OF_COMPONENT: Mapping[str, str] = {
    "text_encoder": "encode_prompt",
    "image_encoder": "encode_prompt",
    "unet": DENOISE,
    "transformer": DENOISE,
    "prior": DENOISE,
    "controlnet": DENOISE,
}
# What `compile` compiles.
DENOISERS = ("unet", "transformer")
STAGE_OF_VAE_METHOD: Mapping[str, str] = {"encode": "encode_prompt", "decode": "decode"}


def send_to_device(components: Mapping[str, Any], *, compiled: bool = False) -> None:
    """Wrap every module among the components of a freshly loaded pipeline: once, for all jobs that share them.

    `compiled` has the denoisers compiled, at their first call.
    """
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        if _is_vae(component):
            _wrap_vae(component)
        else:
            stage = next((stage for prefix, stage in STAGE_OF_COMPONENT.items() if name.startswith(prefix)), None)
            if compiled and name.startswith(DENOISERS):
                component.forward = torch.compile(component.forward)
            _wrap(component, "forward", component.forward, stage)


def keep_in_fp32_what_overflows(pipelines: Iterable[Any]) -> None:
    """Keep a VAE that overflows in half precision in fp32 for good, before it is wrapped.

    The pipelines would cast it back and forth around each call, under the feet of the jobs that share it. Others have
    the same mark in their VAE's configuration, where it is the default, and do without.
    """
    for pipeline in pipelines:
        if hasattr(pipeline, "upcast_vae") and getattr(pipeline.vae.config, "force_upcast", False):
            pipeline.vae.to(torch.float32)
            pipeline.vae.register_to_config(force_upcast=False)  # so that no pipeline casts it


def own_vae(shared: Any, *, slicing: bool, tiling: bool) -> Any:
    """A job's own VAE with the weights of the shared one, which goes on as it is.

    Raises ModelFailed for a VAE that cannot do what is asked.
    """
    own = copy.copy(shared)
    for method in STAGE_OF_VAE_METHOD:
        delattr(own, method)  # they are the shared one's
    for wanted, name in ((slicing, "slicing"), (tiling, "tiling")):
        if wanted:
            _enable(own, name)
    _wrap_vae(own)
    return own


def placement(components: Mapping[str, Any]) -> dict[str, str]:
    """Each module's device and number format: {"unet": "cuda:0 float16"}."""
    placed = {}
    for name, component in components.items():
        first = next(component.parameters(), None) if isinstance(component, nn.Module) else None
        if first is not None:
            placed[name] = f"{first.device} {str(first.dtype).removeprefix('torch.')}"
    return placed


def size_bytes(components: Mapping[str, Any]) -> int:
    """What the modules' parameters and buffers take, each piece of memory counted once."""
    modules = [component for component in components.values() if isinstance(component, nn.Module)]
    tensors = (tensor for module in modules for tensor in chain(module.parameters(), module.buffers()))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _is_vae(module: nn.Module) -> bool:
    return hasattr(module, "encode") and hasattr(module, "decode")


def _wrap_vae(vae: Any) -> None:
    dtype = vae.dtype  # not that of the pipeline, if the VAE is kept in fp32
    for method, stage in STAGE_OF_VAE_METHOD.items():
        _wrap(vae, method, _in_dtype(dtype, getattr(vae, method)), stage)


def _wrap(module: nn.Module, method: str, original: Callable[..., Any], stage: str | None) -> None:
    in_job = _checked(original) if method == "decode" else original

    @functools.wraps(original)  # pipelines look into signatures
    def on_device(*args: Any, **kwargs: Any) -> Any:
        job = current_job()
        if job is None:
            return original(*args, **kwargs)
        call = DeviceCall(module, in_job, args, kwargs)
        if stage == DENOISE and job.stand_in is not None:
            return job.stand_in(call, stage)
        return job.on_device(call, stage)

    setattr(module, method, on_device)


def _in_dtype(dtype: torch.dtype, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def cast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(tensor.to(dtype), *args, **kwargs)

    return cast


def _enable(vae: Any, name: str) -> None:
    enable = getattr(vae, f"enable_{name}", None)
    try:
        if enable is None:
            raise NotImplementedError
        enable()
    except NotImplementedError as error:
        raise ModelFailed(
            f"The model's {type(vae).__name__} knows no {name}.", f"Leave out vae_{name}, or set it to false."
        ) from error


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
