"""Huawei's NPUs, through torch_npu, which stands on CANN."""

import gc
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omnirt_tasks.errors import ConfigurationError
from workers.backends import DeviceInfo, MemoryInfo, import_no_extensions

# The codes of CANN's runtime for a device that broke off, such as 507015 for an exception in a core.
_LOST = re.compile(r"error code(?: is |: ?)507\d{3}\b")

log = logging.getLogger(__name__)


class AscendDriver:
    """One NPU: "ascend:0" is "npu:0" for torch."""

    name = "ascend"

    def __init__(self, device: str = "ascend:0", torch_threads: int | None = None) -> None:
        self.device = device
        self.torch_device = _torch_name(device)
        self._torch_threads = torch_threads

    def probe(self) -> tuple[DeviceInfo, ...]:
        if importlib.util.find_spec("torch_npu") is None:
            return ()
        try:
            npu = _npu()
        except ConfigurationError as error:
            log.warning("%s", error)
            return ()
        if not npu.is_available():
            return ()
        dtypes = ("fp32", "fp16", "bf16") if _computes_in_bf16(npu) else ("fp32", "fp16")
        return tuple(_info(npu, index, dtypes) for index in range(npu.device_count()))

    def features(self) -> tuple[str, ...]:
        return ()  # torch.compile writes no kernels for it

    def memory(self) -> MemoryInfo | None:
        free_bytes, total_bytes = _npu().mem_get_info(self.torch_device)
        return MemoryInfo(total_bytes, free_bytes)

    @contextmanager
    def guard(self) -> Iterator[None]:
        npu = _npu()
        import torch

        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        npu.set_device(self.torch_device)  # both are the thread's own
        with torch.no_grad():
            yield

    def synchronize(self) -> None:
        _npu().synchronize(self.torch_device)

    def peak_memory_bytes(self) -> int | None:
        return int(_npu().max_memory_allocated(self.torch_device))

    def reset_peak(self) -> None:
        _npu().reset_peak_memory_stats(self.torch_device)

    def is_out_of_memory(self, error: BaseException) -> bool:
        import torch

        return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            # What CANN itself lacks comes without a class of its own.
            isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
        )

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None

    def release(self) -> None:
        gc.collect()  # a wrapped module is part of a cycle
        _npu().empty_cache()


def _npu() -> Any:
    """torch_npu.npu. Raises ConfigurationError where torch_npu cannot be used."""
    import_no_extensions()
    try:
        import torch_npu
    except (ImportError, RuntimeError, OSError) as error:  # whichever part of CANN it misses
        raise ConfigurationError(
            f"torch_npu cannot be used: {error}", "Install torch-npu, and the CANN that it was built for."
        ) from error
    return torch_npu.npu


def _info(npu: Any, index: int, dtypes: tuple[str, ...]) -> DeviceInfo:
    properties = npu.get_device_properties(index)
    return DeviceInfo(f"ascend:{index}", str(properties.name), int(properties.total_memory), dtypes)


def _computes_in_bf16(npu: Any) -> bool:
    # Releases for the first chips do not have the question.
    return hasattr(npu, "is_bf16_supported") and bool(npu.is_bf16_supported())


def _torch_name(device: str) -> str:
    return device.replace(AscendDriver.name, "npu", 1)
