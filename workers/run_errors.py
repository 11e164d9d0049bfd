"""What the error of a run is told as: in the words of the error tree, with what its caller can change."""

import logging
import re
from collections.abc import Iterator

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.errors import Internal, ModelFailed, OmnirtError, OutOfMemory
from omnirt_tasks.registry.footprint import in_words
from workers.backends import BackendDriver
from workers.chunks.members import Member
from workers.disk import full_disk

log = logging.getLogger(__name__)

# How torch says what it could not have: "Tried to allocate 2.00 GiB", "you tried to allocate 1024 bytes".
ASKED_FOR = re.compile(r"tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
UNIT_BYTES = {"bytes": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


def explain(error: BaseException, member: Member, driver: BackendDriver) -> ErrorInfo:
    """What the error of the member's run is told as; whatever has no words of its own is the model's failure."""
    if isinstance(error, OmnirtError):
        return error.info()
    if (full := full_disk(error)) is not None:
        return full.info()
    if driver.is_out_of_memory(error):
        return out_of_memory(error, member, driver).info()
    if isinstance(error, Exception):
        return ModelFailed(
            f"The model's code raised {type(error).__name__}.", "The worker's log has the whole story."
        ).info()
    return broken_off()


def out_of_memory(error: BaseException, member: Member, driver: BackendDriver) -> OutOfMemory:
    """The device had too little memory for a run by itself: what it needed, what there was, what to change."""
    return OutOfMemory(
        f"The device has too little memory for this job{_needed(error, member)}{_there(driver)}.",
        "Ask for fewer or smaller pictures, or for the preset low-vram.",
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def broken_off() -> ErrorInfo:
    """The run ended without a result, and nobody can say why."""
    return Internal("The run was broken off.", "The worker's log has the whole story.").info()


def asked_for_bytes(error: BaseException) -> int | None:
    """How much memory was wanted when there was none, as far as the error tells."""
    for told in causes(error):
        if (found := ASKED_FOR.search(str(told))) is not None:
            return int(float(found[1]) * UNIT_BYTES[found[2].lower()])
    return None


def _needed(error: BaseException, member: Member) -> str:
    asked_bytes = asked_for_bytes(error)
    more = "" if asked_bytes is None else f" needs {in_words(asked_bytes)} more"
    if (call := member.too_large) is None:
        return f", which{more}" if more else ""
    samples = "one sample" if call.rows == 1 else f"{call.rows} samples"
    shape = f" of {member.shape}" if member.shape else ""
    return f": a call of its {call.part or 'model'} with {samples}{shape}{more or ' does not fit'}"


def _there(driver: BackendDriver) -> str:
    try:
        memory = driver.memory()
    except Exception:  # where memory lacked for the device's own libraries, it cannot be asked
        log.warning("the device does not tell its memory", exc_info=True)
        return ""
    if memory is None:
        return ""
    return f"; {in_words(memory.free_bytes)} of its {in_words(memory.total_bytes)} are free"
