"""The state of a diffusion run between two steps, to bytes and back: latents, scheduler, generators.

Tensors lie in safetensors, all else in JSON beside them, so that reading a file executes nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from workers.checkpoints import CheckpointUnusable, StateNotKept
from workers.host import RunOrder

FORMAT = 1
# The names of the three that every file has; those of the scheduler's tensors are numbers.
HEAD, LATENTS, GENERATOR = "head", "latents", "generator"
# A scheduler's configuration, which it is made from and does not change.
CONFIGURATION = "_internal_dict"
# What JSON that is too deep, or has numbers without end, raises.
_ENDLESS = (RecursionError, OverflowError)


@dataclass(frozen=True)
class DenoisingState:
    """A run after step `step` of `total`: all that its pipeline reads again and would not make again by itself.

    `run` names what it is a state of: one that differs in it does not fit. `scheduler` is the scheduler's attributes
    without its configuration and its functions.
    """

    run: str
    step: int
    total: int
    latents: torch.Tensor
    scheduler: Mapping[str, object]
    generators: tuple[torch.Tensor, ...]

    def encode(self) -> bytes:
        """The state in bytes. Raises StateNotKept for an attribute that is no number, no word, and no list of them."""
        tensors = {LATENTS: _plain(self.latents)}
        tensors |= {f"{GENERATOR}.{index}": state for index, state in enumerate(self.generators)}
        head = {
            "format": FORMAT,
            "run": self.run,
            "step": self.step,
            "total": self.total,
            "generators": len(self.generators),
            "scheduler": {name: _packed(value, name, tensors) for name, value in self.scheduler.items()},
        }
        tensors[HEAD] = torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)
        return safetensors.torch.save(tensors)

    @classmethod
    def decode(cls, content: bytes, device: torch.device) -> Self:
        """The state, with those tensors on `device` that were not on the CPU. Raises CheckpointUnusable."""
        try:
            tensors = safetensors.torch.load(content)
            head = json.loads(tensors[HEAD].numpy().tobytes())
            if head["format"] != FORMAT:
                raise CheckpointUnusable(f"its format is {head['format']}, and this is {FORMAT}")
            return cls(
                run=head["run"],
                step=int(head["step"]),
                total=int(head["total"]),
                latents=tensors[LATENTS].to(device),
                scheduler={name: _unpacked(value, tensors, device) for name, value in head["scheduler"].items()},
                generators=tuple(tensors[f"{GENERATOR}.{index}"] for index in range(head["generators"])),
            )
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, *_ENDLESS) as error:
            raise CheckpointUnusable("it is no state of a denoising") from error


def state_after(
    step: int, total: int, latents: torch.Tensor, scheduler: Any, generators: Sequence[torch.Generator], run: str
) -> DenoisingState:
    """The state as it is now; it shares its tensors with the run, so it is to be encoded before that goes on."""
    attributes = {
        name: value
        for name, value in vars(scheduler).items()
        if name != CONFIGURATION and not isinstance(value, FunctionType)
    }
    return DenoisingState(run, step, total, latents, attributes, tuple(each.get_state() for each in generators))


def can_be_put_back(state: DenoisingState, scheduler: Any, generators: Sequence[torch.Generator]) -> bool:
    """Whether `put_back` works, and changes no more than a run does; a file of ours is never in the way."""
    if any(name == CONFIGURATION or callable(getattr(scheduler, name, None)) for name in state.scheduler):
        return False
    try:
        for generator, then in zip(generators, state.generators, strict=True):
            generator.clone_state().set_state(then)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def put_back(state: DenoisingState, scheduler: Any, generators: Sequence[torch.Generator]) -> None:
    """Have scheduler and generators be as they were."""
    vars(scheduler).update(state.scheduler)
    for generator, then in zip(generators, state.generators, strict=True):
        generator.set_state(then)


def run_name(order: RunOrder, scheduler: Any) -> str:
    """What an order's states are states of, as a digest: the same name, the same numbers after each step."""
    import diffusers

    request = order.request
    means = {
        "diffusers": diffusers.__version__,
        "task": request.task,
        "model": request.model,
        "inputs": request.inputs.model_dump(mode="json"),
        "config": request.config,
        "scheduler": type(scheduler).__name__,
        # Some private entries are sets made into lists, whose order is another in each process.
        "scheduler_config": {name: value for name, value in scheduler.config.items() if not name.startswith("_")},
    }
    return hashlib.sha256(json.dumps(means, sort_keys=True, default=str).encode()).hexdigest()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that shares memory with no other, as the format wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _packed(value: object, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON, its tensors among `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = _plain(value)
        return {"tensor": key, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, np.ndarray) and value.dtype.kind in "bif":
        key = str(len(tensors))
        tensors[key] = torch.from_numpy(value.copy())
        return {"array": key}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(each, name, tensors) for each in value]}
    raise StateNotKept(f"the scheduler's {name} holds a {type(value).__name__}")


def _unpacked(packed: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> object:
    match packed:
        case {"tensor": key, "on_cpu": on_cpu}:
            return tensors[key] if on_cpu else tensors[key].to(device)
        case {"array": key}:
            return tensors[key].numpy()
        case {"list": values}:
            return [_unpacked(each, tensors, device) for each in values]
        case {"tuple": values}:
            return tuple(_unpacked(each, tensors, device) for each in values)
    return packed
