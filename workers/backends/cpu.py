"""The CPU, through torch."""

import ctypes
import gc
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.backends import COMPILE, DeviceInfo, MemoryInfo, import_no_extensions

# Some microseconds. Not waiting at all (OMP_WAIT_POLICY=PASSIVE) makes small models twice as slow on an idle host.
OPENMP_SPINS = "1000"
# torch.compile writes C++ for the CPU, and takes this compiler where CXX names no other.
CXX_COMPILER = "clang++" if sys.platform == "darwin" else "g++"
MEMINFO = Path("/proc/meminfo")


class CpuDriver:
    """The host's processors as one device; several workers may share them, each under a number of its own."""

    name = "cpu"
    torch_device = "cpu"

    def __init__(self, device: str = "cpu:0", torch_threads: int | None = None) -> None:
        self.device = device
        self._torch_threads = torch_threads

    def probe(self) -> tuple[DeviceInfo, ...]:
        if importlib.util.find_spec("torch") is None:
            return ()
        # Half precision is left out: most processors emulate it, slower than fp32.
        info = DeviceInfo(
            self.device, _processor(), host_memory_bytes(), ("fp32", "bf16"), ranks_max=os.cpu_count() or 1
        )
        return (info,)

    def features(self) -> tuple[str, ...]:
        compiler = os.environ.get("CXX", CXX_COMPILER)
        return (COMPILE,) if shutil.which(compiler) is not None else ()

    def memory(self) -> MemoryInfo | None:
        total_bytes, free_bytes = host_memory_bytes(), _available_bytes()
        return None if total_bytes is None or free_bytes is None else MemoryInfo(total_bytes, free_bytes)

    @contextmanager
    def guard(self) -> Iterator[None]:
        # OpenMP's threads spin while they wait for each other, and on a busy host they spin away the time of the very
        # thread they wait for: a picture of `shapes` then took forty times as long. Read when torch loads OpenMP; what
        # the operator has set wins.
        os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
        import_no_extensions()
        import torch

        # One core stays free for what tells of the runs: taking it made a small picture half as slow again.
        torch.set_num_threads(self._torch_threads or max((os.cpu_count() or 1) - 1, 1))
        with torch.no_grad():  # grad mode is the thread's own
            yield

    def synchronize(self) -> None:
        """Nothing: a call returns when it is done."""

    def peak_memory_bytes(self) -> int | None:
        return process_peak_bytes()

    def reset_peak(self) -> None:
        """Nothing: the system counts from the start of the process."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError) or (
            # torch has no class for it on the CPU; both allocators write this.
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        )

    def is_lost(self, error: BaseException) -> bool:
        """Never: what breaks here breaks its own call alone."""
        del error
        return False

    def release(self) -> None:
        gc.collect()  # a wrapped module is part of a cycle
        _trim_heap()


def host_memory_bytes() -> int | None:
    """The host's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def process_peak_bytes() -> int:
    """The most memory that this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _available_bytes() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    # Not MemFree: the system's file cache gives way to whoever asks.
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _trim_heap() -> None:
    # glibc keeps freed pages for later allocations of its own: an evicted model would go on counting as resident, and
    # no other process could have its place. Other allocators have no such call, and need none.
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _processor() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count() or 1} cores"
