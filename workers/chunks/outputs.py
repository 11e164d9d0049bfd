"""The result of a call that was made for several: to each its rows, in memory of its own; and one from several."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Unsplittable(RuntimeError):
    """A result that does not have the call's rows where they belong; whose is which cannot be told."""


def split(result: Any, rows: Sequence[int]) -> list[Any]:
    """Each call's part of the result, in order; none shares memory with another, nor with the whole.

    Raises Unsplittable for a tensor that does not have just these rows in dim 0, and for what it does not know.
    """
    if isinstance(result, torch.Tensor):
        if result.ndim == 0 or result.shape[0] != sum(rows):
            raise Unsplittable(f"A result of shape {tuple(result.shape)} is not of {sum(rows)} rows.")
        return [part.clone() for part in result.split(list(rows))]
    if result is None:
        return [None for _ in rows]
    if type(result) in (tuple, list):
        parts = [split(each, rows) for each in result]
        return [type(result)(part[number] for part in parts) for number in range(len(rows))]
    if isinstance(result, dict):  # the output classes of diffusers and transformers are such
        named = {name: split(each, rows) for name, each in result.items()}
        return [type(result)(**{name: part[number] for name, part in named.items()}) for number in range(len(rows))]
    if (distribution := _distribution(result)) is not None:
        return [distribution(part) for part in split(result.parameters, rows)]
    raise Unsplittable(f"A result that holds a {type(result).__name__} cannot be split.")


def join(first: Any, second: Any) -> Any:
    """The result of a call from those of its halves. Raises Unsplittable for what it does not know."""
    if type(first) is not type(second):
        raise Unsplittable(f"A {type(first).__name__} and a {type(second).__name__} are no halves of one result.")
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    if first is None:
        return None
    if type(first) in (tuple, list):
        return type(first)(join(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, dict):
        return type(first)(**{name: join(first[name], second[name]) for name in first})
    if (distribution := _distribution(first)) is not None:
        return distribution(join(first.parameters, second.parameters))
    raise Unsplittable(f"Results that hold a {type(first).__name__} cannot be joined.")


def _distribution(result: Any) -> "Callable[[torch.Tensor], Any] | None":
    """What makes an encoder's distribution from its parameters, if the result is one."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    if type(result) is not DiagonalGaussianDistribution:
        return None
    return lambda parameters: DiagonalGaussianDistribution(parameters, result.deterministic)
