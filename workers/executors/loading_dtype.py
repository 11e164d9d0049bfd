"""Keeps torch's default dtype to the thread that loads: libraries set it for the whole process while they make a model.

Under the feet of every job that runs meanwhile: what a pipeline or scheduler then makes without a dtype (UniPC's
coefficients, the last sigma of flow matching, the mean of a VAE's latents) would be rounded to the loading model's.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_set, _get = torch.set_default_dtype, torch.get_default_dtype
_own = threading.local()


class _OwnDefault(TorchFunctionMode):
    """Numbers that would be made in the process's default dtype are made in the thread's own."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = _get()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in _device_constructors() and kwargs.get("dtype") is None and made.dtype is _get():
            return made.to(self.dtype)
        return made


def _set_own(dtype: torch.dtype) -> None:
    mode = getattr(_own, "mode", None)
    if mode is None:
        _set(dtype)
    else:
        mode.dtype = dtype


def _get_own() -> torch.dtype:
    mode = getattr(_own, "mode", None)
    return _get() if mode is None else mode.dtype


@contextmanager
def own_default_dtype() -> Iterator[None]:
    torch.set_default_dtype, torch.get_default_dtype = _set_own, _get_own
    with _OwnDefault() as mode:
        _own.mode = mode
        try:
            yield
        finally:
            del _own.mode
            torch.set_default_dtype, torch.get_default_dtype = _set, _get
