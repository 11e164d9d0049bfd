"""The clock of this host, in the one unit that the project tells times in."""

import time


def unix_ms() -> int:
    """The time now, in Unix milliseconds."""
    return time.time_ns() // 1_000_000
