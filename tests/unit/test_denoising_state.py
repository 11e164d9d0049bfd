"""The state of a denoising, to bytes and back to the last bit."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from workers.checkpoints import CheckpointUnusable, StateNotKept
from workers.host import RunOrder


def state_of(scheduler: Mapping[str, object], *, latents: Any = None) -> Any:
    import torch

    from workers.executors.denoising_state import DenoisingState

    latents = torch.zeros(1, 4, 2, 2) if latents is None else latents
    return DenoisingState("run", 3, 9, latents, scheduler, (torch.Generator("cpu").manual_seed(1).get_state(),))


def back(state: Any) -> Any:
    import torch

    from workers.executors.denoising_state import DenoisingState

    return DenoisingState.decode(state.encode(), torch.device("cpu"))


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -7, 1 / 3, 1e300, float("inf"), "epsilon", [], [None, 2], (1, (2, [3.5])), [[None], "x"]],
)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    restored = back(state_of({"value": value})).scheduler["value"]
    assert restored == value
    assert type(restored) is type(value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"])
def test_tensors_come_back_to_the_last_bit_whatever_their_numbers(dtype: str) -> None:
    import torch

    tensor = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2)) * 9).to(getattr(torch, dtype))
    restored = back(state_of({"outputs": [None, tensor, tensor[..., 0].T, torch.tensor(4.5)]}, latents=tensor))
    assert torch.equal(restored.latents, tensor)
    assert restored.latents.dtype is tensor.dtype
    assert torch.equal(restored.scheduler["outputs"][2], tensor[..., 0].T)
    assert restored.scheduler["outputs"][3].shape == ()


def test_numbers_that_are_none_and_arrays_of_nothing_come_back_too() -> None:
    import torch

    scheduler = {"nan": torch.tensor([float("nan")]), "empty": torch.zeros(0, 3), "array": np.arange(5)[::-1]}
    restored = back(state_of(scheduler)).scheduler
    assert torch.isnan(restored["nan"]).all()
    assert restored["empty"].shape == (0, 3)
    assert list(restored["array"]) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("value", [object(), {"a": 1}, np.float64(1.0), [lambda: None], b"bytes", np.array(["x"])])
def test_what_is_neither_is_named_and_not_kept(value: object) -> None:
    with pytest.raises(StateNotKept, match="the scheduler's odd "):
        state_of({"odd": value}).encode()


def with_head(head: bytes) -> bytes:
    import safetensors.torch
    import torch

    tensors = {"head": torch.frombuffer(bytearray(head), dtype=torch.uint8), "latents": torch.zeros(1)}
    return safetensors.torch.save(tensors)


def test_what_was_written_by_another_program_is_refused() -> None:
    import safetensors.torch
    import torch

    from workers.executors.denoising_state import DenoisingState

    for content in (
        b"",
        b"x" * 100,
        safetensors.torch.save({"latents": torch.zeros(1)}),
        safetensors.torch.save({"head": torch.frombuffer(bytearray(b'{"format": 1}'), dtype=torch.uint8)}),
        safetensors.torch.save({"head": torch.frombuffer(bytearray(b'{"format": 2}'), dtype=torch.uint8)}),
        *map(
            with_head,
            (
                b"[1, 2",
                b"[" * 100_000,
                b'{"format": 1, "run": "", "step": Infinity}',
                b'{"format": 1, "run": "", "step": 1, "total": 2, "generators": 1e999, "scheduler": {}}',
                b'{"format": 1, "run": "", "step": 1, "total": 2, "generators": 9, "scheduler": {}}',
                b'{"format": 1, "run": "", "step": 1, "total": 2, "generators": 0, "scheduler": {"a": {"list": 5}}}',
            ),
        ),
    ):
        with pytest.raises(CheckpointUnusable):
            DenoisingState.decode(content, torch.device("cpu"))


def test_only_what_a_run_leaves_behind_can_be_put_back() -> None:
    import diffusers
    import torch

    from workers.executors.denoising_state import can_be_put_back

    scheduler, generator = diffusers.EulerDiscreteScheduler(), torch.Generator("cpu")
    scheduler.step = functools.wraps(scheduler.step)(lambda *_: None)  # as a run's own is
    whole = state_of({"_step_index": 3, "an_attribute_that_comes_later": None})
    assert can_be_put_back(whole, scheduler, [generator])
    for name in ("step", "set_timesteps", "_internal_dict", "__class__"):
        assert not can_be_put_back(state_of({name: 1}), scheduler, [generator]), name
    for then in (torch.zeros(3), torch.zeros(5056, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8)):
        assert not can_be_put_back(replace(whole, generators=(then,)), scheduler, [generator])
    assert not can_be_put_back(whole, scheduler, [])


def test_a_state_holds_no_word_of_the_prompt() -> None:
    import diffusers
    import torch

    from workers.executors.denoising_state import run_name, state_after

    scheduler = diffusers.EulerDiscreteScheduler()
    inputs = Inputs(prompt="a secret wish")
    request = ResolvedRequest(task=Task.TEXT2IMAGE, model="shapes", backend="cpu", inputs=inputs, config={"seed": 1})
    order = RunOrder("job", 1, request, Path())
    run = run_name(order, scheduler)
    content = state_after(1, 2, torch.zeros(1), scheduler, [torch.Generator("cpu")], run).encode()
    assert run.encode() in content
    assert b"secret" not in content
