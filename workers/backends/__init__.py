"""What each kind of device is: how to find it, hold it, measure it and let it go. It has not heard of jobs."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from omnirt_tasks.contract import Backend
from omnirt_tasks.errors import ConfigurationError

COMPILE = "compile"
"""The feature of a device that torch.compile works on."""


@dataclass(frozen=True)
class DeviceInfo:
    """One device: `device` is its name ("cuda:0", "cpu:0"), `memory_bytes` None where it cannot be told.

    A rank group may have `ranks_max` ranks on it: one, unless ranks can share it.
    """

    device: str
    name: str
    memory_bytes: int | None
    dtypes: tuple[str, ...]
    ranks_max: int = 1


@dataclass(frozen=True)
class MemoryInfo:
    """A device's memory now: all of it, and what no process holds."""

    total_bytes: int
    free_bytes: int


class BackendDriver(Protocol):
    """One device of one backend. Safe to share between threads."""

    @property
    def name(self) -> str:
        """The backend's name, as in a request."""
        ...

    @property
    def device(self) -> str:
        """The device's name, one of those that `probe` finds."""
        ...

    @property
    def torch_device(self) -> str:
        """The device's name for torch."""
        ...

    def probe(self) -> tuple[DeviceInfo, ...]:
        """Every device of this backend on this host; empty when there is none, or its software is not installed."""
        ...

    def features(self) -> tuple[str, ...]:
        """What the device can do beside its dtypes: "compile" where torch.compile finds what it needs."""
        ...

    def memory(self) -> MemoryInfo | None:
        """The device's memory now; None where it cannot be told. For a process that holds the device."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """What a thread that computes on the device is inside of: its device, its threads, no gradients."""
        ...

    def synchronize(self) -> None:
        """Wait for the device's work, so that its errors and its time belong to the call that made it."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """The most memory that this process has held since `reset_peak`; None where it cannot be told.

        Ever, where the system keeps no other count.
        """
        ...

    def reset_peak(self) -> None:
        """Count the most memory from now on. For a process that holds the device."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the error says that memory was too small."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether the error says that this process can no longer use the device: only another process can."""
        ...

    def release(self) -> None:
        """Give memory that nothing uses any more back to the device, so that other processes may have it."""
        ...


def driver(name: str, device: str | None = None, torch_threads: int | None = None) -> BackendDriver:
    """The driver of one device: `device` by name, else the backend's first.

    `torch_threads` bounds the CPU threads of one operation; torch's own choice by default.
    Raises ConfigurationError for a backend that this installation has no driver for.
    """
    match name:
        case Backend.CPU:
            from workers.backends.cpu import CpuDriver

            return CpuDriver(device or "cpu:0", torch_threads)
        case Backend.CUDA:
            from workers.backends.cuda import CudaDriver

            return CudaDriver(device or "cuda:0", torch_threads)
        case Backend.ASCEND:
            from workers.backends.ascend import AscendDriver

            return AscendDriver(device or "ascend:0", torch_threads)
        case Backend.CPU_STUB:
            from workers.backends.stub import StubDriver

            return StubDriver(device or "cpu-stub:0")
        case _:
            raise ConfigurationError(
                f"The backend {name!r} has no driver here.", f"Use {', '.join(Backend)}: a queue is named cuda-sdxl."
            )


def import_no_extensions() -> None:
    """Have torch import no device extension by itself; to be called before torch is imported for the first time.

    It otherwise imports every one that is installed, whatever the device, and torch-npu raises where CANN is missing:
    then not even the CPU could be used. What the operator has set wins.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
