"""Which arguments of a module's method are batched, padded, listed or shared: a table per class.

A class without a table runs alone, and so does one whose method takes an argument that its table does not know: that
is asked once, when the model is loaded. A call that uses an argument in another way than its table says runs alone too.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from workers.chunks.arguments import (
    Absent,
    ListOfEqual,
    Mask,
    NamedRows,
    Numbers,
    Padded,
    Rows,
    Shared,
    Treatment,
    Unread,
)


@dataclass(frozen=True)
class Table:
    """How each argument of a method is treated; dim 0 of `main` tells a call's rows.

    In the dtypes `alone_in`, rows would see something of each other.
    """

    main: str
    arguments: Mapping[str, Treatment]
    alone_in: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True)
class Unshared:
    """Why calls are not made with others, as the end of a sentence that begins with what makes them.

    `unexpected` says that its class has a table which does not fit.
    """

    why: str
    unexpected: bool = False


_ROWS, _NUMBERS, _SHARED, _ABSENT, _UNREAD = Rows(), Numbers(), Shared(), Absent(), Unread()

_UNET = Table(
    main="sample",
    arguments={
        "sample": _ROWS,
        "timestep": _NUMBERS,
        "encoder_hidden_states": _ROWS,
        "class_labels": _ROWS,
        "timestep_cond": _ROWS,
        "attention_mask": _ROWS,
        "encoder_attention_mask": _ROWS,
        "added_cond_kwargs": NamedRows(frozenset({"text_embeds", "time_ids"})),
        "cross_attention_kwargs": _SHARED,
        "down_block_additional_residuals": _ABSENT,
        "mid_block_additional_residual": _ABSENT,
        "down_intrablock_additional_residuals": _ABSENT,
        "return_dict": _SHARED,
    },
)
_SD3 = Table(
    main="hidden_states",
    arguments={
        "hidden_states": _ROWS,
        "encoder_hidden_states": _ROWS,
        "pooled_projections": _ROWS,
        "timestep": _NUMBERS,
        "block_controlnet_hidden_states": _ABSENT,
        "joint_attention_kwargs": _SHARED,
        "skip_layers": _SHARED,
        "return_dict": _SHARED,
    },
)
_FLUX = Table(
    main="hidden_states",
    arguments={
        "hidden_states": _ROWS,
        "encoder_hidden_states": _ROWS,
        "pooled_projections": _ROWS,
        "timestep": _NUMBERS,
        "guidance": _NUMBERS,
        "img_ids": _SHARED,
        "txt_ids": _SHARED,
        "joint_attention_kwargs": _SHARED,
        "controlnet_block_samples": _ABSENT,
        "controlnet_single_block_samples": _ABSENT,
        "controlnet_blocks_repeat": _SHARED,
        "return_dict": _SHARED,
    },
)
_QWEN_IMAGE = Table(
    main="hidden_states",
    arguments={
        "hidden_states": _ROWS,
        "encoder_hidden_states": Padded(mask="encoder_hidden_states_mask"),
        "encoder_hidden_states_mask": Mask(of="encoder_hidden_states"),
        "timestep": _NUMBERS,
        "img_shapes": ListOfEqual(),  # the positions of all rows are made from the first one's
        "guidance": _NUMBERS,
        "attention_kwargs": _SHARED,
        "controlnet_block_samples": _ABSENT,
        "additional_t_cond": _ABSENT,
        "return_dict": _SHARED,
    },
)
_OUTPUT_WISHES: Mapping[str, Treatment] = {
    "output_hidden_states": _SHARED,
    "output_attentions": _SHARED,
    "return_dict": _SHARED,
}
_CLIP = Table(
    main="input_ids",
    arguments={"input_ids": _ROWS, "attention_mask": _ROWS, "position_ids": _ABSENT, **_OUTPUT_WISHES},
)
_T5 = Table(
    main="input_ids",
    arguments={"input_ids": _ROWS, "attention_mask": _ROWS, "inputs_embeds": _ABSENT, **_OUTPUT_WISHES},
    alone_in=frozenset({torch.float16}),  # an overflow in one row has all of them clamped lower
)
_VAE_ENCODE = Table(main="x", arguments={"x": _ROWS, "return_dict": _SHARED})
_VAE_DECODE = Table(main="z", arguments={"z": _ROWS, "return_dict": _SHARED})
_KL_VAE_DECODE = Table(main="z", arguments={**_VAE_DECODE.arguments, "generator": _UNREAD})

TABLES: Mapping[tuple[str, str, str], Table] = MappingProxyType(
    {
        ("diffusers", "UNet2DConditionModel", "forward"): _UNET,
        ("diffusers", "SD3Transformer2DModel", "forward"): _SD3,
        ("diffusers", "FluxTransformer2DModel", "forward"): _FLUX,
        ("diffusers", "QwenImageTransformer2DModel", "forward"): _QWEN_IMAGE,
        ("diffusers", "AutoencoderKL", "encode"): _VAE_ENCODE,
        ("diffusers", "AutoencoderKL", "decode"): _KL_VAE_DECODE,
        ("diffusers", "AutoencoderKLQwenImage", "encode"): _VAE_ENCODE,
        ("diffusers", "AutoencoderKLQwenImage", "decode"): _VAE_DECODE,
        ("transformers", "CLIPTextModel", "forward"): _CLIP,
        ("transformers", "CLIPTextModelWithProjection", "forward"): _CLIP,
        ("transformers", "T5EncoderModel", "forward"): _T5,
    }
)
"""By the library, the class and the method: of these classes themselves, not of others derived from them."""


def sharing_of(module: object, method: Callable[..., Any], name: str) -> Table | Unshared:
    """The table by which calls of a module's `method`, called `name`, are made with others, or why they are not."""
    kind = type(module)
    table = TABLES.get((kind.__module__.partition(".")[0], kind.__name__, name))
    if table is None:
        return Unshared(f"is a {kind.__name__}, for which there is no table of what may be merged.")
    parameters = inspect.signature(method).parameters
    open_to_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for parameter in parameters.values():
        known = parameter.kind is parameter.VAR_KEYWORD or parameter.name in table.arguments
        if not known or parameter.kind is parameter.VAR_POSITIONAL:
            return Unshared(f"takes an argument that is not known: {parameter.name!r}.", unexpected=True)
    if not open_to_more and (missing := table.arguments.keys() - parameters.keys()):
        return Unshared(f"no longer takes an argument that it is known by: {min(missing)!r}.", unexpected=True)
    dtype = getattr(module, "dtype", None)
    if dtype in table.alone_in:
        dtype_name = str(dtype).removeprefix("torch.")
        return Unshared(f"is a {kind.__name__} in {dtype_name}, whose rows would not be independent.")
    return table
