"""The backend without a device: for tests, drills and benchmarks. No torch."""

from contextlib import AbstractContextManager, nullcontext

from workers.backends import DeviceInfo, MemoryInfo
from workers.backends.cpu import process_peak_bytes


class StubDriver:
    """A device that only takes time."""

    name = "cpu-stub"
    torch_device = "cpu"

    def __init__(self, device: str = "cpu-stub:0") -> None:
        self.device = device

    def probe(self) -> tuple[DeviceInfo, ...]:
        return (DeviceInfo(self.device, "stub", None, ("fp32", "fp16", "bf16")),)

    def features(self) -> tuple[str, ...]:
        return ()

    def memory(self) -> MemoryInfo | None:
        return None

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        """Nothing: a call returns when it is done."""

    def peak_memory_bytes(self) -> int | None:
        return process_peak_bytes()

    def reset_peak(self) -> None:
        """Nothing: the system counts from the start of the process."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def is_lost(self, error: BaseException) -> bool:
        """Never: what breaks here breaks its own call alone."""
        del error
        return False

    def release(self) -> None:
        """Nothing is held."""
