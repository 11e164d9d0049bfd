"""What the two kinds of streams share: where to resume, and how the log is read."""

import re

SEQ_MAX = 2**53
_WHOLE = re.compile(r"[0-9]{1,400}", re.ASCII)


def resume_point(value: object) -> int:
    """The number after which a stream goes on; 0, the start, for what is no whole number from 0."""
    if isinstance(value, bool):
        return 0
    if isinstance(value, int):
        return min(value, SEQ_MAX) if value >= 0 else 0
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return min(int(value), SEQ_MAX)
    return 0
