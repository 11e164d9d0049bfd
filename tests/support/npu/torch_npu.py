"""A torch_npu of two devices that only remembers what it was asked; tests put it, or a spoilt copy, on sys.path."""

import threading
from types import SimpleNamespace

GIB = 2**30
asked: list[tuple[str, str]] = []  # (function, device)
device_of_thread: dict[int, str] = {}


def _set_device(device: str) -> None:
    device_of_thread[threading.get_ident()] = device


def _mem_get_info(device: str) -> tuple[int, int]:
    asked.append(("mem_get_info", device))
    return 40 * GIB, 64 * GIB


def _max_memory_allocated(device: str) -> int:
    asked.append(("max_memory_allocated", device))
    return 3 * GIB


npu = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 2,
    is_bf16_supported=lambda: True,
    get_device_properties=lambda index: SimpleNamespace(name=f"NPU {index}", total_memory=64 * GIB),
    set_device=_set_device,
    synchronize=lambda device: asked.append(("synchronize", device)),
    empty_cache=lambda: asked.append(("empty_cache", "")),
    mem_get_info=_mem_get_info,
    max_memory_allocated=_max_memory_allocated,
    reset_peak_memory_stats=lambda device: asked.append(("reset_peak_memory_stats", device)),
)


def _autoload() -> None:
    """What torch calls when it is imported, if it is let."""
