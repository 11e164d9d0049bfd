"""What a caller asks for, and what that comes to once every default is filled in."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated

from pydantic import Field

from omnirt_tasks.contract.base import Answer, JsonObject, Value


class Task(StrEnum):
    """The kind of work."""

    TEXT2IMAGE = "text2image"
    IMAGE2IMAGE = "image2image"
    INPAINT = "inpaint"
    EDIT = "edit"
    TEXT2VIDEO = "text2video"
    IMAGE2VIDEO = "image2video"
    AUDIO2VIDEO = "audio2video"
    TEXT2AUDIO = "text2audio"
    AUDIO2TEXT = "audio2text"


class Backend(StrEnum):
    """What a job runs on."""

    CUDA = "cuda"
    ASCEND = "ascend"
    CPU = "cpu"
    CPU_STUB = "cpu-stub"


class Tier(StrEnum):
    """How far a model is the project's own concern."""

    CORE = "core"
    ADJACENT = "adjacent"
    EXPERIMENTAL = "experimental"


class Priority(StrEnum):
    """Which jobs go first; within one, the older."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


AUTO = "auto"
"""In place of a backend: routing chooses."""

MEDIA_INPUTS: Mapping[str, str] = MappingProxyType({"image": "image/", "mask": "image/", "audio": "audio/"})
"""The inputs that are references to files → how the MIME type of such a file begins."""

TAG_MARK = "+"
"""Stands before each tag in the name of a queue for jobs with tags."""

DEADLINE_S_MAX = 30 * 24 * 3600

METADATA_ENTRIES_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512
TAGS_MAX = 4

Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


class GenerateRequest(Value):
    """A request as a caller writes it: shape and types are checked here, meaning by `validation`.

    `backend` "auto" leaves the choice to routing. `inputs` and `config` hold what the model's spec allows; their
    values are checked against it. `async_run` matters over HTTP only. A job that is not over `deadline_s` after it was
    accepted ends with `timeout`, wherever it is.
    """

    task: Annotated[Task, Field(strict=False)]
    model: Annotated[str, Field(min_length=1, max_length=200)]
    backend: Annotated[str, Field(pattern=f"^({'|'.join((AUTO, *Backend))})$")] = AUTO
    inputs: dict[str, object] = Field(default_factory=dict)
    config: dict[str, object] = Field(default_factory=dict)
    adapters: None = None
    async_run: bool = False
    priority: Annotated[Priority, Field(strict=False)] = Priority.NORMAL
    tags: Annotated[list[Tag], Field(max_length=TAGS_MAX)] = Field(default_factory=list)
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=METADATA_KEY_CHARS_MAX)],
            Annotated[str, Field(max_length=METADATA_VALUE_CHARS_MAX)],
        ],
        Field(max_length=METADATA_ENTRIES_MAX),
    ] = Field(default_factory=dict)
    deadline_s: Annotated[float, Field(gt=0, le=DEADLINE_S_MAX)] | None = None
    webhook: None = None


class Inputs(Answer):
    """The inputs of a resolved request; image, mask and audio are references (`upload:ID`, `artifact:JOB/NAME`)."""

    prompt: str | tuple[str, ...] | None = None
    negative_prompt: str | None = None
    image: str | None = None
    mask: str | None = None
    audio: str | None = None
    reference_text: str | None = None
    num_frames: int | None = None
    fps: int | None = None


class ResolvedRequest(Answer):
    """What will run: an existing model's canonical id, a real backend or "auto", and every option with its value.

    `config` holds an entry for each option of the model's task, `preset` and `seed` (int) included.
    `warnings` tell where a wish was bent (fp16 on a CPU).
    """

    task: Task
    model: str
    backend: str
    inputs: Inputs
    config: JsonObject
    priority: Priority = Priority.NORMAL
    tags: tuple[str, ...] = ()
    metadata: dict[str, str] = Field(default_factory=dict)
    deadline_s: float | None = None
    warnings: tuple[str, ...] = ()
