"""The states of a job and the moves between them, as data."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands; the last three are terminal and never change."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """What a running job is doing, in the terms of a runtime."""

    WAITING = "waiting"  # claimed, not yet on the device
    PREFILL = "prefill"  # loading the model, encoding the prompt
    DECODE = "decode"  # denoising
    DRAINING = "draining"  # latents to pixels, files


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

# The compare-and-set scripts of the store enforce this table; a test reads both.
ALLOWED_MOVES: dict[JobState, frozenset[JobState]] = {
    # A queued job may fail without having run: its deadline passed, or nobody may run it any more.
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
    # Back to queued: its worker died or gave it back; the next claim counts a new attempt.
    JobState.RUNNING: frozenset({JobState.QUEUED, *TERMINAL_STATES}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

# Which phase a stage of a pipeline belongs to; stages of a model's own count as denoising.
PHASE_OF_STAGE: dict[str, Phase] = {
    "waiting": Phase.WAITING,
    "load": Phase.PREFILL,
    "encode_prompt": Phase.PREFILL,
    "denoise": Phase.DECODE,
    "decode": Phase.DRAINING,
    "export": Phase.DRAINING,
}
