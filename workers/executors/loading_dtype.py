"""Keeps the default dtype that libraries set while they make a model from the jobs that run meanwhile.

Torch has one default dtype for the whole process. What a pipeline or a scheduler makes without naming a dtype (UniPC's
coefficients, the last sigma of flow matching, the mean of a VAE's latents) would be rounded to that of a neighbour's
model, and the picture would depend on who loads beside it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What makes numbers in the default dtype unless told otherwise.
MAKERS = frozenset(
    {
        *(torch.arange, torch.linspace, torch.logspace),
        *(torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.tensor),
        *(torch.empty, torch.empty_permuted, torch.empty_strided),
        *(torch.eye, torch.full, torch.ones, torch.zeros),
        *(torch.normal, torch.rand, torch.randn),
        *(torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window, torch.kaiser_window),
    }
)


class _ThreadsDefault(TorchFunctionMode):
    """While entered, what its thread makes without naming a dtype is in `dtype`, whatever the process's default."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._process_dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func not in MAKERS or kwargs.get("dtype") is not None or made.dtype is not self._process_dtype:
            return made
        # Arrays and tensors bring a dtype of their own.
        return made if any(hasattr(arg, "dtype") for arg in args) else made.to(self.dtype)


@contextmanager
def own_default_dtype() -> Iterator[None]:
    """While inside, a default dtype that this thread sets holds for it alone. One thread at a time may be inside."""
    set_for_all, get_for_all = torch.set_default_dtype, torch.get_default_dtype
    inside = threading.get_ident()
    mode = _ThreadsDefault(get_for_all())

    def set_default_dtype(dtype: torch.dtype, /) -> None:
        if threading.get_ident() == inside:
            mode.dtype = dtype
        else:
            set_for_all(dtype)

    def get_default_dtype() -> torch.dtype:
        return mode.dtype if threading.get_ident() == inside else get_for_all()

    torch.set_default_dtype, torch.get_default_dtype = set_default_dtype, get_default_dtype
    try:
        with mode:
            yield
    finally:
        torch.set_default_dtype, torch.get_default_dtype = set_for_all, get_for_all
