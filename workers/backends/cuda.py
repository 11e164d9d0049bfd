"""NVIDIA GPUs, through torch.cuda."""

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from workers.backends import COMPILE, DeviceInfo, MemoryInfo, import_no_extensions

LACK_IN_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

LOSS_IN_WORDS = (
    "CUDA error: an illegal memory access",
    "CUDA error: device-side assert",
    "CUDA error: unspecified launch failure",
)


class CudaDriver:
    """One GPU."""

    name = "cuda"

    def __init__(self, device: str = "cuda:0", torch_threads: int | None = None) -> None:
        self.device = self.torch_device = device
        self._torch_threads = torch_threads

    def probe(self) -> tuple[DeviceInfo, ...]:
        if importlib.util.find_spec("torch") is None:
            return ()
        import_no_extensions()
        import torch

        if not torch.cuda.is_available():
            return ()
        return tuple(self._info(index) for index in range(torch.cuda.device_count()))

    def features(self) -> tuple[str, ...]:
        # torch.compile writes its kernels in triton, which comes with torch for CUDA, but not on every platform.
        return (COMPILE,) if importlib.util.find_spec("triton") is not None else ()

    def memory(self) -> MemoryInfo | None:
        import torch

        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        return MemoryInfo(total_bytes, free_bytes)

    @contextmanager
    def guard(self) -> Iterator[None]:
        import_no_extensions()
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

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def is_out_of_memory(self, error: BaseException) -> bool:
        import torch

        return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            # Only torch's own allocator has a class for it; the libraries beneath say it in words.
            isinstance(error, RuntimeError) and any(words in str(error) for words in LACK_IN_WORDS)
        )

    def is_lost(self, error: BaseException) -> bool:
        import torch

        if self.is_out_of_memory(error):
            return False
        # What CUDA itself tells mostly stays with the context: every later call fails with it.
        return isinstance(error, torch.AcceleratorError) or (
            # Libraries that call it by themselves raise it without the class.
            isinstance(error, RuntimeError) and any(words in str(error) for words in LOSS_IN_WORDS)
        )

    def release(self) -> None:
        import torch

        gc.collect()  # a wrapped module is part of a cycle
        torch.cuda.empty_cache()

    def _info(self, index: int) -> DeviceInfo:
        import torch

        # Properties only: asking a device for its free memory would leave a context of hundreds of megabytes on it.
        properties = torch.cuda.get_device_properties(index)
        # Older ones compute in bf16 by way of fp32: neither faster nor smaller.
        dtypes = ("fp32", "fp16", "bf16") if properties.major >= 8 else ("fp32", "fp16")
        return DeviceInfo(f"cuda:{index}", properties.name, properties.total_memory, dtypes)
