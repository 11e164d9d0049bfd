"""Sends the calls of heavy modules to the device thread, whatever pipeline makes them.

A module's method is wrapped once, on the instance, before any other hook. Inside a job the wrapper hands the call to
the job, as one that others may be made with where the class of the module has a table (`workers.chunks.tables`);
anywhere else (the device thread, a script) it is the method itself.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from omnirt_tasks.errors import ModelFailed, NonFiniteOutput
from workers.chunks.calls import ChunkKey, DeviceCall
from workers.chunks.methods import SharedMethod
from workers.chunks.tables import Table, Unshared, sharing_of
from workers.context import DENOISE, current_job
from workers.loading import Sharing

log = logging.getLogger(__name__)

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


def send_to_device(components: Mapping[str, Any], *, compiled: bool = False) -> Sharing:
    """Wrap every module among the components of a freshly loaded pipeline: once, for all jobs that share them.

    `compiled` has the denoisers compiled, at their first call. Gives which classes of modules have calls that jobs
    share, and why the denoiser's are not, where they are not; what should be shared and is not is warned of too.
    """
    classes: set[str] = set()
    unchunked: str | None = None
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        if _is_vae(component):
            shared = _wrap_vae(component, name)
        else:
            stage = next((stage for prefix, stage in STAGE_OF_COMPONENT.items() if name.startswith(prefix)), None)
            sharing = sharing_of(component, component.forward, "forward")
            if compiled and name.startswith(DENOISERS):
                component.forward = torch.compile(component.forward)
                sharing = Unshared("is compiled, which another number of rows would do anew.")
            _wrap(component, "forward", component.forward, stage, name, sharing)
            shared = _told(sharing, name)
            if not shared and stage == DENOISE and isinstance(sharing, Unshared):
                unchunked = unchunked or f"Its {name} {sharing.why}"
        if shared:
            classes.add(type(component).__name__)
    return Sharing(tuple(sorted(classes)), unchunked)


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
    wanted = [name for name, wish in (("slicing", slicing), ("tiling", tiling)) if wish]
    for name in wanted:
        _enable(own, name)
    _wrap_vae(own, " ".join(("vae", *wanted)))  # measured for itself
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


def _wrap_vae(vae: Any, name: str) -> bool:
    """Wrap both of its methods; whether jobs share calls of either."""
    dtype = vae.dtype  # not that of the pipeline, if the VAE is kept in fp32
    shared = False
    for method, stage in STAGE_OF_VAE_METHOD.items():
        original = getattr(vae, method)
        sharing = sharing_of(vae, original, method)
        part = f"{name}.{method}"
        _wrap(vae, method, _in_dtype(dtype, original), stage, part, sharing)
        shared = _told(sharing, part) or shared
    return shared


def _wrap(
    module: nn.Module,
    method: str,
    original: Callable[..., Any],
    stage: str | None,
    part: str,
    sharing: Table | Unshared,
) -> None:
    in_job = _calls_of(module, original, part, sharing)

    @functools.wraps(original)  # pipelines look into signatures
    def on_device(*args: Any, **kwargs: Any) -> Any:
        job = current_job()
        if job is None:
            return original(*args, **kwargs)
        call = in_job(args, kwargs)
        if stage == DENOISE and job.stand_in is not None:
            return job.stand_in(call, stage)
        result = job.on_device(call, stage)
        if method == "decode":  # later steps clamp, and would hide it; here it is the job's own result, and no other's
            require_finite(result[0])
        return result

    setattr(module, method, on_device)


def _calls_of(
    module: nn.Module, function: Callable[..., Any], part: str, sharing: Table | Unshared
) -> Callable[[tuple[Any, ...], Mapping[str, Any]], DeviceCall]:
    if isinstance(sharing, Table):
        return SharedMethod(module, function, part, sharing).call
    why = f"{part} {sharing.why}"
    return lambda args, kwargs: DeviceCall(module, function, args, kwargs, key=ChunkKey.alone(why), part=part)


def _told(sharing: Table | Unshared, part: str) -> bool:
    """Whether calls are shared; where they should be and are not, the log tells why."""
    if isinstance(sharing, Unshared) and sharing.unexpected:
        log.warning("jobs share no calls of this model's %s: it %s", part, sharing.why)
    return isinstance(sharing, Table)


def _in_dtype(dtype: torch.dtype, method: Callable[..., Any]) -> Callable[..., Any]:
    first = next(iter(inspect.signature(method).parameters))

    @functools.wraps(method)
    def cast(*args: Any, **kwargs: Any) -> Any:
        if args:
            return method(args[0].to(dtype), *args[1:], **kwargs)
        return method(**{**kwargs, first: kwargs[first].to(dtype)})

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


def require_finite(tensor: torch.Tensor) -> None:
    """Raise NonFiniteOutput unless every number is finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteOutput(
            "The model's output holds NaN or infinity.", "Try another seed, a lower guidance_scale or dtype fp32."
        )
