"""Which device this worker has: one process per device, held by a lock file that its death releases."""

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from omnirt_tasks.contract import Backend
from omnirt_tasks.errors import ConfigurationError
from workers.backends import DeviceInfo

LOCK_FOLDER = "devices"
# The backends whose one real device several workers may share, as settings allow.
SHARED_BACKENDS = frozenset({Backend.CPU, Backend.CPU_STUB})


class DeviceLock:
    """A device that this process alone has, until it closes the lock or dies."""

    def __init__(self, device: str, file: IO[str]) -> None:
        self.device = device
        self._file = file

    @property
    def index(self) -> int:
        """The device's number among those of its backend."""
        return device_index(self.device)

    def close(self) -> None:
        """Let the device go. Idempotent."""
        self._file.close()


def device_index(device: str) -> int:
    """The number in a device's name: 1 for "cuda:1". Raises ConfigurationError for a name without one."""
    _, _, number = device.rpartition(":")
    if not number.isdecimal():
        raise ConfigurationError(f"{device!r} is no device.", "Devices are named as cuda:0, cpu:0 or cpu-stub:0.")
    return int(number)


def devices_of(backend: str, probed: Sequence[DeviceInfo], *, cpu_devices: int) -> tuple[str, ...]:
    """The names of the devices that workers of this host may take: the CPU counts as `cpu_devices` of them."""
    if backend in SHARED_BACKENDS and probed:
        return tuple(f"{backend}:{number}" for number in range(cpu_devices))
    return tuple(info.device for info in probed)


def take_device(backend: str, devices: Sequence[str], *, wanted: str | None, run_dir: Path) -> DeviceLock:
    """Lock the wanted device, or else the first free one.

    Raises ConfigurationError when there is none: it says which process has it, and what to set.
    """
    if not devices:
        raise ConfigurationError(f"This host has no {backend} device.", "Serve another queue here: celery … worker -Q.")
    if wanted is not None and wanted not in devices:
        raise ConfigurationError(
            f"OMNIRT_DEVICE is {wanted!r}; this host has {', '.join(devices)}.", "Name one of them, or unset it."
        )
    folder = run_dir / LOCK_FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    holders = []
    for device in [wanted] if wanted is not None else devices:
        file = (folder / f"{device.replace(':', '-')}.lock").open("a+")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return DeviceLock(device, file)
        file.seek(0)
        holders.append(f"{device} is taken by process {file.read().strip() or 'unknown'}")
        file.close()
    raise ConfigurationError("; ".join(holders) + ".", _remedy(backend, wanted))


def _remedy(backend: str, wanted: str | None) -> str:
    if wanted is not None:
        return "Stop it, or unset OMNIRT_DEVICE to take the next free device."
    if backend in SHARED_BACKENDS:
        return "Stop it, or raise OMNIRT_CPU_DEVICES to let more workers share the CPU."
    return "Stop it; one worker process serves a device."
