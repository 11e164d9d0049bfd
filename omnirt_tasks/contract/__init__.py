"""What crosses a process boundary, as frozen values.

    GenerateRequest ─► ResolvedRequest ─► Event… ─► GenerateResult
                            JobRecord tells where a job stands; WorkerCapability what a worker can do

This package imports nothing else of the project: every arrow in the house leads here.
Parsing happens once, at the edge, with pydantic; past it a value's type means that it is valid.
"""

from omnirt_tasks.contract.capability import ModelAbility, WorkerCapability
from omnirt_tasks.contract.errors import ErrorInfo, Problem
from omnirt_tasks.contract.events import TERMINAL_EVENTS, Event, EventName
from omnirt_tasks.contract.job import (
    CancelOutcome,
    JobRecord,
    Progress,
    QueueStatus,
)
from omnirt_tasks.contract.readiness import QueueReadiness, Readiness
from omnirt_tasks.contract.request import (
    AUTO,
    MEDIA_INPUTS,
    TAG_MARK,
    Backend,
    GenerateRequest,
    Inputs,
    Priority,
    ResolvedRequest,
    Task,
    Tier,
)
from omnirt_tasks.contract.result import (
    SCHEMA_VERSION,
    Artifact,
    ArtifactKind,
    ExecutionMode,
    GenerateResult,
    RunReport,
    TimelineEntry,
)
from omnirt_tasks.contract.states import (
    ALLOWED_MOVES,
    TERMINAL_STATES,
    JobState,
    Phase,
)

__all__ = [
    "ALLOWED_MOVES",
    "AUTO",
    "MEDIA_INPUTS",
    "SCHEMA_VERSION",
    "TAG_MARK",
    "TERMINAL_EVENTS",
    "TERMINAL_STATES",
    "Artifact",
    "ArtifactKind",
    "Backend",
    "CancelOutcome",
    "ErrorInfo",
    "Event",
    "EventName",
    "ExecutionMode",
    "GenerateRequest",
    "GenerateResult",
    "Inputs",
    "JobRecord",
    "JobState",
    "ModelAbility",
    "Phase",
    "Priority",
    "Problem",
    "Progress",
    "QueueReadiness",
    "QueueStatus",
    "Readiness",
    "ResolvedRequest",
    "RunReport",
    "Task",
    "Tier",
    "TimelineEntry",
    "WorkerCapability",
]
