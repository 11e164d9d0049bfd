"""MemoryBudget: what of a device's memory is spoken for, by models and by runs."""

from omnirt_tasks.contract import ResolvedRequest
from omnirt_tasks.registry.footprint import insufficient_memory


class MemoryBudget:
    """So many bytes, taken and given back; without a total, everything fits.

    Not safe to share between threads: its owner's lock guards it.
    """

    def __init__(self, total_bytes: int | None) -> None:
        if total_bytes is not None and total_bytes < 1:
            raise ValueError(f"total_bytes {total_bytes}; a budget holds at least one")
        self.total_bytes = total_bytes
        self.taken_bytes = 0

    def lacking_bytes(self, size_bytes: int = 0) -> int:
        """How many bytes must be given back before so many more fit; 0 when they fit now."""
        if self.total_bytes is None:
            return 0
        return max(0, self.taken_bytes + size_bytes - self.total_bytes)

    def take(self, size_bytes: int) -> None:
        """Count the bytes as taken, though they do not fit: what is there is there."""
        self.taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Count the bytes as free."""
        self.taken_bytes -= size_bytes

    def require(self, model_bytes: int, working_bytes: int, request: ResolvedRequest | None = None) -> None:
        """Raise InsufficientMemory for what would not fit if all else were gone; its hint is for the request."""
        if self.total_bytes is not None and model_bytes + working_bytes > self.total_bytes:
            raise insufficient_memory(model_bytes, working_bytes, self.total_bytes, request)
