"""NVIDIA GPUs, through torch.cuda."""

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from workers.backends import DeviceInfo


class CudaDriver:
    """One GPU."""

    name = "cuda"

    def __init__(self, device: str = "cuda:0", torch_threads: int | None = None) -> None:
        self.device = self.torch_device = device
        self._torch_threads = torch_threads

    def probe(self) -> tuple[DeviceInfo, ...]:
        if importlib.util.find_spec("torch") is None:
            return ()
        import torch

        if not torch.cuda.is_available():
            return ()
        return tuple(self._info(index) for index in range(torch.cuda.device_count()))

    @contextmanager
    def guard(self) -> Iterator[None]:
        import torch

        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        torch.cuda.set_device(self.torch_device)  # both are the thread's own
        with torch.no_grad():
            yield

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.torch_device)

    def peak_memory_bytes(self) -> int | None:
        import torch

        return int(torch.cuda.max_memory_allocated(self.torch_device))

    def is_out_of_memory(self, error: BaseException) -> bool:
        import torch

        return isinstance(error, torch.OutOfMemoryError | MemoryError)

    def release(self) -> None:
        import torch

        gc.collect()  # a wrapped module is part of a cycle
        torch.cuda.empty_cache()

    def _info(self, index: int) -> DeviceInfo:
        import torch

        # Properties only: asking a device for its free memory would leave a context of hundreds of megabytes on it.
        properties = torch.cuda.get_device_properties(index)
        dtypes = ("fp32", "fp16", "bf16") if properties.major >= 8 else ("fp32", "fp16")
        return DeviceInfo(f"cuda:{index}", properties.name, properties.total_memory, dtypes)
